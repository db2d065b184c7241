#include "io/tokenizer_json.hpp"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "lrnn/core/error.hpp"

#include "io/utf8.hpp"

namespace lrnn::detail {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 8;
// Bounds the work per byte of a text.
constexpr std::size_t kMaxAddedTokenBytes = 1024;
const Json kNull;

std::string shown(const Json& value) {
  constexpr std::size_t kMaxShown = 80;
  // Writing out a large value only to cut it would take longer than reading it did.
  if (value.is_structured() && value.size() > kMaxShown)
    return concat("one of ", value.size(), " elements");
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

/// A value with its path, for messages.
struct Field {
  const Json& value;
  std::string path;

  [[noreturn]] void refuse(std::string_view expected) const {
    throw ConfigError(concat(path, ": expected ", expected, ", got ", shown(value)));
  }
  void check(bool condition, std::string_view expected) const {
    if (!condition) refuse(expected);
  }
  /// Null if it is missing.
  [[nodiscard]] Field at(const char* key) const {
    const auto it = value.find(key);
    return {it == value.end() ? kNull : *it, path + "." + key};
  }
  [[nodiscard]] Field at(std::size_t i) const { return {value[i], concat(path, "[", i, "]")}; }
  [[nodiscard]] bool has(const char* key) const { return value.contains(key); }

  /// An object with no other keys.
  void check_keys(std::initializer_list<std::string_view> known) const {
    check(value.is_object(), "an object");
    for (const auto& [key, ignored] : value.items())
      if (std::find(known.begin(), known.end(), key) == known.end()) {
        std::string names;
        for (const std::string_view name : known) names += concat(names.empty() ? "" : ", ", name);
        throw ConfigError(
            concat(path, ": expected no keys but ", names, ", got ", shown(Json(key))));
      }
  }
  [[nodiscard]] bool boolean() const {
    check(value.is_boolean(), "true or false");
    return value.get<bool>();
  }
  [[nodiscard]] bool boolean(bool if_missing) const {
    return value.is_null() ? if_missing : boolean();
  }
  [[nodiscard]] const std::string& string() const {
    check(value.is_string(), "a string");
    return value.get_ref<const std::string&>();
  }
  /// An id in [0, count).
  [[nodiscard]] std::int32_t id(std::size_t count) const {
    const bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() < count;
    check(fits, concat("an id in 0..", static_cast<std::int64_t>(count) - 1));
    return static_cast<std::int32_t>(value.get<std::uint64_t>());
  }
  void check_type(const char* type) const {
    check(value.is_object(), concat("an object of type ", type));
    at("type").check(at("type").value == type, Json(type).dump());
  }
  void check_null(const char* why) const {
    check(value.is_null(), concat("null, as ", why, " is not supported"));
  }
  void check_false(const char* why) const {
    check(value.is_null() || value == false, concat("false, as ", why, " is not supported"));
  }
};

// --- the JSON text -----------------------------------------------------------------------------

Json parse(std::string_view text, const std::string& origin) {
  std::vector<std::set<std::string, std::less<>>> open;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    LRNN_CHECK(depth <= kMaxDepth, ConfigError, origin, ": nested deeper than ", kMaxDepth);
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key)
      LRNN_CHECK(open.back().insert(parsed.get_ref<const std::string&>()).second, ConfigError,
                 origin, ": expected every key of an object once, got ", shown(parsed), " twice");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception& error) {
    throw ConfigError(concat(origin, ": malformed JSON: ", error.what()));
  }
}

// --- vocabulary and added tokens ---------------------------------------------------------------

void check_new(const std::string& token, const Field& field) {
  field.check(token.empty(), "an id that no other token has");
}

void read_vocab(const Field& vocab, std::size_t added, TokenizerFile& file) {
  vocab.check(vocab.value.is_object() && !vocab.value.empty(), "an object with a token per key");
  constexpr std::size_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  vocab.check(vocab.value.size() + added < kMaxTokens, "fewer tokens");
  file.tokens.resize(vocab.value.size());
  for (const auto& [token, id] : vocab.value.items()) {
    const Field field{id, concat(vocab.path, "[", shown(Json(token)), "]")};
    LRNN_CHECK(!token.empty(), ConfigError, vocab.path, ": expected tokens, got an empty one");
    std::string& place = file.tokens[static_cast<std::size_t>(field.id(file.tokens.size()))];
    check_new(place, field);
    place = token;
  }
}

