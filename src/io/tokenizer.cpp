#include "lrnn/io/tokenizer.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <system_error>
#include <utility>

#include "lrnn/core/error.hpp"
#include "lrnn/io/file.hpp"

#include "io/bpe.hpp"
#include "io/tokenizer_json.hpp"
#include "io/unicode_text.hpp"
#include "io/utf8.hpp"

namespace lrnn {
namespace {

constexpr const char* kFileName = "tokenizer.json";

/// Finds texts in a text: the leftmost, of these the longest.
class Matcher {
 public:
  struct Entry {
    std::string content;
    std::int32_t id;
  };
  Matcher() = default;
  /// @throws ConfigError if two are the same text
  explicit Matcher(std::vector<Entry> entries) : entries_(std::move(entries)) {
    std::ranges::sort(entries_, {}, &Entry::content);
    const auto twice = std::ranges::adjacent_find(entries_, {}, &Entry::content);
    LRNN_CHECK(twice == entries_.end(), ConfigError,
               "$.added_tokens: expected texts that differ in normalisation form C, got ids ",
               twice->id, " and ", twice[1].id);
    for (const Entry& e : entries_) starts_[static_cast<unsigned char>(e.content[0])] = true;
  }

  /// Calls `on_text` with what lies between, where it is not empty, and `on_match` with ids.
  template <class OnText, class OnMatch>
  void split(std::string_view text, const OnText& on_text, const OnMatch& on_match) const {
    std::size_t begin = 0;
    for (std::size_t at = 0; at < text.size();) {
      const auto [length, id] = longest(text.substr(at));
      if (length == 0) {
        ++at;
        continue;
      }
      if (at > begin) on_text(text.substr(begin, at - begin));
      on_match(id);
      begin = at += length;
    }
    if (begin < text.size()) on_text(text.substr(begin));
  }

 private:
  // Length 0: none is here.
  [[nodiscard]] std::pair<std::size_t, std::int32_t> longest(std::string_view text) const {
    std::pair<std::size_t, std::int32_t> found{0, -1};
    if (!starts_[static_cast<unsigned char>(text[0])]) return found;
    std::span<const Entry> rest = entries_;  // those that begin with the first n bytes of `text`
    for (std::size_t n = 0; n < text.size() && !rest.empty(); ++n) {
      const auto byte_n = [n](const Entry& e) {
        return n < e.content.size() ? static_cast<unsigned char>(e.content[n]) : -1;
      };
      // Two searches: clang 14 cannot compile equal_range of libstdc++.
      const auto byte = static_cast<unsigned char>(text[n]);
      rest = {std::ranges::lower_bound(rest, byte, {}, byte_n),
              std::ranges::upper_bound(rest, byte, {}, byte_n)};
      if (!rest.empty() && rest[0].content.size() == n + 1) found = {n + 1, rest[0].id};
    }
    return found;
  }

  std::vector<Entry> entries_;  // sorted
  std::array<bool, 256> starts_{};
};

// The bytes behind the characters of a token; as in `tokenizers`, those of the token itself if one
// of its characters stands for no byte.
std::string token_bytes(const std::map<std::string_view, char>& bytes, std::string_view token) {
  std::string out;
  for (std::size_t at = 0; at < token.size();) {
    const std::size_t length = detail::utf8_part(token.substr(at)).length;
    const auto it = bytes.find(token.substr(at, length));
    if (it == bytes.end()) return std::string(token);
    out += it->second;
    at += length;
  }
  return out;
}

template <class F>
auto with_origin(const std::string& origin, F&& f) {
  try {
    return f();
  } catch (const ConfigError& error) {
    throw ConfigError(origin + ": " + error.what());
  }
}

}  // namespace

struct Tokenizer::Tables {
  /// What only a file has.
  struct Model {
    detail::Bpe bpe;
    detail::WordSplitter splitter = {};
    Matcher raw = {};         // added tokens that are found before normalisation,
    Matcher normalized = {};  // and after
    bool nfc = false;
    bool add_prefix_space = false;
    bool use_regex = true;
    [[nodiscard]] std::string normalize(std::string_view text) const {
      return nfc ? detail::nfc(text) : std::string(text);
    }
    void encode(std::string_view text, std::vector<std::int32_t>& out) const;
    void encode_words(std::string_view text, detail::Bpe::Encoder& encoder,
                      std::vector<std::int32_t>& out) const;
  };

  Tables() {
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    special.resize(tokens.size());
  }
  explicit Tables(const detail::TokenizerFile& file);
  void check(std::int32_t id) const {
    LRNN_CHECK(id >= 0 && static_cast<std::size_t>(id) < tokens.size(), InvalidArgument,
               "Tokenizer: token ids: expected 0..", tokens.size() - 1, ", got ", id);
  }

