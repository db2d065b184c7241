/// Checkpoints written by another library give the logits that it computed: see
/// tests/fixtures/pretrained/make_fixtures.py.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/models/verify.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> folders() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(fs::path(LRNN_FIXTURE_DIR) / "pretrained"))
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

class PretrainedFixture : public ::testing::TestWithParam<std::string> {
 protected:
  // The largest difference from the recorded logits.
  static double difference(Context& ctx, DType dtype) {
    const fs::path folder = fs::path(LRNN_FIXTURE_DIR) / "pretrained" / GetParam();
    const auto io = SafetensorsFile::open(folder / "io.safetensors");
    const auto model = LRNNLMHeadModel::from_pretrained(ctx, folder, {.dtype = dtype});
    const Shape shape = io.at("input_ids").shape;
    std::vector<std::int32_t> values;
    for (const std::int64_t id : io.read_integers(io.at("input_ids")))
      values.push_back(static_cast<std::int32_t>(id));
    const Tensor ids = ctx.from_host<std::int32_t>(shape, std::span<const std::int32_t>(values));
    const std::vector<double> want = io.read_doubles(io.at("logits"));
    const auto got = ctx.to_host_as_double(model.forward(ctx, ids).logits);
    EXPECT_EQ(got.size(), want.size());
    double worst = 0;
    for (std::size_t i = 0; i < std::min(got.size(), want.size()); ++i)
      worst = std::max(worst, std::abs(got[i] - want[i]));
    return worst;
  }
};

TEST_P(PretrainedFixture, LogitsAreThoseOfTheOtherLibrary) {
  Context ctx = Context::cpu();
  EXPECT_LE(difference(ctx, DType::float64), 1e-12);
  EXPECT_LE(difference(ctx, DType::float32), 1e-5);
}

TEST_P(PretrainedFixture, CudaLogitsAreThoseOfTheOtherLibrary) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  EXPECT_LE(difference(ctx, DType::float32), 1e-5);
}

TEST_P(PretrainedFixture, VerifyComparesLogitsAndSteps) {
  Context ctx = Context::cpu();
  const fs::path folder = fs::path(LRNN_FIXTURE_DIR) / "pretrained" / GetParam();
  const VerifyResult r = verify_case(ctx, DType::float64, folder);
  EXPECT_EQ(r.name, GetParam());
  EXPECT_EQ(r.status, VerifyStatus::Ok) << r.reason;
  EXPECT_LE(r.output_error, 1e-12);
  EXPECT_LE(r.step_error, 1e-12);
  EXPECT_EQ(r.output_tolerance, 1e-9);
}

// Copies of a fixture with another recording.
class VerifyFolder : public ::testing::Test {
 protected:
  VerifyFolder()
      : folder_(fs::temp_directory_path() / ("lrnn_verify_" + std::to_string(::getpid()))) {
    const fs::path source = fs::path(LRNN_FIXTURE_DIR) / "pretrained" / "mamba_ssm_default";
    fs::create_directories(folder_);
    for (const char* name : {"config.json", "model.safetensors"})
      fs::copy_file(source / name, folder_ / name, fs::copy_options::overwrite_existing);
    const auto io = SafetensorsFile::open(source / "io.safetensors");
    ids_ = io.read_integers(io.at("input_ids"));
    logits_ = io.read_doubles(io.at("logits"));
  }
  ~VerifyFolder() override { fs::remove_all(folder_); }

  // The sizes of the fixture: B 2, L 9, V 37.
  [[nodiscard]] SafetensorsItem ids() const { return safetensors_item("input_ids", {2, 9}, ids_); }
  [[nodiscard]] SafetensorsItem logits() const {
    return safetensors_item("logits", {2, 9, 37}, logits_);
  }
  VerifyResult verify(std::vector<SafetensorsItem> items) {
    write_safetensors(folder_ / "io.safetensors", std::move(items));
    return verify_case(ctx_, DType::float64, folder_);
  }

  Context ctx_ = Context::cpu();
  fs::path folder_;
  std::vector<std::int64_t> ids_;
  std::vector<double> logits_;
};

