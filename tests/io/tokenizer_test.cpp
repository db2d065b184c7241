/// Tokenizers of tests/fixtures/tokenizer against what the library `tokenizers` recorded there (see
/// make_fixtures.py), against a merge loop written down plainly, and against damaged files.
#include "lrnn/io/tokenizer.hpp"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lrnn/core/error.hpp"
#include "lrnn/io/file.hpp"
#include "lrnn/train/text_data.hpp"

#include "io/bpe.hpp"
#include "io/unicode_text.hpp"
#include "io/utf8.hpp"

namespace lrnn {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;
using Pointer = Json::json_pointer;
namespace fs = std::filesystem;

const fs::path kFolder = fs::path(LRNN_FIXTURE_DIR) / "tokenizer";

class TokenizerFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!Tokenizer::reads_json()) GTEST_SKIP() << "this build reads bytes only";
  }
};
using TokenizerText = TokenizerFiles;

std::string file_text(const std::string& name) {
  return read_text_file(kFolder / name);
}
Json file_json(const std::string& name) {
  return Json::parse(file_text(name));
}
Tokenizer gpt2_kind() {
  return Tokenizer::from_file(kFolder / "gpt2_kind.json");
}
Tokenizer neox_kind() {
  return Tokenizer::from_file(kFolder / "neox_kind.json");
}

/// The message of the error of type E that `f` throws.
template <class E>
std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

// --- the rules of make_fixtures.py -------------------------------------------------------------

class Generator {
 public:
  explicit Generator(std::uint64_t seed) : state_(seed) {}

  std::size_t draw(std::size_t n) {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return static_cast<std::size_t>((z ^ (z >> 31)) % n);
  }
  std::string piece() {
    static const Json kinds = file_json("pieces.json");
    const Json& kind = kinds[draw(kinds.size())];
    const auto low = kind["count"][0].get<std::size_t>();
    const auto count = low + draw(kind["count"][1].get<std::size_t>() - low + 1);
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
      if (i > 0) text += kind["separator"].get_ref<const std::string&>();
      const Json& item = kind["items"][draw(kind["items"].size())];
      if (item.is_string()) {
        text += item.get_ref<const std::string&>();
        continue;
      }
      const auto first = item[0].get<char32_t>();
      const auto choices = static_cast<std::size_t>(item[1].get<char32_t>() - first + 1);
      detail::append_utf8(text, first + static_cast<char32_t>(draw(choices)));
    }
    return draw(2) == 1 ? text + " " : text;
  }
  std::string text(std::size_t bytes) {
    std::string out;
    while (out.size() < bytes) out += piece();
    return out;
  }
  std::string string() {
    std::string out;
    for (std::size_t n = draw(6); n > 0; --n) out += piece();
    return out;
  }

 private:
  std::uint64_t state_;
};

class Digest {
 public:
  template <class Numbers>
  void add(const Numbers& numbers) {
    mix(numbers.size());
    for (const auto n : numbers) mix(static_cast<std::make_unsigned_t<decltype(n + 0)>>(n));
  }
  [[nodiscard]] std::string hex() const {
    std::array<char, 17> text{};
    std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value_));
    return text.data();
  }

 private:
  void mix(std::uint64_t n) { value_ = (value_ ^ n) * 0x100000001B3U; }
  std::uint64_t value_ = 0xCBF29CE484222325U;
};

// "neox_kind use_regex" is neox_kind.json with that option of the pre-tokenizer the other way
// round.
Tokenizer recorded_tokenizer(const std::string& name) {
  const std::size_t space = name.find(' ');
  Json json = file_json(name.substr(0, space) + ".json");
  if (space != name.npos) {
    Json& option = json["pre_tokenizer"][name.substr(space + 1)];
    option = !option.get<bool>();
  }
  return Tokenizer::from_json(json.dump(), name);
}

void check_strings(const Tokenizer& tokenizer, const Json& expected, Generator& random) {
  constexpr std::size_t kBlock = 1000;
  const auto first = expected["first_strings"].get<std::vector<Ids>>();
  std::size_t bytes = 0;
  std::size_t i = 0;
  for (const Json& block : expected["strings"]) {
    Digest digest;
    for (std::size_t k = 0; k < kBlock; ++k, ++i) {
      const std::string text = random.string();
      const Ids ids = tokenizer.encode(text);
      if (i < first.size()) {
        ASSERT_EQ(ids, first[i]) << i << ": " << text;
      }
      digest.add(ids);
      bytes += text.size();
    }
    EXPECT_EQ(digest.hex(), block.get<std::string>())
        << "one of the " << kBlock << " strings before " << i;
  }
  EXPECT_EQ(bytes, expected["string_bytes"].get<std::size_t>());
}

