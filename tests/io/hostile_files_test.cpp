// Files of every kind, cut short, damaged and made to hurt: a typed error that names file and
// reason, or a load, and nothing else.

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"
#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "io/checkpoint.hpp"
#include "io/golden.hpp"
#include "io/manifest.hpp"

namespace lrnn {
namespace {

using enum MixerType;
namespace fs = std::filesystem;

std::vector<std::byte> bytes_of(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

std::string with_flips(std::string text, Rng& rng) {
  for (std::uint64_t k = 0; k <= rng.below(3); ++k)
    text[static_cast<std::size_t>(rng.below(text.size()))] ^= static_cast<char>(1U << rng.below(8));
  return text;
}

// A folder that the library wrote and the reading of each of its texts from memory.
class HostileFiles : public ::testing::Test {
 protected:
  struct Reader {
    const char* file;  // every error names it
    std::string text;
    std::function<void(const std::string&)> read;
  };

  void SetUp() override {
    fs::create_directories(folder_);
    model_.save_pretrained(ctx_, folder_, {.lrnnx_names = true});
  }
  void TearDown() override { fs::remove_all(folder_); }

  static LRNNLMHeadConfig config() {
    LRNNLMHeadConfig c{.d_model = 4,
                       .d_state = 4,
                       .n_layer = 3,
                       .vocab_size = 5,
                       .mixer_types = {S4, Mamba, Attn},
                       .pad_vocab_size_multiple = 1};
    c.mixer_kwargs.attn.num_heads = 2;
    return c;
  }
  [[nodiscard]] std::string written(const char* name) const {
    return read_text_file(folder_ / name);
  }
  [[nodiscard]] std::string index() const {
    std::string text;
    for (const Parameter& p : model_.parameters())
      text += detail::concat(text.empty() ? "" : ",", '"', p.name, "\":\"model.safetensors\"");
    return "{\"metadata\":{\"total_size\":1},\"weight_map\":{" + text + "}}";
  }
  [[nodiscard]] std::string cache() {
    const auto cache = model_.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 3});
    cache.save(ctx_, folder_ / "cache");
    return written("cache");
  }
  [[nodiscard]] static std::string manifest() {
    return detail::manifest_to_json(
        {.step = 3, .settings = {{"seed", "1"}}, .files = {{"model.safetensors", 8, 1}}});
  }
  std::vector<Reader> readers();

  /// What was thrown, "" if nothing was. Errors of other types, which no reader may throw, pass on.
  static std::string error_of(const std::function<void()>& read) {
    try {
      read();
      return "";
    } catch (const IoError& e) {
      return e.what();
    } catch (const ConfigError& e) {
      return e.what();
    }
  }
  static void expect_refused(const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << part << "\n  in '" << message << "'";
  }
  [[nodiscard]] std::string folder_error() {
    return error_of([&] { (void)LRNNLMHeadModel::from_pretrained(ctx_, folder_); });
  }

  Context ctx_ = Context::cpu();
  fs::path folder_ = fs::temp_directory_path() / ("lrnn_hostile_" + std::to_string(::getpid()));
  LRNNLMHeadModel model_{ctx_, config(), {.seed = 4}};
  InferenceCache target_ =
      model_.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 3});
};

std::vector<HostileFiles::Reader> HostileFiles::readers() {
  return {
      {"config", written("config.json"), [](const std::string& s) { (void)config_from_json(s); }},
      {"weights", written("model.safetensors"),
       [this](const std::string& s) {
         (void)LRNNLMHeadModel::from_safetensors(ctx_, config(),
                                                 SafetensorsFile::parse("weights", bytes_of(s)));
       }},
      {"index", index(), [](const std::string& s) { (void)detail::names_of_index("index", s); }},
      {"cache", cache(),
       [this](const std::string& s) {
         target_.load(ctx_, SafetensorsFile::parse("cache", bytes_of(s)));
       }},
      {"manifest", manifest(),
       [](const std::string& s) { (void)detail::manifest_from_json("manifest", s); }}};
}

TEST_F(HostileFiles, EveryPrefixIsATypedError) {
  for (const Reader& reader : readers()) {
    EXPECT_EQ(error_of([&] { reader.read(reader.text); }), "") << reader.file;
    // A text may do without the line end that it is written with.
    const std::size_t size = reader.text.size() - (reader.text.back() == '\n' ? 1 : 0);
    for (std::size_t n = 0; n < size; ++n) {
      const std::string message = error_of([&] { reader.read(reader.text.substr(0, n)); });
      ASSERT_TRUE(message.starts_with(std::string(reader.file) + ": ") &&
                  message.size() > std::strlen(reader.file) + 10)
          << reader.file << " of " << n << " bytes: '" << message << "'";
    }
  }
}

TEST_F(HostileFiles, BitFlipsEndInATypedErrorOrALoad) {
  constexpr int kFlips = 20'000;  // each: 100,000 in all
  for (const Reader& reader : readers()) {
    Rng rng(9);
    int refused = 0;
    for (int i = 0; i < kFlips; ++i) {
      const std::string damaged = with_flips(reader.text, rng);
      const std::string message = error_of([&] { reader.read(damaged); });
      ASSERT_TRUE(message.empty() || message.size() > 10) << message;
      refused += message.empty() ? 0 : 1;
    }
    // A checksum finds all damage; without one, that to the values goes unseen.
    EXPECT_GT(refused, std::string(reader.file) == "manifest" ? kFlips * 99 / 100 : kFlips / 20)
        << reader.file;
  }
}

