// Models to and from folders: round trips, checkpoints of lrnnx, and what is refused.

#include <fstream>
#include <iterator>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

namespace lrnn {
namespace {

using enum MixerType;
namespace fs = std::filesystem;

class Pretrained : public ::testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder_); }
  void TearDown() override { fs::remove_all(folder_); }

  static LRNNLMHeadConfig config() {
    return {.d_model = 8,
            .d_state = 4,
            .n_layer = 2,
            .vocab_size = 19,
            .mixer_types = {LRU, Mamba},
            .d_intermediate = 12,
            .norm_epsilon = 1e-3,
            .rms_norm = false};
  }
  [[nodiscard]] std::vector<double> logits(const LRNNLMHeadModel& model) {
    const Tensor ids = ctx_.from_host<std::int32_t>({1, 4}, std::vector<std::int32_t>{3, 1, 4, 1});
    return ctx_.to_host_as_double(model.forward(ctx_, ids).logits);
  }
  /// The items of the saved model, to be changed and written again.
  [[nodiscard]] std::vector<SafetensorsItem> items() const {
    const auto file =
        std::make_shared<SafetensorsFile>(SafetensorsFile::open(folder_ / "model.safetensors"));
    std::vector<SafetensorsItem> out;
    for (const auto& [name, entry] : file->entries())
      out.push_back({name, entry.dtype, entry.shape,
                     [file, name = name] { return file->read_bytes(file->at(name)); }});
    return out;
  }
  void rewrite(const std::vector<SafetensorsItem>& changed) const {
    write_safetensors(folder_ / "other", changed);
    fs::rename(folder_ / "other", folder_ / "model.safetensors");
  }
  [[nodiscard]] std::string error() {
    try {
      (void)LRNNLMHeadModel::from_pretrained(ctx_, folder_);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  }
  void expect_error(std::vector<std::string> parts) {
    const std::string message = error();
    for (const std::string& part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << part << "\n  in " << message;
  }
  [[nodiscard]] std::string read(const char* name) const {
    std::ifstream in(folder_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void write(const char* name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary | std::ios::trunc) << text;
  }
  void remove_from_config(const std::string& line_with) const {
    std::string text = read("config.json");
    const auto at = text.find(line_with);
    ASSERT_NE(at, std::string::npos);
    const auto begin = text.rfind('\n', at);
    text.erase(begin, text.find('\n', at) - begin);
    write("config.json", text);
  }

  Context ctx_ = Context::cpu();
  fs::path folder_ = fs::temp_directory_path() / ("lrnn_pretrained_" + std::to_string(::getpid()));
};

TEST_F(Pretrained, RoundTripIsExact) {
  for (const DType dtype : {DType::float32, DType::float64})
    for (const bool tied : {true, false}) {
      LRNNLMHeadConfig c = config();
      c.tie_embeddings = tied;
      const LRNNLMHeadModel model(ctx_, c, {.dtype = dtype, .seed = 5});
      model.save_pretrained(ctx_, folder_);
      const auto loaded = LRNNLMHeadModel::from_pretrained(ctx_, folder_);
      EXPECT_EQ(loaded.dtype(), dtype);
      EXPECT_EQ(config_to_json(loaded.config()), config_to_json(model.config()));
      EXPECT_EQ(logits(loaded), logits(model));
      const std::string first = read("model.safetensors");
      loaded.save_pretrained(ctx_, folder_);
      EXPECT_EQ(read("model.safetensors"), first);
      EXPECT_EQ(
          SafetensorsFile::open(folder_ / "model.safetensors").find("lm_head.weight") != nullptr,
          !tied);
    }
}

TEST_F(Pretrained, DTypeMayBeChosenOnLoading) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const auto wide = LRNNLMHeadModel::from_pretrained(ctx_, folder_, {.dtype = DType::float64});
  EXPECT_EQ(wide.dtype(), DType::float64);
  const auto a = logits(model);
  const auto b = logits(wide);
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-6);
}

// A bfloat16 model on the CPU is stored and read with the values that it computes with.
TEST_F(Pretrained, BFloat16WeightsComeBack) {
  const LRNNLMHeadModel model(ctx_, config(), {.dtype = DType::bfloat16, .seed = 5});
  model.save_pretrained(ctx_, folder_);
  const auto again = LRNNLMHeadModel::from_pretrained(ctx_, folder_);
  EXPECT_EQ(again.dtype(), DType::bfloat16);
  EXPECT_EQ(logits(again), logits(model));
  const LRNNLMHeadModel wide(ctx_, config(), {.seed = 5});
  wide.save_pretrained(ctx_, folder_);
  const auto rounded = LRNNLMHeadModel::from_pretrained(ctx_, folder_, {.dtype = DType::bfloat16});
  EXPECT_EQ(logits(rounded), logits(model));
}