  std::vector<std::string> tokens;  // the bytes of each
  std::vector<bool> special;
  std::map<std::string, std::int32_t, std::less<>> added;
  std::optional<Model> model;
};

Tokenizer::Tables::Tables(const detail::TokenizerFile& file) : special(file.tokens.size()) {
  const std::vector<std::string>& characters = detail::byte_characters();
  std::map<std::string_view, char> bytes;
  for (std::size_t byte = 0; byte < characters.size(); ++byte)
    bytes.emplace(characters[byte], static_cast<char>(byte));
  std::array<std::int32_t, 256> symbols{};
  symbols.fill(-1);
  for (std::size_t id = 0; id < file.tokens.size(); ++id) {
    const auto it = bytes.find(file.tokens[id]);
    if (it != bytes.end())
      symbols[static_cast<unsigned char>(it->second)] = static_cast<std::int32_t>(id);
    tokens.push_back(token_bytes(bytes, file.tokens[id]));
  }
  model.emplace(Model{
      .bpe = detail::Bpe(symbols, file.merges, static_cast<std::int64_t>(file.tokens.size()))});
  model->nfc = file.nfc;
  model->add_prefix_space = file.add_prefix_space;
  model->use_regex = file.use_regex;
  std::vector<Matcher::Entry> raw;
  std::vector<Matcher::Entry> normalized;
  for (const detail::AddedToken& token : file.added) {
    special[static_cast<std::size_t>(token.id)] = token.special;
    added.emplace(token.content, token.id);
    Matcher::Entry entry{token.normalized ? model->normalize(token.content) : token.content,
                         token.id};
    // As in `tokenizers`, it is decoded as what is found in the text.
    tokens[static_cast<std::size_t>(token.id)] = token_bytes(bytes, entry.content);
    (token.normalized ? normalized : raw).push_back(std::move(entry));
  }
  model->raw = Matcher(std::move(raw));
  model->normalized = Matcher(std::move(normalized));
}

void Tokenizer::Tables::Model::encode(std::string_view text, std::vector<std::int32_t>& out) const {
  detail::Bpe::Encoder encoder(bpe);
  const auto on_token = [&](std::int32_t id) { out.push_back(id); };
  const auto on_form = [&](std::string_view rest) { encode_words(rest, encoder, out); };
  raw.split(
      text,
      [&](std::string_view between) { normalized.split(normalize(between), on_form, on_token); },
      on_token);
}

void Tokenizer::Tables::Model::encode_words(std::string_view text, detail::Bpe::Encoder& encoder,
                                            std::vector<std::int32_t>& out) const {
  std::string prefixed;
  if (add_prefix_space && text[0] != ' ') {
    prefixed = detail::concat(' ', text);
    text = prefixed;
  }
  const auto on_word = [&](std::string_view word) {
    const std::size_t missing = encoder.encode(word, out);
    LRNN_CHECK(missing == word.npos, InvalidArgument,
               "Tokenizer: text: expected bytes that the vocabulary has, got ",
               static_cast<int>(static_cast<unsigned char>(word[missing])));
  };
  if (use_regex)
    splitter.split(text, on_word);
  else
    on_word(text);
}

Tokenizer::Tokenizer() {
  static const auto bytes = std::make_shared<const Tables>();
  tables_ = bytes;
}

Tokenizer Tokenizer::from_json(std::string_view text, const std::string& origin) {
  LRNN_CHECK(reads_json(), ConfigError, origin,
             ": expected a build with PCRE2 and utf8proc (-Dtokenizer=enabled), got one that reads "
             "bytes only");
  const detail::TokenizerFile file = detail::read_tokenizer_json(text, origin);
  return with_origin(origin, [&] { return Tokenizer(std::make_shared<const Tables>(file)); });
}

Tokenizer Tokenizer::from_file(const std::filesystem::path& path) {
  return from_json(read_text_file(path, kMaxFileBytes), path.string());
}

Tokenizer Tokenizer::of_model(const std::filesystem::path& directory) {
  const auto path = directory / kFileName;
  std::error_code ignored;
  const bool is_missing =
      std::filesystem::status(path, ignored).type() == std::filesystem::file_type::not_found;
  return is_missing ? Tokenizer() : from_file(path);
}

bool Tokenizer::reads_json() noexcept {
  return detail::has_unicode_text();
}

bool Tokenizer::is_bytes() const noexcept {
  return !tables_->model;
}

std::int64_t Tokenizer::vocab_size() const noexcept {
  return static_cast<std::int64_t>(tables_->tokens.size());
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  if (is_bytes()) {
    const auto bytes = std::as_bytes(std::span(text));
    std::vector<std::int32_t> ids(bytes.size());
    std::ranges::transform(bytes, ids.begin(), std::to_integer<std::int32_t>);
    return ids;
  }
  const std::size_t invalid = detail::find_invalid_utf8(text);
  LRNN_CHECK(invalid == text.npos, InvalidArgument, "Tokenizer: text: expected UTF-8, got byte ",
             static_cast<int>(static_cast<unsigned char>(text[invalid])), " at offset ", invalid);
  std::vector<std::int32_t> ids;
  tables_->model->encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids,
                              const DecodeOptions& options) const {
  TokenStream stream(*this, options);
  std::string text;
  for (const std::int32_t id : ids) text += stream.push(id);
  return text + stream.finish();
}

std::string_view Tokenizer::token(std::int32_t id) const {
  tables_->check(id);
  return tables_->tokens[static_cast<std::size_t>(id)];
}

bool Tokenizer::is_special(std::int32_t id) const {
  tables_->check(id);
  return tables_->special[static_cast<std::size_t>(id)];
}

std::optional<std::int32_t> Tokenizer::added_token(std::string_view content) const {
  const auto it = tables_->added.find(content);
  return it == tables_->added.end() ? std::nullopt : std::optional(it->second);
}

std::string TokenStream::push(std::int32_t id) {
  if (options_.skip_special && tokenizer_.is_special(id)) return {};
  const std::string_view bytes = tokenizer_.token(id);
  if (tokenizer_.is_bytes()) return std::string(bytes);
  held_ += bytes;
  std::string text;
  held_.erase(0, detail::append_repaired_utf8(text, held_, false));
  return text;
}

std::string TokenStream::finish() {
  std::string text;
  detail::append_repaired_utf8(text, std::exchange(held_, {}), true);
  return text;
}

}  // namespace lrnn