void check_decoding(const Tokenizer& tokenizer, const Json& expected, Generator& random) {
  Digest whole;
  Digest without_special;
  for (int i = 0; i < 2000; ++i) {
    Ids ids(random.draw(20));
    for (auto& id : ids)
      id = static_cast<std::int32_t>(random.draw(static_cast<std::size_t>(tokenizer.vocab_size())));
    const auto unsigned_bytes = [](const std::string& text) {
      return std::vector<std::uint8_t>(text.begin(), text.end());
    };
    whole.add(unsigned_bytes(tokenizer.decode(ids, {.skip_special = false})));
    without_special.add(unsigned_bytes(tokenizer.decode(ids)));
  }
  EXPECT_EQ(whole.hex(), expected["decoded"].get<std::string>());
  EXPECT_EQ(without_special.hex(), expected["decoded_without_special"].get<std::string>());
}

// 1 MB of text, 20,000 strings and 2,000 decoded sequences per tokenizer.
TEST_F(TokenizerFiles, EqualHuggingFace) {
  const Json all = file_json("expected.json");
  ASSERT_EQ(all.size(), 4U);
  for (const auto& [name, expected] : all.items()) {
    SCOPED_TRACE(name);
    const Tokenizer tokenizer = recorded_tokenizer(name);
    EXPECT_FALSE(tokenizer.is_bytes());
    EXPECT_EQ(tokenizer.vocab_size(), expected["vocab_size"].get<std::int64_t>());
    const std::string text = Generator(2).text(1'000'000);
    ASSERT_EQ(text.size(), expected["text_bytes"].get<std::size_t>());
    const Ids ids = tokenizer.encode(text);
    EXPECT_EQ(ids.size(), expected["text_tokens"].get<std::size_t>());
    Digest digest;
    digest.add(ids);
    EXPECT_EQ(digest.hex(), expected["text"].get<std::string>());
    Generator random(3);
    check_strings(tokenizer, expected, random);
    check_decoding(tokenizer, expected, random);
  }
}

// --- text --------------------------------------------------------------------------------------