TEST_F(Pretrained, TiedHeadIsAcceptedWhenEqual) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_, {.lrnnx_names = true});
  EXPECT_NE(SafetensorsFile::open(folder_ / "model.safetensors").find("lm_head.weight"), nullptr);
  EXPECT_EQ(logits(LRNNLMHeadModel::from_pretrained(ctx_, folder_)), logits(model));
  auto changed = items();
  for (auto& item : changed)
    if (item.name == "lm_head.weight")
      item.bytes = [old = item.bytes] {
        auto bytes = old();
        bytes.front() ^= std::byte{1};
        return bytes;
      };
  rewrite(changed);
  expect_error({"lm_head.weight", "differs", "backbone.embedding.weight"});
}

TEST_F(Pretrained, NamesAndShapesMustMatch) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const auto all = items();
  auto changed = all;
  changed.erase(changed.begin());
  rewrite(changed);
  expect_error({"missing tensors", all.front().name});

  changed = all;
  changed.push_back(safetensors_item<float>("backbone.layers.0.mixer.extra", {1}, {1.0F}));
  rewrite(changed);
  expect_error({"unexpected tensors", "backbone.layers.0.mixer.extra"});

  changed = all;
  changed[0] = safetensors_item<float>(all[0].name, {1}, {1.0F});
  rewrite(changed);
  expect_error({all[0].name, "expected", "got [1]"});

  changed = all;
  for (auto& item : changed)
    if (item.name == "backbone.norm_f.weight")
      item = safetensors_item<std::int32_t>(item.name, {8}, std::vector<std::int32_t>(8, 1));
  rewrite(changed);
  expect_error({"backbone.norm_f.weight", "float dtype", "I32"});
}

TEST_F(Pretrained, TheProjectionThatMambaNeverUsesMayBeMissing) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  auto changed = items();
  std::erase_if(changed,
                [](const auto& item) { return item.name.find("dtA_proj") != std::string::npos; });
  ASSERT_EQ(changed.size() + 2, items().size());
  rewrite(changed);
  EXPECT_EQ(logits(LRNNLMHeadModel::from_pretrained(ctx_, folder_)), logits(model));
}

TEST_F(Pretrained, HalfPrecisionIsConverted) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  auto changed = items();
  for (auto& item : changed) {
    if (item.name == "backbone.norm_f.weight")
      item = {item.name, FileDType::F16, item.shape, [] {
                std::vector<std::byte> bytes(16);
                for (std::size_t i = 0; i < 8; ++i) bytes[2 * i + 1] = std::byte{0x3E};  // 1.5
                return bytes;
              }};
    if (item.name == "backbone.norm_f.bias")
      item = safetensors_item<bfloat16>(item.name, {8},
                                        std::vector<bfloat16>(8, to_bfloat16(-0.375F)));
  }
  rewrite(changed);
  const auto loaded = LRNNLMHeadModel::from_pretrained(ctx_, folder_);
  EXPECT_EQ(ctx_.to_host<float>(loaded.parameters().at("backbone.norm_f.weight").value),
            std::vector<float>(8, 1.5F));
  EXPECT_EQ(ctx_.to_host<float>(loaded.parameters().at("backbone.norm_f.bias").value),
            std::vector<float>(8, -0.375F));
}

TEST_F(Pretrained, ShardsAreReadThroughTheirIndex) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const auto all = items();
  const auto half = static_cast<std::ptrdiff_t>(all.size() / 2);
  std::string index;
  const auto shard = [&](const char* name, std::vector<SafetensorsItem> part) {
    for (const auto& item : part)
      index += (index.empty() ? "" : ",") + ("\"" + item.name + "\":\"" + name + "\"");
    write_safetensors(folder_ / name, std::move(part));
  };
  shard("a.safetensors", {all.begin(), all.begin() + half});
  shard("b.safetensors", {all.begin() + half, all.end()});
  fs::remove(folder_ / "model.safetensors");
  const char* const name = "model.safetensors.index.json";
  write(name, "{\"weight_map\":{" + index + "}}");
  EXPECT_EQ(logits(LRNNLMHeadModel::from_pretrained(ctx_, folder_)), logits(model));

  write(name, R"({"weight_map":{"a":"../a.safetensors"}})");
  expect_error({"index.json", "a name in this folder"});
  write(name, R"({"weight_map":{"a":"c.safetensors"}})");
  expect_error({"c.safetensors", "cannot open"});
  write(name, R"({"weight_map":[]})");
  expect_error({"index.json", "weight_map"});
  write_safetensors(folder_ / "c.safetensors", {all.front()});
  write(name, R"({"weight_map":{"a":"a.safetensors","b":"b.safetensors","c":"c.safetensors"}})");
  expect_error({all.front().name, "two files"});
}

