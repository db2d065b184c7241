/// Tokens to train on and tokens held out, in host memory, and windows of them as batches.
///
/// The window of sequence i is a function of (seed, i) alone, so any point of a run can be reached
/// without going through what came before: the data position of a checkpoint is a number.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <variant>
#include <vector>

namespace lrnn {

class Tokenizer;

/// A batch on the host: targets are inputs one token later.
struct TokenBatch {
  std::span<std::int32_t> input_ids;  ///< [B, L]
  std::span<std::int32_t> targets;    ///< [B, L]
};

class TextData {
 public:
  /// Every byte is a token, 0..255. The last `held_out` of every file, at least one byte unless it
  /// is 0, is held out; what remains is joined.
  /// @throws IoError; ConfigError if held_out is not in [0, 1)
  static TextData from_files(const std::vector<std::filesystem::path>& files,
                             double held_out = 0.05);
  /// The tokens of `tokenizer`. The held-out end of a file begins at a whole character, and both of
  /// its parts are encoded by themselves; between files there is no other token.
  /// @throws IoError; ConfigError if held_out is not in [0, 1); InvalidArgument naming the file if
  /// it cannot be encoded
  static TextData from_files(const std::vector<std::filesystem::path>& files,
                             const Tokenizer& tokenizer, double held_out = 0.05);
  /// The same with texts in memory in place of files.
  static TextData from_bytes(const std::vector<std::vector<std::uint8_t>>& texts,
                             double held_out = 0.05);
  /// Token ids from elsewhere. `bytes_per_token`, of both parts, turns the loss into bits per byte.
  /// @throws InvalidArgument on a negative id
  static TextData from_tokens(std::vector<std::int32_t> train, std::vector<std::int32_t> held_out,
                              double bytes_per_token);

  [[nodiscard]] std::int64_t train_size() const { return size(train_); }
  [[nodiscard]] std::int64_t held_out_size() const { return size(held_out_); }
  /// Of the tokens to train on, and of those held out; 1 without tokens.
  [[nodiscard]] double bytes_per_token() const noexcept { return bytes_per_token_; }
  [[nodiscard]] double held_out_bytes_per_token() const noexcept {
    return held_out_bytes_per_token_;
  }
  /// The greatest id; -1 without tokens.
  [[nodiscard]] std::int32_t max_token() const;

  /// Sequences first, first + 1, ... of the endless random order of `seed`, each of seqlen + 1
  /// consecutive tokens.
  /// @throws InvalidArgument if there are fewer than seqlen + 1 tokens to train on
  void fill_train(std::uint64_t seed, std::int64_t first, std::int64_t seqlen,
                  const TokenBatch& batch) const;

  /// Windows of seqlen targets that together predict every held-out token but the first once.
  [[nodiscard]] std::int64_t held_out_windows(std::int64_t seqlen) const;
  /// Windows first, first + 1, ...; what lies behind the end has targets kIgnoreIndex. Returns the
  /// number of targets that count.
  [[nodiscard]] std::int64_t fill_held_out(std::int64_t first, std::int64_t seqlen,
                                           const TokenBatch& batch) const;

 private:
  using Tokens = std::variant<std::vector<std::uint8_t>, std::vector<std::int32_t>>;
  static std::int64_t size(const Tokens& tokens);

  Tokens train_;
  Tokens held_out_;
  double bytes_per_token_ = 1.0;
  double held_out_bytes_per_token_ = 1.0;
};

}  // namespace lrnn