TEST(Tokenizer, BytesAreTokens) {
  const Tokenizer bytes;
  EXPECT_TRUE(bytes.is_bytes());
  EXPECT_EQ(bytes.vocab_size(), 256);
  std::string all(256, '\0');
  std::iota(all.begin(), all.end(), '\0');
  Ids ids(256);
  std::iota(ids.begin(), ids.end(), 0);
  EXPECT_EQ(bytes.encode(all), ids);
  EXPECT_EQ(bytes.decode(ids), all);
  EXPECT_EQ(bytes.encode(""), Ids());
  EXPECT_EQ(bytes.added_token("a"), std::nullopt);
  EXPECT_THROW(static_cast<void>(bytes.token(256)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(bytes.decode(Ids{-1})), InvalidArgument);
  TokenStream stream(bytes);
  EXPECT_EQ(stream.push(0xC3), "\xC3");  // nothing is held back or replaced
  EXPECT_EQ(stream.finish(), "");
}

TEST(Tokenizer, BuildWithoutUnicodeSaysSo) {
  if (Tokenizer::reads_json()) GTEST_SKIP() << "this build reads tokenizer.json";
  EXPECT_THAT(message_of<ConfigError>([] { Tokenizer::from_json("{}"); }),
              ::testing::HasSubstr("expected a build with PCRE2 and utf8proc"));
}

TEST_F(TokenizerFiles, OfAModelsFolder) {
  const fs::path folder =
      fs::temp_directory_path() / ("lrnn_tokenizer_test_" + std::to_string(::getpid()));
  fs::remove_all(folder);
  fs::create_directories(folder);
  EXPECT_TRUE(Tokenizer::of_model(folder).is_bytes());
  fs::copy_file(kFolder / "gpt2_kind.json", folder / "tokenizer.json");
  EXPECT_EQ(Tokenizer::of_model(folder).vocab_size(), gpt2_kind().vocab_size());
  EXPECT_THROW(Tokenizer::from_file(folder / "missing.json"), IoError);
  fs::remove_all(folder);
}

TEST_F(TokenizerFiles, TokensOfTheTableAndOfTheText) {
  const Tokenizer tokenizer = gpt2_kind();
  const auto end = tokenizer.added_token("<|endoftext|>");
  ASSERT_TRUE(end);
  EXPECT_TRUE(tokenizer.is_special(*end));
  EXPECT_EQ(tokenizer.token(*end), "<|endoftext|>");
  const Ids ids = tokenizer.encode("a<|endoftext|>a");
  ASSERT_EQ(ids.size(), 3U);
  EXPECT_EQ(ids[0], ids[2]);
  EXPECT_EQ(ids[1], *end);
  EXPECT_FALSE(tokenizer.is_special(ids[0]));
  EXPECT_EQ(tokenizer.decode(ids), "aa");
  EXPECT_EQ(tokenizer.decode(ids, {.skip_special = false}), "a<|endoftext|>a");
  EXPECT_EQ(tokenizer.encode(""), Ids());
}

// Table 3-8 of the Unicode standard: one U+FFFD for each maximal part.
TEST_F(TokenizerFiles, DecodingReplacesBadSequences) {
  const Tokenizer tokenizer = gpt2_kind();
  const auto decoded = [&](std::string_view bytes) {
    Ids ids;
    for (const char c : bytes)
      for (std::int32_t id = 0; id < tokenizer.vocab_size(); ++id)
        if (tokenizer.token(id) == std::string_view(&c, 1)) ids.push_back(id);
    EXPECT_EQ(ids.size(), bytes.size());
    return tokenizer.decode(ids);
  };
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(decoded("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(decoded("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(decoded("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(decoded("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(decoded("\xF0\x9F\x98"), r);
  EXPECT_EQ(decoded("\xF0\x9F\x98\x80"), "\xF0\x9F\x98\x80");
}

TEST_F(TokenizerFiles, StreamGivesWholeCharacters) {
  const Tokenizer tokenizer = neox_kind();
  Generator random(5);
  for (int round = 0; round < 200; ++round) {
    Ids ids = tokenizer.encode(random.string());
    if (round % 2 == 1)
      for (auto& id : ids) id = static_cast<std::int32_t>(random.draw(1500));
    TokenStream stream(tokenizer);
    std::string joined;
    for (const std::int32_t id : ids) {
      const std::string text = stream.push(id);
      EXPECT_EQ(detail::find_invalid_utf8(text), text.npos);
      joined += text;
    }
    EXPECT_EQ(joined + stream.finish(), tokenizer.decode(ids));
  }
}

TEST_F(TokenizerFiles, EncodingRefusesWhatIsNotUtf8) {
  const Tokenizer tokenizer = gpt2_kind();
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xC3", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xEF\xBF",
        "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    const std::string text = "0123456789\xC3\xA9" + std::string(bad) + "a";
    EXPECT_THAT(message_of<InvalidArgument>([&] { static_cast<void>(tokenizer.encode(text)); }),
                ::testing::EndsWith("at offset 12"));
  }
  for (const char* good : {"\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF",
                           "\xEE\x80\x80", "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"})
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(good)), good);
  const std::string zero(3, '\0');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(zero)), zero);
}

TEST(Utf8, EveryCodePoint) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c == 0xD800) c = 0xE000;
    std::string text;
    detail::append_utf8(text, c);
    ASSERT_EQ(text.size(), c < 0x80 ? 1U : c < 0x800 ? 2U : c < 0x10000 ? 3U : 4U);
    ASSERT_EQ(detail::find_invalid_utf8(text), text.npos) << static_cast<std::uint32_t>(c);
    ASSERT_EQ(detail::utf8_code_point(text), c);
    for (std::size_t n = 1; n < text.size(); ++n) {
      const auto part = detail::utf8_part(std::string_view(text).substr(0, n));
      ASSERT_EQ(part.kind, detail::Utf8Kind::Partial);
      ASSERT_EQ(part.length, n);
    }
  }
}