TEST_F(Pretrained, ConfigurationsOfLrnnxAreCompletedOrRefused) {
  LRNNLMHeadConfig c = config();
  c.mixer_types = {LRU, S5};
  const LRNNLMHeadModel model(ctx_, c, {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  write("config.json",
        R"({"d_model":8,"d_state":4,"n_layer":2,"vocab_size":19,"mixer_types":["LRU","S5"],)"
        R"("d_intermediate":12,"norm_epsilon":0.001,"rms_norm":false,"fused_add_norm":true,)"
        R"("residual_in_fp32":false,"tie_embeddings":true,"pad_vocab_size_multiple":8})");
  expect_error({"config.json", "mixer_kwargs.S5.discretization"});
  const auto loaded =
      LRNNLMHeadModel::from_pretrained(ctx_, folder_, {.mixer_kwargs = MixerKwargs{}});
  EXPECT_EQ(logits(loaded), logits(model));
}

TEST_F(Pretrained, Mamba1CheckpointsOfOtherLibraries) {
  LRNNLMHeadConfig c{.d_model = 8,
                     .d_state = 4,
                     .n_layer = 2,
                     .vocab_size = 19,
                     .mixer_types = {Mamba, Mamba},
                     .residual_in_fp32 = true};
  c.mixer_kwargs.mamba.d_conv = 3;
  c.mixer_kwargs.mamba.dt_rank = 2;
  const LRNNLMHeadModel model(ctx_, c, {.seed = 5});
  model.save_pretrained(ctx_, folder_, {.lrnnx_names = true});
  auto changed = items();
  std::erase_if(changed,
                [](const auto& item) { return item.name.find("dtA_proj") != std::string::npos; });
  rewrite(changed);
  write("config.json", R"({"d_model":8,"n_layer":2,"vocab_size":19,"rms_norm":true,)"
                       R"("ssm_cfg":{"d_state":4,"d_conv":3,"dt_rank":2,"layer":"Mamba1"},)"
                       R"("residual_in_fp32":true,"fused_add_norm":true,)"
                       R"("pad_vocab_size_multiple":8})");
  EXPECT_EQ(logits(LRNNLMHeadModel::from_pretrained(ctx_, folder_)), logits(model));
  write("config.json", R"({"d_model":8,"n_layer":2,"vocab_size":19,"ssm_cfg":{"layer":"Mamba2"}})");
  expect_error({"ssm_cfg.layer", "Mamba2"});
  write("config.json", R"({"d_model":8,"n_layer":2,"vocab_size":19,"ssm_cfg":{"d_stat":4}})");
  expect_error({"mixer_kwargs.Mamba.d_stat", "unknown"});
  write("config.json", R"({"d_model":8,"n_layer":2,"vocab_size":19,"ssm_cfg":{},"speed":4})");
  expect_error({"speed", "unknown"});
  write("config.json", R"({"d_model":8,"n_layer":2,"vocab_size":19,"ssm_cfg":{},)"
                       R"("attn_layer_idx":[2],"attn_cfg":{"num_heads":2}})");
  expect_error({"attn_layer_idx", "2"});

  // Hugging Face: another name of the embedding, no head when tied, the padded size.
  std::erase_if(changed, [](const auto& item) { return item.name == "lm_head.weight"; });
  for (auto& item : changed)
    if (item.name == "backbone.embedding.weight") item.name = "backbone.embeddings.weight";
  rewrite(changed);
  const std::string common =
      R"("hidden_size":8,"state_size":4,"num_hidden_layers":2,"vocab_size":24,"expand":2,)"
      R"("conv_kernel":3,"time_step_rank":2,"layer_norm_epsilon":1e-5,"use_bias":false,)"
      R"("use_conv_bias":true,"hidden_act":"silu","torch_dtype":"float16","eos_token_id":0})";
  write("config.json", R"({"model_type":"mamba",)" + common);
  const auto loaded = LRNNLMHeadModel::from_pretrained(ctx_, folder_);
  EXPECT_EQ(loaded.config().vocab_size, 24);
  const auto wide = logits(loaded);
  const auto narrow = logits(model);
  for (std::size_t t = 0; t < 4; ++t)
    for (std::size_t v = 0; v < 19; ++v) EXPECT_NEAR(wide[t * 24 + v], narrow[t * 19 + v], 1e-7);
  write("config.json", R"({"model_type":"falcon_mamba",)" + common);
  expect_error({"model_type", "falcon_mamba"});
}

TEST_F(Pretrained, DamagedFoldersAreTypedErrors) {
  expect_error({"config.json", "cannot open"});
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const std::string text = read("config.json");
  for (std::size_t n = 0; n < text.size() - 2; n += 7) {
    write("config.json", text.substr(0, n));
    EXPECT_NE(error().find("malformed JSON"), std::string::npos) << n;
  }
  write("config.json", text);
  remove_from_config("\"d_model\"");
  expect_error({"config.json", "d_model", "missing"});
  write("config.json", text);
  const std::string weights = read("model.safetensors");
  write("model.safetensors", weights.substr(0, weights.size() - 1));
  expect_error({"model.safetensors", "bytes"});
  fs::remove(folder_ / "model.safetensors");
  expect_error({"model.safetensors", "cannot open"});
  write("pytorch_model.bin", weights);
  expect_error({"model.safetensors", "missing", "pytorch_model.bin", "tools/convert_pickle.py"});
  // A shape that does not fit is found before memory is asked for.
  write("model.safetensors", weights);
  std::string huge = text;
  huge.replace(huge.find("\"vocab_size\": 19"), 16, "\"vocab_size\": 2000000000");
  write("config.json", huge);
  expect_error({"backbone.embedding.weight", "expected [2000000000, 8]"});
}

}  // namespace
}  // namespace lrnn