TEST_F(VerifyFolder, FailsWhereOneLogitDiffers) {
  EXPECT_EQ(verify({ids(), logits()}).status, VerifyStatus::Ok);
  logits_[5] += 1e-7;
  const VerifyResult r = verify({ids(), logits()});
  EXPECT_EQ(r.status, VerifyStatus::Failed);
  EXPECT_NE(r.reason.find("output"), std::string::npos) << r.reason;
}

TEST_F(VerifyFolder, TheTypeOfTheLogitsSetsTheTolerance) {
  const std::vector<float> narrow(logits_.begin(), logits_.end());
  const VerifyResult r = verify({ids(), safetensors_item("logits", {2, 9, 37}, narrow)});
  EXPECT_EQ(r.status, VerifyStatus::Ok) << r.reason;
  EXPECT_EQ(r.output_tolerance, 1e-4);
  EXPECT_LE(r.output_error, 6e-8);  // half a unit in the last place of the recording
  EXPECT_GT(r.output_error, 0);
}

TEST_F(VerifyFolder, LogitsBeyondALengthAreNotCompared) {
  // Causal: what comes later changes nothing before the length.
  const auto lengths = safetensors_item<std::int64_t>("lengths", {2}, {9, 4});
  for (std::size_t i = std::size_t{9 + 4} * 37; i < logits_.size(); ++i) logits_[i] = -1;
  EXPECT_EQ(verify({ids(), logits(), lengths}).status, VerifyStatus::Ok);
  logits_[(9 + 3) * 37] = -1;
  EXPECT_EQ(verify({ids(), logits(), lengths}).status, VerifyStatus::Failed);
}

TEST_F(VerifyFolder, RecordedTimestepsAreUsed) {
  const LRNNLMHeadModel model(ctx_,
                              {.d_model = 8,
                               .d_state = 4,
                               .n_layer = 2,
                               .vocab_size = 37,
                               .mixer_types = {MixerType::Mamba, MixerType::S5},
                               .mixer_kwargs = {.s5 = {.event = true}},
                               .initializer_cfg = {.initializer_range = 1.0}},
                              {.dtype = DType::float64, .seed = 3});
  model.save_pretrained(ctx_, folder_);
  std::vector<double> tau;
  for (int i = 0; i < 18; ++i) tau.push_back(0.25 * (1 + i % 7));
  const Tensor timesteps = ctx_.from_host_as({2, 9}, DType::float64, tau);
  const Tensor input = ctx_.from_host<std::int64_t>({2, 9}, ids_);
  logits_ = ctx_.to_host_as_double(
      model.forward(ctx_, input, {.integration_timesteps = timesteps}).logits);
  const auto item = [&] { return safetensors_item("integration_timesteps", {2, 9}, tau); };
  const VerifyResult r = verify({ids(), logits(), item()});
  EXPECT_EQ(r.status, VerifyStatus::Ok) << r.reason;
  EXPECT_LE(r.output_error, 1e-14);
  EXPECT_LE(r.step_error, 1e-12);
  tau[4] = 3;
  EXPECT_EQ(verify({ids(), logits(), item()}).status, VerifyStatus::Failed);
}

TEST_F(VerifyFolder, RecordingsThatDoNotFitAreTypedErrors) {
  EXPECT_THROW((void)verify({ids()}), IoError);
  EXPECT_THROW((void)verify({logits()}), IoError);
  EXPECT_THROW((void)verify({safetensors_item("input_ids", {18}, ids_), logits()}), IoError);
  EXPECT_THROW((void)verify({ids(), safetensors_item("logits", {2, 37, 9}, logits_)}), IoError);
  auto wide = ids_;
  wide[3] += std::int64_t{1} << 32;
  EXPECT_THROW((void)verify({safetensors_item("input_ids", {2, 9}, wide), logits()}), IoError);
  auto unknown = ids_;
  unknown[3] = 37;
  const VerifyResult r = verify({safetensors_item("input_ids", {2, 9}, unknown), logits()});
  EXPECT_EQ(r.status, VerifyStatus::Failed);
  EXPECT_NE(r.reason.find("37"), std::string::npos) << r.reason;
}

std::string folder_name(const ::testing::TestParamInfo<std::string>& info) {
  return info.param;
}
INSTANTIATE_TEST_SUITE_P(All, PretrainedFixture, ::testing::ValuesIn(folders()), folder_name);

}  // namespace
}  // namespace lrnn