// Examples of Unicode standard annex 15 and of the chapter on Hangul.
TEST_F(TokenizerText, NormalisationFormC) {
  const auto nfc = [](std::u8string_view text) {
    return detail::nfc({reinterpret_cast<const char*>(text.data()), text.size()});
  };
  const auto utf8 = [](std::u8string_view text) { return std::string(text.begin(), text.end()); };
  EXPECT_EQ(nfc(u8""), "");
  EXPECT_EQ(nfc(u8"plain \u00E9"), utf8(u8"plain \u00E9"));
  EXPECT_EQ(nfc(u8"e\u0301"), utf8(u8"\u00E9"));
  EXPECT_EQ(nfc(u8"\u212B\u2126"), utf8(u8"\u00C5\u03A9"));
  EXPECT_EQ(nfc(u8"\u1E0B\u0323"), utf8(u8"\u1E0D\u0307"));
  EXPECT_EQ(nfc(u8"q\u0307\u0323"), utf8(u8"q\u0323\u0307"));
  EXPECT_EQ(nfc(u8"\uFB01\u2460"), utf8(u8"\uFB01\u2460"));  // compatibility is left alone
  EXPECT_EQ(nfc(u8"\u1100\u1161\u11A8"), utf8(u8"\uAC01"));
  EXPECT_EQ(nfc(u8"\u0958"), utf8(u8"\u0915\u093C"));  // is excluded from composition
  EXPECT_EQ(nfc(u8"\u0301e"), utf8(u8"\u0301e"));
}

// Marks by the hundred thousand, which a bubble sort would not see the end of, and lengths around
// those at which the text is cut.
TEST_F(TokenizerText, NormalisationOfLongText) {
  const std::string above = "\xCC\x80";  // U+0300, class 230
  const std::string below = "\xCC\xA3";  // U+0323, class 220
  constexpr std::size_t kMarks = 200'000;
  std::string text = "q";
  std::string sorted = "q";
  for (std::size_t i = 0; i < kMarks; ++i) text += above + below;
  for (std::size_t i = 0; i < kMarks; ++i) sorted += below;
  for (std::size_t i = 0; i < kMarks; ++i) sorted += above;
  EXPECT_EQ(detail::nfc(text), sorted);
  for (std::size_t n = 4090; n < 4100; ++n) {
    const std::string before(n, 'x');
    EXPECT_EQ(detail::nfc(before + "e\xCC\x81" + before), before + "\xC3\xA9" + before);
  }
}

TEST_F(TokenizerText, Words) {
  const auto words = [](std::string_view text) {
    std::vector<std::string> found;
    detail::WordSplitter().split(text, [&](std::string_view w) { found.emplace_back(w); });
    return found;
  };
  using Words = std::vector<std::string>;
  EXPECT_EQ(words(""), Words());
  EXPECT_EQ(words("I'll  say: don't!!"), (Words{"I", "'ll", " ", " say", ":", " don", "'t", "!!"}));
  EXPECT_EQ(words("a  \n b3 "), (Words{"a", "  \n", " b", "3", " "}));
  EXPECT_EQ(words("'S'LL"), (Words{"'", "S", "'", "LL"}));
  EXPECT_EQ(words("x\xC2\xA0y"), (Words{"x", "\xC2\xA0", "y"}));
  EXPECT_EQ(words("\xE1\xA0\x8E!"), (Words{"\xE1\xA0\x8E!"}));  // U+180E is no white space
  const std::string spaces(3'000'000, ' ');
  EXPECT_EQ(words(spaces + "a"), (Words{spaces.substr(1), " a"}));
}

// --- merges ------------------------------------------------------------------------------------

// The definition: do the first merge that applies anywhere, at its leftmost place; begin again.
Ids merged_plainly(Ids tokens, const std::vector<detail::BpeMerge>& merges) {
  for (bool again = true; again;) {
    again = false;
    for (const detail::BpeMerge& m : merges) {
      const auto it = std::adjacent_find(tokens.begin(), tokens.end(), [&](auto a, auto b) {
        return a == m.left && b == m.right;
      });
      if (it == tokens.end()) continue;
      *it = m.product;
      tokens.erase(it + 1);
      again = true;
      break;
    }
  }
  return tokens;
}

