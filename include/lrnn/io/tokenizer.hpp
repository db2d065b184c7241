/// Text to token ids and back: bytes, or the byte-level BPE of a Hugging Face tokenizer.json.
///
/// What is read of tokenizer.json is the kind of GPT-2 (Radford et al. 2019, "Language Models are
/// Unsupervised Multitask Learners") and GPT-NeoX (arXiv:2204.06745), which Mamba's published
/// models use. encode() is, in this order:
///  1. added tokens that are not "normalized" are cut out of the text, the longest at each place;
///  2. the rest is brought to NFC, if the file says so, and the other added tokens are cut out;
///  3. what lies between begins with a space, if the file says so, and is split into words by
///     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
///  4. the bytes of a word are merged pairwise, the pair that is first in "merges" first and the
///     leftmost of equal pairs first (Sennrich et al., arXiv:1508.07909), until no pair is left.
/// The ids are those of the library `tokenizers`, with its Unicode versions: letters and numbers of
/// Unicode 16, NFC of Unicode 9.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lrnn {

struct DecodeOptions {
  bool skip_special = true;  ///< leave out added tokens that the file calls special
};

/// Immutable; copies share their tables, and threads may share one.
class Tokenizer {
 public:
  static constexpr std::uint64_t kMaxFileBytes = std::uint64_t{32} << 20;

  /// Every byte is a token, 0..255, and any bytes are text.
  Tokenizer();
  /// `origin` names the text in messages.
  /// @throws ConfigError naming the path in the file, what was expected and what came: malformed
  /// JSON; any component, option or key that is not described above, even where it would change
  /// nothing today; ids other than 0..n-1, each once; duplicate tokens or merges; merges whose
  /// parts or product are not in the vocabulary; this build being without PCRE2 and utf8proc
  static Tokenizer from_json(std::string_view text, const std::string& origin = "tokenizer.json");
  /// @throws IoError if `path` is unreadable or larger than kMaxFileBytes; as from_json()
  static Tokenizer from_file(const std::filesystem::path& path);
  /// That of a model's folder: its tokenizer.json, or bytes if there is none.
  /// @throws as from_file()
  static Tokenizer of_model(const std::filesystem::path& directory);
  /// False in a build without PCRE2 and utf8proc, which reads bytes only.
  [[nodiscard]] static bool reads_json() noexcept;

  [[nodiscard]] bool is_bytes() const noexcept;
  /// Ids are 0 .. vocab_size() - 1.
  [[nodiscard]] std::int64_t vocab_size() const noexcept;

  /// @throws InvalidArgument unless is_bytes() if `text` is not UTF-8, or a byte of it is not in
  /// the vocabulary (`tokenizers` would leave it out), naming the offset
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const;
  /// Bytes as they are if is_bytes(), else UTF-8: U+FFFD stands for each longest beginning of a
  /// character that does not go on, and for each byte that begins none.
  /// @throws InvalidArgument on an id out of range
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids,
                                   const DecodeOptions& options = {}) const;

  /// The bytes that a token stands for, which need not be whole characters.
  /// @throws InvalidArgument on an id out of range
  [[nodiscard]] std::string_view token(std::int32_t id) const;
  /// @throws InvalidArgument on an id out of range
  [[nodiscard]] bool is_special(std::int32_t id) const;
  /// The id of an added token, such as <|endoftext|>.
  [[nodiscard]] std::optional<std::int32_t> added_token(std::string_view content) const;

 private:
  struct Tables;
  explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}
  std::shared_ptr<const Tables> tables_;
};

/// decode() one token at a time: the texts returned, joined, are the decoded whole, and each of
/// them ends with a whole character.
class TokenStream {
 public:
  explicit TokenStream(Tokenizer tokenizer, const DecodeOptions& options = {})
      : tokenizer_(std::move(tokenizer)), options_(options) {}

  /// What has become certain with this token; bytes that may begin a character wait for the next.
  /// @throws InvalidArgument on an id out of range
  [[nodiscard]] std::string push(std::int32_t id);
  /// What still waits, as the end of the text.
  [[nodiscard]] std::string finish();

 private:
  Tokenizer tokenizer_;
  DecodeOptions options_;
  std::string held_;  // the beginning of a character
};

}  // namespace lrnn
