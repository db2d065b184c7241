/// Checkpoints written by another library give the logits that it computed: see
/// tests/fixtures/pretrained/make_fixtures.py.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

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

std::string folder_name(const ::testing::TestParamInfo<std::string>& info) {
  return info.param;
}
INSTANTIATE_TEST_SUITE_P(All, PretrainedFixture, ::testing::ValuesIn(folders()), folder_name);

}  // namespace
}  // namespace lrnn