// Tokens 0..2 are the bytes a..c; the merges join random earlier tokens, in random order, so that
// products may be done before their parts.
TEST(Bpe, MergesAsDefined) {
  std::array<std::int32_t, 256> symbols{};
  symbols.fill(-1);
  for (std::int32_t i = 0; i < 3; ++i) symbols[static_cast<std::size_t>('a' + i)] = i;
  Generator random(7);
  std::size_t merged = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<detail::BpeMerge> merges;
    std::int32_t tokens = 3;
    std::set<std::pair<std::int32_t, std::int32_t>> pairs;
    while (tokens < 20) {
      const auto left = static_cast<std::int32_t>(random.draw(static_cast<std::size_t>(tokens)));
      const auto right = static_cast<std::int32_t>(random.draw(static_cast<std::size_t>(tokens)));
      if (pairs.emplace(left, right).second) merges.push_back({left, right, tokens++});
    }
    for (std::size_t i = merges.size(); i > 1; --i)
      std::swap(merges[i - 1], merges[random.draw(i)]);
    const detail::Bpe bpe(symbols, merges, tokens);
    for (std::size_t length = 0; length < 40; ++length) {
      std::string word;
      Ids ids;
      for (std::size_t i = 0; i < length; ++i) {
        ids.push_back(static_cast<std::int32_t>(random.draw(3)));
        word += static_cast<char>('a' + ids.back());
      }
      Ids found;
      ASSERT_EQ(detail::Bpe::Encoder(bpe).encode(word, found), word.npos);
      ASSERT_EQ(found, merged_plainly(ids, merges)) << word;
      merged += length - found.size();
    }
  }
  EXPECT_GT(merged, 20'000U);
}

TEST(Bpe, NamesTheByteWithoutAToken) {
  std::array<std::int32_t, 256> symbols{};
  symbols.fill(-1);
  symbols['a'] = 0;
  const detail::Bpe bpe(symbols, {}, 1);
  Ids ids{5};
  EXPECT_EQ(detail::Bpe::Encoder(bpe).encode("aab", ids), 2U);
  EXPECT_EQ(ids, Ids{5});
}

// Doubling merges on 2^20 bytes; quadratic time would be hours.
TEST(Bpe, LongWords) {
  std::array<std::int32_t, 256> symbols{};
  symbols.fill(-1);
  symbols['a'] = 0;
  std::vector<detail::BpeMerge> merges;
  for (std::int32_t i = 0; i < 10; ++i) merges.push_back({i, i, i + 1});
  const detail::Bpe bpe(symbols, merges, 11);
  Ids ids;
  ASSERT_EQ(detail::Bpe::Encoder(bpe).encode(std::string((1U << 20U) + 3, 'a'), ids),
            std::string::npos);
  Ids expected(1U << 10U, 10);
  expected.insert(expected.end(), {1, 0});
  EXPECT_EQ(ids, expected);
}

TEST_F(TokenizerFiles, AByteWithoutATokenIsAnError) {
  // 0xF5 is in no UTF-8, and neox_kind.json has no symbol for it; that of 'Q' is taken away here.
  Json json = file_json("gpt2_kind.json");
  Json& vocab = json["model"]["vocab"];
  vocab["a name that nothing has"] = vocab["Q"];
  vocab.erase("Q");
  const Tokenizer tokenizer = Tokenizer::from_json(json.dump());
  EXPECT_THAT(message_of<InvalidArgument>([&] { static_cast<void>(tokenizer.encode("aQ")); }),
              ::testing::HasSubstr("81"));
}

// --- files -------------------------------------------------------------------------------------

TEST_F(TokenizerFiles, OlderSpellingsAreTheSame) {
  Json json = file_json("neox_kind.json");
  const Ids expected = neox_kind().encode("And  God said");
  Json& merges = json["model"]["merges"];
  for (Json& pair : merges) pair = pair[0].get<std::string>() + " " + pair[1].get<std::string>();
  for (const char* key : {"type", "byte_fallback", "ignore_merges", "fuse_unk", "unk_token"})
    json["model"].erase(key);
  for (const char* key : {"truncation", "padding", "post_processor"}) json.erase(key);
  json["pre_tokenizer"].erase("use_regex");
  json["pre_tokenizer"].erase("trim_offsets");
  EXPECT_EQ(Tokenizer::from_json(json.dump()).encode("And  God said"), expected);
}

