/// The tokenizer.json of a byte-level BPE, read and checked.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "io/bpe.hpp"

namespace lrnn::detail {

struct AddedToken {
  std::int32_t id;
  std::string content;  ///< UTF-8, not empty
  bool normalized;      ///< is looked for in normalised text
  bool special;
};

struct TokenizerFile {
  std::vector<std::string> tokens;  ///< by id, as the file has them: every byte is a character
  std::vector<AddedToken> added;    ///< ids within `tokens`, no content twice
  std::vector<BpeMerge> merges;     ///< by rank, no pair twice
  bool nfc = false;
  bool add_prefix_space = false;
  bool use_regex = true;
};

/// The character that stands for each byte in the tokens of a file: printable bytes of Latin-1 are
/// themselves, the others are U+0100, U+0101, ... in their order.
[[nodiscard]] const std::vector<std::string>& byte_characters();

/// @throws ConfigError: see Tokenizer::from_json()
[[nodiscard]] TokenizerFile read_tokenizer_json(std::string_view text, const std::string& origin);

}  // namespace lrnn::detail
