/// What a model promises with any mixer: lrnnx's parameters, files, learning, generation, options.
#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/generation/generate.hpp"
#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/ops/argmax.hpp"
#include "lrnn/train/trainer.hpp"

#include "io/golden.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<std::int32_t>;

/// One layer of every mixer, a plain MLP and LayerNorm.
LRNNLMHeadConfig all_mixers(std::int64_t vocab_size) {
  const std::vector<MixerType> types = all_mixer_types();
  return {.d_model = 16,
          .d_state = 8,
          .n_layer = static_cast<std::int64_t>(types.size()),
          .vocab_size = vocab_size,
          .mixer_types = types,
          .d_intermediate = 24,
          .mlp_cls = "MLP",
          .rms_norm = false};
}

TEST(NineMixers, AreAll) {
  EXPECT_EQ(all_mixer_types().size(), 9U);
}

class ScratchFolder {
 public:
  ScratchFolder() { fs::create_directories(path); }
  ~ScratchFolder() { fs::remove_all(path); }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  [[nodiscard]] std::string read(const char* name) const {
    std::ifstream in(path / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  const fs::path path =
      fs::temp_directory_path() / ("lrnn_nine_mixers_" + std::to_string(::getpid()));
};

// --- parameters and files ------------------------------------------------------------------------

using Shapes = std::map<std::string, Shape>;

Shapes shapes_in(const fs::path& path) {
  Shapes shapes;
  const auto file = SafetensorsFile::open(path);
  for (const auto& [name, entry] : file.entries()) shapes.emplace(name, entry.shape);
  return shapes;
}

std::vector<std::string> recorded_models() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(LRNN_GOLDEN_DIR))
    if (entry.is_directory() && detail::read_golden_case(entry.path()).kind == "lm")
      names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

class RecordedModel : public ::testing::TestWithParam<std::string> {};

// A fresh model writes tensors of lrnnx's names and shapes, all of them and no others.
TEST_P(RecordedModel, HasLrnnxsParameters) {
  const fs::path directory = fs::path(LRNN_GOLDEN_DIR) / GetParam();
  LRNNLMHeadConfig config = config_from_json(detail::read_golden_case(directory).constructor,
                                             {.constructor_arguments = true});
  Context ctx = Context::cpu();
  const ScratchFolder scratch;
  LRNNLMHeadModel(ctx, config, {.dtype = DType::float32})
      .save_pretrained(ctx, scratch.path, {.lrnnx_names = true});
  EXPECT_EQ(shapes_in(scratch.path / "model.safetensors"),
            shapes_in(directory / "model.safetensors"));
}
INSTANTIATE_TEST_SUITE_P(Lrnnx, RecordedModel, ::testing::ValuesIn(recorded_models()),
                         [](const auto& param_info) { return param_info.param; });

TEST(NineMixers, SavingWhatWasLoadedGivesTheSameBytes) {
  Context ctx = Context::cpu();
  for (const bool lrnnx_names : {false, true})
    for (const DType dtype : {DType::float32, DType::float64}) {
      const ScratchFolder scratch;
      const SaveOptions options{.lrnnx_names = lrnnx_names};
      LRNNLMHeadModel(ctx, all_mixers(31), {.dtype = dtype, .seed = 4})
          .save_pretrained(ctx, scratch.path, options);
      const std::string tensors = scratch.read("model.safetensors");
      const std::string config = scratch.read("config.json");
      ASSERT_GT(tensors.size(), 50000U);
      LRNNLMHeadModel::from_pretrained(ctx, scratch.path)
          .save_pretrained(ctx, scratch.path, options);
      EXPECT_TRUE(scratch.read("model.safetensors") == tensors) << dtype;
      EXPECT_EQ(scratch.read("config.json"), config);
    }
}

// --- learning and generation ---------------------------------------------------------------------

TextData poem() {
  const std::string text =
      "The wind was a torrent of darkness among the gusty trees,\n"
      "The moon was a ghostly galleon tossed upon cloudy seas,\n"
      "The road was a ribbon of moonlight over the purple moor,\n"
      "And the highwayman came riding, riding, riding.\n";
  std::vector<std::uint8_t> bytes;
  for (int i = 0; i < 20; ++i) bytes.insert(bytes.end(), text.begin(), text.end());
  return TextData::from_bytes({bytes});
}

TEST(NineMixers, LearnText) {
  Context ctx = Context::best();
  const TextData data = poem();
  LRNNLMHeadModel model(ctx, all_mixers(256), {.seed = 1});
  const TrainerConfig config{
      .steps = 150,
      .batch_size = 4,
      .seqlen = 48,
      .schedule = {.kind = LrScheduleKind::Linear, .lr = 0.01, .warmup_steps = 5},
      .seed = 3};
  Trainer trainer(ctx, training_model(model), data, config);
  const double before = trainer.evaluate().bits_per_byte;
  EXPECT_NEAR(before, 8.0, 0.3);  // 256 tokens, about equally likely
  trainer.run();
  // Knowing only how often each letter occurs takes 4.3 bits.
  EXPECT_LT(trainer.evaluate().bits_per_byte, 3.0);
}

// Every token is the most likely one after all tokens before it, by a forward pass without a cache.
void expect_greedy(const LRNNLMHeadConfig& config, const std::string& what) {
  Context ctx = Context::cpu();
  const LRNNLMHeadModel model(ctx, config, {.dtype = DType::float64, .seed = 11});
  const auto matrix = [&](const Tokens& rows) {
    return ctx.from_host<std::int32_t>({2, static_cast<std::int64_t>(rows.size()) / 2}, rows);
  };
  std::vector<Tokens> rows{{3, 1, 4}, {1, 5, 9}};
  const auto together = [&rows] {
    Tokens all = rows[0];
    all.insert(all.end(), rows[1].begin(), rows[1].end());
    return all;
  };
  const Tensor prompt = matrix(together());
  constexpr int kTokens = 40;  // past the first chunk of every scan
  for (int i = 0; i < kTokens; ++i) {
    const auto out = model.forward(ctx, matrix(together()), {.num_last_tokens = 1});
    const auto best = ctx.to_host<std::int32_t>(argmax(ctx, out.logits));
    for (std::size_t b = 0; b < 2; ++b) rows[b].push_back(best[b]);
  }
  const auto drawn = ctx.to_host<std::int32_t>(
      generate(ctx, model, prompt, {.max_new_tokens = kTokens, .temperature = 0}));
  EXPECT_EQ(drawn, together()) << what;
  EXPECT_GT(std::set<std::int32_t>(drawn.begin(), drawn.end()).size(), 6U)
      << what << ": hardly more tokens than the prompt has";
}

TEST(NineMixers, GreedyTokensAreThoseOfWholeForwards) {
  LRNNLMHeadConfig config = all_mixers(31);
  config.tie_embeddings = false;
  config.initializer_cfg.initializer_range = 1.0;
  expect_greedy(config, "all");
  for (const MixerType type : all_mixer_types()) {
    config.mixer_types = {type, type};
    config.n_layer = 2;
    expect_greedy(config, std::string(mixer_name(type)));
  }
}

// --- options -------------------------------------------------------------------------------------

std::string error_of(const std::string& type, const std::string& kwargs) {
  const std::string text = R"({"lrnn_format_version":1,"d_model":6,"d_state":4,"n_layer":1,)"
                           R"("vocab_size":31,"mixer_types":[")" +
                           type + R"("],"mixer_kwargs":)" + kwargs + "}";
  try {
    (void)config_from_json(text).resolve();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(MixerKwargs, UnknownOptionsAreNamed) {
  for (const MixerType type : all_mixer_types()) {
    const std::string name(mixer_name(type));
    for (const char* option : {"no_such_option", "D_state", "bidirectional", "rate", "layer_idx"}) {
      const std::string object = std::string("{\"") + option + "\":1}";
      const std::string unknown = std::string(option) + ": unknown option, expected one of: ";
      EXPECT_EQ(error_of(name, object).find("mixer_kwargs." + unknown), 0U) << name;
      EXPECT_EQ(error_of(name, "{\"" + name + "\":" + object + "}")
                    .find("mixer_kwargs." + name + "." + unknown),
                0U)
          << name << ' ' << option;
    }
  }
}

struct Refused {
  const char* type;
  const char* object;
  const char* option;    ///< that the error names
  const char* expected;  ///< part of what the error says
};

const Refused kRefused[] = {
    {"LRU", R"({"r_max":1.5})", "r_max", "got 1.5"},
    {"LRU", R"({"r_min":-0.1})", "r_min", "got -0.1"},
    {"LRU", R"({"d_state":0})", "d_state", "got 0"},
    {"S5", R"({"conj_sym":true})", "conj_sym", "expected false"},
    {"S5", R"({"discretization":"async"})", "discretization", "async"},
    {"S5", R"({"discretization":"no_discretization","event":true})", "event", "expected false"},
    {"S5", R"({"dt_min":0})", "dt_min", "got 0"},
    {"Centaurus", R"({"mode":"dws","d_state":4})", "d_state", "expected d_model = 6"},
    {"Centaurus", R"({"mode":"full","d_state":6})", "d_state", "expected d_model^2 = 36"},
    {"Centaurus", R"({"mode":"bottleneck"})", "mode", "bottleneck"},
    {"Centaurus", R"({"discretization":"euler"})", "discretization", "euler"},
    {"Centaurus", R"({"sub_state_dim":0})", "sub_state_dim", "got 0"},
    {"S4", R"({"disc":"zoh"})", "disc", "unknown option"},
    {"Mamba", R"({"discretization":"euler"})", "discretization", "euler"},
    {"Mamba", R"({"d_conv":0})", "d_conv", "got 0"},
    {"Mamba", R"({"dt_init":"zero"})", "dt_init", "zero"},
    {"RGLRU", R"({"a_init_range":[0.9,1.0]})", "a_init_range", "got 0.9 and 1"},
    {"RGLRU", R"({"c":0})", "c", "got 0"},
    {"S7", R"({"J":3})", "J", "3"},
    {"attn", R"({"num_heads":4})", "num_heads", "4"},
    {"attn", R"({"num_heads":6,"num_heads_kv":4})", "num_heads_kv", "4"},
    {"attn", R"({"num_heads":2,"rotary_emb_dim":3})", "rotary_emb_dim", "3"},
};

// What S4 and S4D name but refuse.
const Refused kRefusedByBoth[] = {
    {"", R"({"transposed":true})", "transposed", "expected false"},
    {"", R"({"bottleneck":2})", "bottleneck", "expected null"},
    {"", R"({"is_real":true})", "is_real", "expected false"},
    {"", R"({"swap_channels":true})", "swap_channels", "expected false"},
    {"", R"({"lr":0.001})", "lr", "expected null"},
    {"", R"({"wd":0.1})", "wd", "expected 0"},
    {"", R"({"dropout":0.1})", "dropout", "expected 0"},
    {"", R"({"d_state":5})", "d_state", "even"},
    {"", R"({"d_state":2})", "d_state", "at least 4"},
    {"", R"({"init":"legt"})", "rank", "at least 2"},
    {"", R"({"init":"legz"})", "init", "legz"},
    {"", R"({"n_ssm":4})", "n_ssm", "divisor"},
    {"", R"({"dt_transform":"tanh"})", "dt_transform", "tanh"},
};

void expect_refused(const std::string& type, const Refused& r) {
  const std::string message = error_of(type, "{\"" + type + "\":" + r.object + "}");
  EXPECT_EQ(message.find("mixer_kwargs." + type + "." + r.option + ":"), 0U)
      << type << ' ' << r.object << "\n  " << message;
  EXPECT_NE(message.find(r.expected), std::string::npos) << message;
}

TEST(MixerKwargs, RefusedOptionsAreNamed) {
  for (const Refused& r : kRefused) expect_refused(r.type, r);
  for (const char* type : {"S4", "S4D"})
    for (const Refused& r : kRefusedByBoth) expect_refused(type, r);
}

// The defaults of the same options are accepted, so that configurations of lrnnx can be read.
TEST(MixerKwargs, DefaultsOfRefusedOptionsAreAccepted) {
  for (const char* type : {"S4", "S4D"})
    EXPECT_EQ(error_of(type, R"({"transposed":false,"bottleneck":null,"is_real":false,)"
                             R"("swap_channels":false,"lr":null,"wd":0.0,"dropout":0.0,)"
                             R"("tie_dropout":false,"verbose":true,"l_max":null})"),
              "accepted");
  EXPECT_EQ(error_of("S5", R"({"conj_sym":false})"), "accepted");
  for (const char* type : {"Mamba", "RGLRU", "S7"})
    EXPECT_EQ(error_of(type, R"({"use_fast_path":false})"), "accepted");
}

}  // namespace
}  // namespace lrnn