struct Refusal {
  const char* pointer;
  const char* value;  // JSON; null: the key is removed
  const char* message;
};

void expect_refusals(const char* file, std::initializer_list<Refusal> refusals) {
  for (const Refusal& r : refusals) {
    SCOPED_TRACE(std::string(r.pointer) + " = " + (r.value != nullptr ? r.value : "(removed)"));
    Json json = file_json(file);
    const Pointer pointer(r.pointer);
    if (r.value != nullptr)
      json[pointer] = Json::parse(r.value);
    else
      json[pointer.parent_pointer()].erase(pointer.back());
    const std::string text = json.dump();
    const std::string message =
        message_of<ConfigError>([&] { Tokenizer::from_json(text, "origin"); });
    EXPECT_THAT(message, ::testing::StartsWith("origin: "));
    EXPECT_THAT(message, ::testing::HasSubstr(r.message));
  }
}

TEST_F(TokenizerFiles, UnknownComponentsAreRefused) {
  expect_refusals(
      "neox_kind.json",
      {{"/version", R"("2.0")", R"($.version: expected "1.0", got "2.0")"},
       {"/version", nullptr, "$.version: expected"},
       {"/novelty", "null", R"($: expected no keys but version, )"},
       {"/truncation", R"({"max_length": 4})", "$.truncation: expected null"},
       {"/padding", R"({"strategy": "BatchLongest"})", "$.padding: expected null"},
       {"/normalizer", R"({"type": "NFKC"})", R"($.normalizer.type: expected "NFC", got "NFKC")"},
       {"/normalizer", R"({"type": "NFC", "form": 1})", "$.normalizer: expected no keys but type"},
       {"/normalizer", R"("NFC")", "$.normalizer: expected an object of type NFC"},
       {"/pre_tokenizer", "null", "$.pre_tokenizer: expected an object of type ByteLevel"},
       {"/pre_tokenizer/type", R"("Whitespace")", "$.pre_tokenizer.type: expected"},
       {"/pre_tokenizer", R"({"type": "Sequence", "pretokenizers": []})", "$.pre_tokenizer.type"},
       {"/pre_tokenizer/add_prefix_space", nullptr, "$.pre_tokenizer.add_prefix_space: expected"},
       {"/pre_tokenizer/use_regex", "1", "$.pre_tokenizer.use_regex: expected true or false"},
       {"/pre_tokenizer/pattern", R"("\\s")", "$.pre_tokenizer: expected no keys but"},
       {"/post_processor", R"({"type": "TemplateProcessing"})", "$.post_processor.type: expected"},
       {"/post_processor/extra", "0", "$.post_processor: expected no keys but"},
       {"/decoder", "null", "$.decoder: expected an object of type ByteLevel"},
       {"/decoder/type", R"("WordPiece")", "$.decoder.type: expected"}});
}