// The same through the folder, where every error names the file that was damaged.
TEST_F(HostileFiles, DamagedFoldersNameTheFile) {
  Rng rng(10);
  for (const char* name : {"config.json", "model.safetensors"}) {
    const std::string whole = written(name);
    int refused = 0;
    const auto check = [&](const std::string& damaged) {
      write_text_file(folder_ / name, damaged);
      const std::string message = folder_error();
      if (message.empty()) return;
      ++refused;
      // A configuration that can be read and names other tensors is found by the weights.
      ASSERT_NE(message.find(folder_.string()), std::string::npos) << message;
    };
    for (std::size_t n = 0; n < whole.size() - 1; n += 37) check(whole.substr(0, n));
    EXPECT_EQ(refused, static_cast<int>((whole.size() - 2) / 37 + 1)) << name;
    for (int i = 0; i < 200; ++i) check(with_flips(whole, rng));
    write_text_file(folder_ / name, whole);
    EXPECT_EQ(folder_error(), "");
  }
}

// Copies, prints and destructors of nested values recurse: 100,000 levels would exhaust the stack.
TEST_F(HostileFiles, DeepNestingIsRefused) {
  const std::string deep(100'000, '[');
  const std::string closed = deep + std::string(deep.size(), ']');
  const std::vector<std::string> texts = {
      deep, closed, R"({"checkpoint":)" + closed + R"(,"crc32":1})",
      R"({"weight_map":{"a":)" + closed + "}}", R"({"constructor":)" + closed + "}"};
  for (const std::string& text : texts) {
    expect_refused(error_of([&] { (void)config_from_json(text); }), {"config", "nested deeper"});
    expect_refused(error_of([&] { (void)detail::names_of_index("index", text); }),
                   {"index", "nested deeper"});
    expect_refused(error_of([&] { (void)detail::manifest_from_json("manifest", text); }),
                   {"manifest", "nested deeper"});
    write_text_file(folder_ / "config.json", text);
    expect_refused(error_of([&] { (void)detail::read_golden_case(folder_); }),
                   {"config.json", "nested deeper"});
  }
}

// Keys that keep their order are looked up one by one: a million of them would take hours.
TEST_F(HostileFiles, ObjectsOfManyKeysAreRefused) {
  std::string text = "{";
  for (int i = 0; i < 1'000'000; ++i) text += detail::concat('"', i, "\":0,");
  text.back() = '}';
  expect_refused(error_of([&] { (void)config_from_json(text); }), {"config", "keys in an object"});
  std::string list = "[0";
  for (int i = 0; i < 2'000'000; ++i) list += ",0";
  expect_refused(error_of([&] { (void)config_from_json(R"({"d_model":)" + list + "]}"); }),
                 {"config", "values"});
}

// 150 bytes of another library's configuration stand for as many layers as they say.
TEST_F(HostileFiles, FewBytesCannotAskForManyLayers) {
  const auto text = [](const char* n_layer) {
    return std::string(R"({"model_type":"mamba","hidden_size":4,"state_size":2,"vocab_size":5,)") +
           R"("num_hidden_layers":)" + n_layer + "}";
  };
  expect_refused(error_of([&] { (void)config_from_json(text("65537")); }),
                 {"num_hidden_layers", "at most 65536", "got 65537"});
  write_text_file(folder_ / "config.json", text("65536"));
  expect_refused(folder_error(), {"config.json", "n_layer", "tensors of the checkpoint", "65536"});
  LRNNLMHeadConfig c = config();
  c.n_layer = 65'537;
  EXPECT_NE(error_of([&] { c.validate(); }).find("n_layer: expected 0..65536"), std::string::npos);
}

// Sums and products of options are shapes: none may leave 64 bits, and no number its integer.
TEST_F(HostileFiles, OptionsCannotOverflowShapes) {
  const auto error = [&](const char* mixer, const std::string& option, const char* value) {
    return error_of([&] {
      (void)config_from_json(R"({"lrnn_format_version":1,"d_model":4,"d_state":2,"n_layer":1,)"
                             R"("vocab_size":5,"mixer_types":[")" +
                             std::string(mixer) + R"("],"mixer_kwargs":{")" + option +
                             "\":" + value + "}}")
          .resolve();
    });
  };
  EXPECT_EQ(error("Mamba", "dt_rank", "3"), "");
  const char* const huge = "9223372036854775807";
  for (const auto& [mixer, option] :
       std::vector<std::pair<const char*, const char*>>{{"Mamba", "dt_rank"},
                                                        {"Mamba", "d_conv"},
                                                        {"attn", "head_dim"},
                                                        {"S4", "channels"},
                                                        {"S4D", "n_ssm"},
                                                        {"S7", "d_state"},
                                                        {"Centaurus", "sub_state_dim"}})
    expect_refused(error(mixer, option, huge), {mixer, option, "at most 1073741824", huge});
  for (const char* mixer : {"Mamba", "RGLRU"})
    expect_refused(error(mixer, "expand", "1e300"), {mixer, "expand", "at most 1024", "1e+300"});
}

TEST_F(HostileFiles, ErrorsAreShort) {
  const std::string large(1'000'000, 'x');
  const std::string text = detail::concat("[\"", large);
  const std::string key = detail::concat(R"({"weight_map":{")", large, "\":1}}");
  const std::vector<std::string> messages = {
      error_of([&] { (void)config_from_json(text); }),
      error_of([&] { (void)detail::manifest_from_json("manifest", text); }),
      error_of([&] { (void)detail::names_of_index("index", key); })};
  for (const std::string& message : messages) {
    EXPECT_GT(message.size(), 10U);
    EXPECT_LT(message.size(), 1'000U);
  }
}

// A zero would end a message before its reason, a line end break its line.
TEST_F(HostileFiles, NamesThatCannotBePrintedAreRefused) {
  constexpr const char* kConfig =
      R"({"d_model":4,"d_state":2,"n_layer":1,"vocab_size":5,"mixer_types":[")";
  for (const char* name : {"a\\u0000b", "a\\nb", "a\\u001b[2J", "a\\u007f"}) {
    const std::string key = detail::concat(R"({")", name, R"(":{}})");
    const std::string value = detail::concat(kConfig, name, R"("]})");
    const std::string mlp = detail::concat(kConfig, R"(LRU"],"mlp_cls":")", name, R"("})");
    const std::string length = {static_cast<char>(key.size()), 0, 0, 0, 0, 0, 0, 0};
    const std::string header = detail::concat(length, key);
    expect_refused(error_of([&] { (void)config_from_json(key); }),
                   {"config: expected a printable"});
    expect_refused(error_of([&] { (void)config_from_json(value); }), {"mixer_types", "printable"});
    expect_refused(error_of([&] { (void)config_from_json(mlp); }), {"mlp_cls", "printable"});
    expect_refused(error_of([&] { (void)detail::names_of_index("index", key); }),
                   {"index: expected a printable"});
    expect_refused(error_of([&] { (void)SafetensorsFile::parse("weights", bytes_of(header)); }),
                   {"weights: header: expected printable"});
  }
}

