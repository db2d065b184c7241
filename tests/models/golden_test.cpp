// Every recorded case of lrnnx under tests/golden, in every dtype of the CPU and of the first GPU.

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "lrnn/models/verify.hpp"

namespace lrnn {
namespace {

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(LRNN_GOLDEN_DIR))
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  static void verify(Context& ctx, DType dtype) {
    const auto r = verify_case(ctx, dtype, std::filesystem::path(LRNN_GOLDEN_DIR) / GetParam());
    if (r.status == VerifyStatus::Unsupported && ctx.device().is_cuda()) GTEST_SKIP() << r.reason;
    // tests/golden/README.md tells why these are not compared, and no others.
    const bool other_system = GetParam() == "s5_bilinear" || GetParam() == "s4_lmax_short";
    EXPECT_EQ(r.status, other_system ? VerifyStatus::NotComparable : VerifyStatus::Ok) << r.reason;
    if (r.status == VerifyStatus::Ok) {
      EXPECT_LE(r.output_error, r.output_tolerance) << "nothing was compared";
    }
  }
};

TEST_P(Golden, CpuDouble) {
  Context ctx = Context::cpu();
  verify(ctx, DType::float64);
}
TEST_P(Golden, CpuFloat) {
  Context ctx = Context::cpu();
  verify(ctx, DType::float32);
}
TEST_P(Golden, CudaFloat) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  verify(ctx, DType::float32);
}
TEST_P(Golden, CudaBfloat16) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  verify(ctx, DType::bfloat16);
}

INSTANTIATE_TEST_SUITE_P(Lrnnx, Golden, ::testing::ValuesIn(case_names()),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace lrnn