TEST_F(TokenizerFiles, UnknownModelsAreRefused) {
  expect_refusals(
      "neox_kind.json",
      {{"/model", nullptr, "$.model: expected an object"},
       {"/model/type", R"("Unigram")", R"($.model.type: expected "BPE", got "Unigram")"},
       {"/model/dropout", "0.1", "$.model.dropout: expected null"},
       {"/model/unk_token", R"("<unk>")", "$.model.unk_token: expected null"},
       {"/model/continuing_subword_prefix", R"("##")", "$.model.continuing_subword_prefix"},
       {"/model/end_of_word_suffix", R"("</w>")", "$.model.end_of_word_suffix"},
       {"/model/fuse_unk", "true", "$.model.fuse_unk: expected false"},
       {"/model/byte_fallback", "true", "$.model.byte_fallback: expected false"},
       {"/model/ignore_merges", "true", "$.model.ignore_merges: expected false"},
       {"/model/cache_capacity", "1", "$.model: expected no keys but"}});
}

TEST_F(TokenizerFiles, DamagedVocabulariesAreRefused) {
  expect_refusals(
      "neox_kind.json",
      {{"/model/vocab", "{}", "$.model.vocab: expected an object with a token per key"},
       {"/model/vocab", "[]", "$.model.vocab: expected an object"},
       {"/model/vocab", nullptr, "$.model.vocab: expected an object"},
       {"/model/vocab/the", "-1", R"($.model.vocab["the"]: expected an id in 0..1499, got -1)"},
       {"/model/vocab/the", "1500", "expected an id in 0..1499, got 1500"},
       {"/model/vocab/the", "18446744073709551615", "expected an id in 0..1499"},
       {"/model/vocab/the", "1e300", "expected an id in 0..1499"},
       {"/model/vocab/the", "1.0", "expected an id in 0..1499"},
       {"/model/vocab/the", R"("7")", "expected an id in 0..1499"},
       {"/model/vocab/the", "7", "expected an id that no other token has"},
       {"/model/vocab/the", nullptr, "expected an id in 0..1498"},
       {"/model/vocab/", "1500", "$.model.vocab: expected tokens, got an empty one"}});
}

TEST_F(TokenizerFiles, DamagedMergesAreRefused) {
  expect_refusals(
      "neox_kind.json",
      {{"/model/merges", nullptr, "$.model.merges: expected a list"},
       {"/model/merges", "{}", "$.model.merges: expected a list"},
       {"/model/merges/3", R"("t")", "$.model.merges[3]: expected two tokens"},
       {"/model/merges/3", R"("t h e")", "$.model.merges[3]: expected two tokens"},
       {"/model/merges/3", R"(["t", "h", "e"])", "$.model.merges[3]: expected two tokens"},
       {"/model/merges/3", R"(["t", 1])", "$.model.merges[3][1]: expected a string"},
       {"/model/merges/3", "7", "$.model.merges[3]: expected two tokens"},
       {"/model/merges/3", R"(" h")", "$.model.merges[3]: expected a first token of model.vocab"},
       {"/model/merges/3", R"("t qqq")", "$.model.merges[3]: expected a second token"},
       {"/model/merges/3", R"("q q")", "$.model.merges[3]: expected a product in model.vocab"},
       {"/model/merges/3", R"("t h")",
        "$.model.merges[3]: expected a pair that no other merge has"}});
}

TEST_F(TokenizerFiles, DamagedAddedTokensAreRefused) {
  const std::string long_text = '"' + std::string(1025, 'a') + '"';
  expect_refusals(
      "neox_kind.json",
      {{"/added_tokens", "7", "$.added_tokens: expected a list"},
       {"/added_tokens/0", "7", "$.added_tokens[0]: expected an object"},
       {"/added_tokens/0/extra", "7", "$.added_tokens[0]: expected no keys but"},
       {"/added_tokens/0/id", "5",
        "$.added_tokens[0].id: expected 0, its id in model.vocab, got 5"},
       {"/added_tokens/2/id", "1501", "$.added_tokens[2].id: expected 1500, the first id behind"},
       {"/added_tokens/2/id", "-1", "$.added_tokens[2].id: expected 1500"},
       {"/added_tokens/2/id", nullptr, "$.added_tokens[2].id: expected 1500"},
       {"/added_tokens/2/content", R"("")", "$.added_tokens[2].content: expected 1..1024 bytes"},
       {"/added_tokens/2/content", long_text.c_str(), "expected 1..1024 bytes"},
       {"/added_tokens/2/content", "7", "$.added_tokens[2].content: expected a string"},
       {"/added_tokens/1/content", R"("<|endoftext|>")", "$.added_tokens[1].id: expected 0"},
       {"/added_tokens/2/single_word", "true", "$.added_tokens[2].single_word: expected false"},
       {"/added_tokens/2/lstrip", "true", "$.added_tokens[2].lstrip: expected false"},
       {"/added_tokens/2/rstrip", "true", "$.added_tokens[2].rstrip: expected false"},
       {"/added_tokens/2/normalized", "null", "$.added_tokens[2].normalized: expected true or"},
       {"/added_tokens/2/special", nullptr, "$.added_tokens[2].special: expected true or"},
       {"/added_tokens/26",
        R"({"id": 1524, "content": "\u00e9tude", "normalized": true, "special": false})",
        "expected texts that differ in normalisation form C, got ids 15"},
       {"/added_tokens/26",
        R"({"id": 1524, "content": "  ", "normalized": true, "special": false})", "expected"}});
}

TEST_F(TokenizerFiles, MalformedTextIsRefused) {
  const auto message = [](const std::string& text) {
    return message_of<ConfigError>([&] { Tokenizer::from_json(text, "origin"); });
  };
  EXPECT_THAT(message(""), ::testing::StartsWith("origin: malformed JSON: "));
  EXPECT_THAT(message("[]"), ::testing::StartsWith("origin: $: expected an object, got []"));
  EXPECT_THAT(message("null"), ::testing::HasSubstr("expected an object"));
  EXPECT_THAT(message(R"({"model": {"vocab": {"a": 0, "a": 1}}})"),
              ::testing::HasSubstr(R"(expected every key of an object once, got "a" twice)"));
  EXPECT_THAT(message(R"({"version": "\ud800"})"), ::testing::HasSubstr("malformed JSON"));
  EXPECT_THAT(message("{\"version\": \"\xFF\"}"), ::testing::HasSubstr("malformed JSON"));
  EXPECT_THAT(message(std::string(1'000'000, '[')), ::testing::HasSubstr("nested deeper than 8"));
}

// A small file with everything in it: all of its beginnings, and its bytes changed at random.
TEST_F(TokenizerFiles, DamagedTextNeverCrashes) {
  const std::string text =
      R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":4,)"
      R"("content":"<e>",)"
      R"("single_word":false,"lstrip":false,"rstrip":false,"normalized":true,"special":true}],)"
      R"("normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,)"
      R"("trim_offsets":true,"use_regex":true},"post_processor":null,)"
      R"("decoder":{"type":"ByteLevel",)"
      R"("add_prefix_space":true,"trim_offsets":true},"model":{"type":"BPE","dropout":null,)"
      R"("vocab":{"a":0,"b":1,"ab":2,"aba":3},"merges":["a b",["ab","a"]]}})";
  EXPECT_EQ(Tokenizer::from_json(text).encode("aba<e>ba"), (Ids{3, 4, 1, 0}));
  for (std::size_t n = 0; n < text.size(); ++n)
    EXPECT_THROW(Tokenizer::from_json(text.substr(0, n)), ConfigError) << n;
  Generator random(11);
  std::size_t accepted = 0;
  constexpr std::size_t kRounds = 20'000;
  for (std::size_t i = 0; i < kRounds; ++i) {
    std::string damaged = text;
    for (std::size_t k = 1 + random.draw(3); k > 0; --k)
      damaged[random.draw(damaged.size())] = random.draw(2) == 1
                                                 ? static_cast<char>(random.draw(256))
                                                 : text[random.draw(text.size())];
    try {
      const Tokenizer tokenizer = Tokenizer::from_json(damaged);
      ++accepted;
      const Ids ids = tokenizer.encode("abab<e>ba ");
      EXPECT_LE(ids.size(), 10U);
      static_cast<void>(tokenizer.decode(ids));
    } catch (const InvalidArgument&) {  // ConfigError is one
    }
  }
  EXPECT_LT(accepted, kRounds / 2);
}