TEST_F(HostileFiles, IndicesNameFilesOfTheirFolder) {
  for (const char* name : {"", ".", "..", "../a", "/a", "a/b", "a\\\\b", "a\\u0000b"}) {
    const std::string text = std::string(R"({"weight_map":{"w":")") + name + "\"}}";
    expect_refused(error_of([&] { (void)detail::names_of_index("index", text); }),
                   {"index", "'w'", "a name in this folder"});
  }
  expect_refused(error_of([&] {
                   (void)detail::names_of_index("index", R"({"weight_map":{"a":"f","a":"g"}})");
                 }),
                 {"index", "duplicate key"});
}

// Under a checksum that is right: numbers that their fields cannot hold, and a large file that is
// named again and again.
TEST_F(HostileFiles, ManifestsOfWrongContentAreRefused) {
  const auto with = [](const std::string& field, const std::string& value) {
    nlohmann::json body = {{"format", "lrnn-training-checkpoint"},
                           {"version", 1},
                           {"step", 3},
                           {"settings", {{"seed", "1"}}},
                           {"files", {{{"name", "f"}, {"bytes", 8}, {"crc32", 1}}}}};
    body[nlohmann::json::json_pointer(field)] = nlohmann::json::parse(value);
    // The check value is that of zlib's crc32, bit by bit.
    std::uint32_t crc = ~0U;
    for (const char c : body.dump()) {
      crc ^= static_cast<std::uint8_t>(c);
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
    }
    return nlohmann::json{{"checkpoint", body}, {"crc32", ~crc}}.dump();
  };
  const auto error = [&](const std::string& field, const std::string& value) {
    return error_of([&] { (void)detail::manifest_from_json("manifest", with(field, value)); });
  };
  EXPECT_EQ(error("/step", "4"), "");
  const std::string file = R"({"name":"f","bytes":8,"crc32":1})";
  const struct {
    const char* field;
    std::string value;
    const char* reason;
  } bad[] = {{"/step", "1e300", "step: expected an integer"},
             {"/step", "9223372036854775808", "step: expected an integer"},
             {"/step", "true", "step: expected an integer"},
             {"/files/0/bytes", "-1", "bytes: expected an integer"},
             {"/files/0/crc32", "4294967296", "crc32: expected an integer"},
             {"/files/0/name", R"("../f")", "file in this folder"},
             {"/files/0/name", R"("a\u0000b")", "file in this folder"},
             {"/files", "[" + file + "," + file + "]", "'f' occurs twice"},
             {"/files", "3", "files: expected a list"},
             {"/settings", "[]", "damaged"},
             {"/version", "2", "version 1"}};
  for (const auto& b : bad) expect_refused(error(b.field, b.value), {"manifest: ", b.reason});
}

}  // namespace
}  // namespace lrnn