// An added token that the vocabulary has keeps its id there; others follow it in their order, and
// `tokenizers` gives them these ids whatever the file says.
void read_added_token(const Field& field, const Json& vocab, TokenizerFile& file) {
  field.check_keys({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  field.at("single_word").check_false("matching whole words");
  field.at("lstrip").check_false("taking white space along");
  field.at("rstrip").check_false("taking white space along");
  AddedToken token{.id = 0,
                   .content = field.at("content").string(),
                   .normalized = field.at("normalized").boolean(),
                   .special = field.at("special").boolean()};
  field.at("content").check(!token.content.empty() && token.content.size() <= kMaxAddedTokenBytes,
                            concat("1..", kMaxAddedTokenBytes, " bytes"));
  const auto known = vocab.find(token.content);
  const std::int64_t id = known != vocab.end() ? known->get<std::int64_t>()
                                               : static_cast<std::int64_t>(file.tokens.size());
  field.at("id").check(field.at("id").value == id,
                       concat(id, known != vocab.end() ? ", its id in model.vocab"
                                                       : ", the first id behind the others"));
  token.id = static_cast<std::int32_t>(id);
  if (known == vocab.end()) file.tokens.push_back(token.content);
  file.added.push_back(std::move(token));
}

void read_added_tokens(const Field& list, const Json& vocab, TokenizerFile& file) {
  std::set<std::string_view> contents;
  file.added.reserve(list.value.size());  // so that the views stay
  for (std::size_t i = 0; i < list.value.size(); ++i) {
    read_added_token(list.at(i), vocab, file);
    const bool is_new = contents.insert(file.added.back().content).second;
    list.at(i).at("content").check(is_new, "a text that no other added token has");
  }
}

// --- merges ------------------------------------------------------------------------------------

std::array<std::string_view, 2> parts_of(const Field& field) {
  constexpr const char* kExpected = "two tokens, as \"a b\" or [\"a\", \"b\"]";
  if (field.value.is_array()) {
    field.check(field.value.size() == 2, kExpected);
    return {field.at(std::size_t{0}).string(), field.at(std::size_t{1}).string()};
  }
  field.check(field.value.is_string(), kExpected);
  const std::string_view text = field.string();
  const std::size_t space = text.find(' ');
  field.check(space != text.npos && text.find(' ', space + 1) == text.npos, kExpected);
  return {text.substr(0, space), text.substr(space + 1)};
}

std::int32_t id_of(const Field& field, const Json& vocab, std::string_view token,
                   const char* expected) {
  const auto it = vocab.find(token);
  field.check(it != vocab.end(), expected);
  return it->get<std::int32_t>();
}

void check_distinct(const Field& list, const std::vector<BpeMerge>& merges) {
  std::vector<std::size_t> order(merges.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto pair = [&](std::size_t i) { return std::pair(merges[i].left, merges[i].right); };
  std::ranges::sort(order,
                    [&](auto a, auto b) { return std::pair(pair(a), a) < std::pair(pair(b), b); });
  const auto twice = std::ranges::adjacent_find(order, {}, pair);
  if (twice != order.end()) list.at(twice[1]).refuse("a pair that no other merge has");
}

void read_merges(const Field& list, const Json& vocab, TokenizerFile& file) {
  list.check(list.value.is_array(), "a list");
  file.merges.reserve(list.value.size());
  for (std::size_t rank = 0; rank < list.value.size(); ++rank) {
    const Field field = list.at(rank);
    const auto [left, right] = parts_of(field);
    file.merges.push_back(
        {.left = id_of(field, vocab, left, "a first token of model.vocab"),
         .right = id_of(field, vocab, right, "a second token of model.vocab"),
         .product = id_of(field, vocab, concat(left, right), "a product in model.vocab")});
  }
  check_distinct(list, file.merges);
}

// --- components --------------------------------------------------------------------------------

void check_model(const Field& model) {
  model.check_keys({"type", "dropout", "unk_token", "continuing_subword_prefix",
                    "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges", "vocab",
                    "merges"});
  // The first files of GPT-2 have no type.
  if (model.has("type")) model.check_type("BPE");
  model.at("dropout").check_null("dropout");
  for (const char* key : {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"})
    if (model.at(key).value != "") model.at(key).check_null("it");
  model.at("fuse_unk").check_false("an unknown token");
  model.at("byte_fallback").check_false("it");
  model.at("ignore_merges").check_false("it");
}

void check_byte_level(const Field& field) {
  field.check_type("ByteLevel");
  field.check_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  static_cast<void>(field.at("add_prefix_space").boolean(false));
  static_cast<void>(field.at("trim_offsets").boolean(false));
  static_cast<void>(field.at("use_regex").boolean(true));
}

void read_components(const Field& root, TokenizerFile& file) {
  root.at("version").check(root.at("version").value == "1.0", "\"1.0\"");
  root.at("truncation").check_null("truncation");
  root.at("padding").check_null("padding");
  const Field normalizer = root.at("normalizer");
  file.nfc = !normalizer.value.is_null();
  if (file.nfc) {
    normalizer.check_type("NFC");
    normalizer.check_keys({"type"});
  }
  const Field pre_tokenizer = root.at("pre_tokenizer");
  check_byte_level(pre_tokenizer);
  file.add_prefix_space = pre_tokenizer.at("add_prefix_space").boolean();
  file.use_regex = pre_tokenizer.at("use_regex").boolean(true);
  // The offsets of tokens are all that a byte-level post-processor changes.
  if (!root.at("post_processor").value.is_null()) check_byte_level(root.at("post_processor"));
  check_byte_level(root.at("decoder"));
}

}  // namespace

const std::vector<std::string>& byte_characters() {
  static const std::vector<std::string> characters = [] {
    std::vector<std::string> made(256);
    char32_t other = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      append_utf8(made[byte], printable ? byte : other++);
    }
    return made;
  }();
  return characters;
}

TokenizerFile read_tokenizer_json(std::string_view text, const std::string& origin) {
  const Json json = parse(text, origin);
  try {
    const Field root{json, "$"};
    root.check_keys({"version", "truncation", "padding", "added_tokens", "normalizer",
                     "pre_tokenizer", "post_processor", "decoder", "model"});
    TokenizerFile file;
    read_components(root, file);
    const Field model = root.at("model");
    check_model(model);
    const Field vocab = model.at("vocab");
    const Field added = root.at("added_tokens");
    added.check(added.value.is_array() || added.value.is_null(), "a list");
    read_vocab(vocab, added.value.size(), file);
    read_added_tokens(added, vocab.value, file);
    read_merges(model.at("merges"), vocab.value, file);
    return file;
  } catch (const ConfigError& error) {
    throw ConfigError(concat(origin, ": ", error.what()));
  }
}

}  // namespace lrnn::detail