// --- training data -----------------------------------------------------------------------------

TEST_F(TokenizerFiles, TextDataCountsBytesPerToken) {
  const fs::path path = fs::temp_directory_path() /
                        ("lrnn_tokenizer_test_" + std::to_string(::getpid()) + ".txt");
  // The cut, 8 bytes before the end of 20, falls into the second byte of an e with acute.
  write_text_file(path, "in the hous\xC3\xA9 of God");
  const Tokenizer tokenizer = gpt2_kind();
  const TextData data = TextData::from_files({path}, tokenizer, 0.4);
  const auto train = static_cast<std::int64_t>(tokenizer.encode("in the hous").size());
  const auto rest = static_cast<std::int64_t>(tokenizer.encode("\xC3\xA9 of God").size());
  EXPECT_EQ(data.train_size(), train);
  EXPECT_EQ(data.held_out_size(), rest);
  EXPECT_DOUBLE_EQ(data.bytes_per_token(), 11.0 / static_cast<double>(train));
  EXPECT_DOUBLE_EQ(data.held_out_bytes_per_token(), 9.0 / static_cast<double>(rest));
  EXPECT_EQ(TextData::from_files({path}, Tokenizer(), 0.4).train_size(), 12);
  write_text_file(path, "abc\xFFz");
  EXPECT_THAT(message_of<InvalidArgument>([&] { TextData::from_files({path}, tokenizer, 0.0); }),
              ::testing::HasSubstr("at offset 3"));
  fs::remove(path);
}

}  // namespace
}  // namespace lrnn
