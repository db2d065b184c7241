#include "lrnn/train/text_data.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "lrnn/core/error.hpp"
#include "lrnn/core/random.hpp"
#include "lrnn/io/file.hpp"
#include "lrnn/io/tokenizer.hpp"
#include "lrnn/ops/cross_entropy.hpp"

#include "ops/sample_math.hpp"

namespace lrnn {
namespace {

// High half of the Philox counter: keeps these numbers apart from those of sampling, which have
// the row there.
constexpr std::uint64_t kDataStream = 0x6461746100000000U;

std::vector<std::uint8_t> read_bytes(const std::filesystem::path& path) {
  const InputFile file(path);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(file.size()));
  file.read(0, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

void check_share(double held_out) {
  LRNN_CHECK(held_out >= 0.0 && held_out < 1.0, ConfigError,
             "TextData: held_out: expected [0, 1), got ", held_out);
}
// Bytes of the end of a text that are held out.
std::size_t held_out_bytes(std::size_t size, double held_out) {
  return static_cast<std::size_t>(std::ceil(held_out * static_cast<double>(size)));
}

/// Tokens of texts, one after the other, and the bytes they stand for.
struct Encoded {
  std::vector<std::int32_t> tokens;
  std::size_t bytes = 0;

  // The part of a file from `begin` on.
  void append(const Tokenizer& tokenizer, std::string_view text, std::size_t begin,
              const std::filesystem::path& path) {
    try {
      const std::vector<std::int32_t> ids = tokenizer.encode(text);
      tokens.insert(tokens.end(), ids.begin(), ids.end());
      bytes += text.size();
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(
          detail::concat(path.string(), ": from byte ", begin, " on: ", error.what()));
    }
  }
  [[nodiscard]] double bytes_per_token() const {
    return tokens.empty() ? 1.0 : static_cast<double>(bytes) / static_cast<double>(tokens.size());
  }
};

void check_batch(const TokenBatch& batch, std::int64_t seqlen) {
  LRNN_CHECK(seqlen > 0, InvalidArgument, "TextData: seqlen: expected > 0, got ", seqlen);
  LRNN_CHECK(batch.input_ids.size() == batch.targets.size() &&
                 batch.input_ids.size() % static_cast<std::size_t>(seqlen) == 0,
             InvalidArgument, "TextData: a batch of ", batch.input_ids.size(), " and ",
             batch.targets.size(), " tokens for windows of ", seqlen);
}

}  // namespace

std::int64_t TextData::size(const Tokens& tokens) {
  return static_cast<std::int64_t>(std::visit([](const auto& v) { return v.size(); }, tokens));
}

TextData TextData::from_files(const std::vector<std::filesystem::path>& files, double held_out) {
  std::vector<std::vector<std::uint8_t>> texts;
  texts.reserve(files.size());
  for (const auto& path : files) texts.push_back(read_bytes(path));
  return from_bytes(texts, held_out);
}

TextData TextData::from_bytes(const std::vector<std::vector<std::uint8_t>>& texts,
                              double held_out) {
  check_share(held_out);
  std::vector<std::uint8_t> train;
  std::vector<std::uint8_t> rest;
  for (const auto& text : texts) {
    const auto cut =
        text.end() - static_cast<std::ptrdiff_t>(held_out_bytes(text.size(), held_out));
    train.insert(train.end(), text.begin(), cut);
    rest.insert(rest.end(), cut, text.end());
  }
  TextData data;
  data.train_ = std::move(train);
  data.held_out_ = std::move(rest);
  return data;
}

TextData TextData::from_files(const std::vector<std::filesystem::path>& files,
                              const Tokenizer& tokenizer, double held_out) {
  if (tokenizer.is_bytes()) return from_files(files, held_out);
  check_share(held_out);
  Encoded train;
  Encoded rest;
  for (const auto& path : files) {
    const std::string text = read_text_file(path, std::numeric_limits<std::uint64_t>::max());
    std::size_t cut = text.size() - held_out_bytes(text.size(), held_out);
    const auto continues = [&] { return (static_cast<unsigned char>(text[cut]) & 0xC0U) == 0x80U; };
    while (cut > 0 && cut < text.size() && continues()) --cut;
    train.append(tokenizer, std::string_view(text).substr(0, cut), 0, path);
    rest.append(tokenizer, std::string_view(text).substr(cut), cut, path);
  }
  const double bytes_per_token = train.bytes_per_token();  // before the tokens are moved away
  TextData data = from_tokens(std::move(train.tokens), {}, bytes_per_token);
  data.held_out_bytes_per_token_ = rest.bytes_per_token();
  data.held_out_ = std::move(rest.tokens);
  return data;
}

TextData TextData::from_tokens(std::vector<std::int32_t> train, std::vector<std::int32_t> held_out,
                               double bytes_per_token) {
  LRNN_CHECK(bytes_per_token > 0.0, ConfigError, "TextData: bytes_per_token: expected > 0, got ",
             bytes_per_token);
  for (const auto* tokens : {&train, &held_out})
    for (const std::int32_t token : *tokens)
      LRNN_CHECK(token >= 0, InvalidArgument, "TextData: token ids: expected >= 0, got ", token);
  TextData data;
  data.train_ = std::move(train);
  data.held_out_ = std::move(held_out);
  data.bytes_per_token_ = bytes_per_token;
  data.held_out_bytes_per_token_ = bytes_per_token;
  return data;
}

std::int32_t TextData::max_token() const {
  std::int32_t greatest = -1;
  for (const Tokens* tokens : {&train_, &held_out_})
    std::visit(
        [&](const auto& v) {
          for (const auto token : v)
            greatest = std::max(greatest, static_cast<std::int32_t>(token));
        },
        *tokens);
  return greatest;
}

void TextData::fill_train(std::uint64_t seed, std::int64_t first, std::int64_t seqlen,
                          const TokenBatch& batch) const {
  check_batch(batch, seqlen);
  const std::int64_t starts = train_size() - seqlen;
  LRNN_CHECK(starts > 0, InvalidArgument, "TextData: ", train_size(),
             " tokens to train on, expected at least ", seqlen + 1, " for one sequence");
  const auto rows = static_cast<std::int64_t>(batch.input_ids.size()) / seqlen;
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto start = static_cast<std::int64_t>(
        detail::draw(seed, kDataStream, static_cast<std::uint64_t>(first + row),
                     static_cast<std::uint64_t>(starts)));
    std::visit(
        [&](const auto& tokens) {
          const auto from = tokens.begin() + start;
          std::copy_n(from, seqlen, batch.input_ids.begin() + row * seqlen);
          std::copy_n(from + 1, seqlen, batch.targets.begin() + row * seqlen);
        },
        train_);
  }
}

std::int64_t TextData::held_out_windows(std::int64_t seqlen) const {
  const std::int64_t targets = held_out_size() - 1;
  return targets <= 0 ? 0 : (targets + seqlen - 1) / seqlen;
}

std::int64_t TextData::fill_held_out(std::int64_t first, std::int64_t seqlen,
                                     const TokenBatch& batch) const {
  check_batch(batch, seqlen);
  std::fill(batch.input_ids.begin(), batch.input_ids.end(), 0);
  std::fill(batch.targets.begin(), batch.targets.end(), kIgnoreIndex);
  const std::int64_t begin = first * seqlen;
  const std::int64_t count = std::clamp<std::int64_t>(
      held_out_size() - 1 - begin, 0, static_cast<std::int64_t>(batch.targets.size()));
  if (count == 0) return 0;
  std::visit(
      [&](const auto& tokens) {
        std::copy_n(tokens.begin() + begin, count, batch.input_ids.begin());
        std::copy_n(tokens.begin() + begin + 1, count, batch.targets.begin());
      },
      held_out_);
  return count;
}

}  // namespace lrnn
