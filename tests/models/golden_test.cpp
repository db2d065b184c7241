// Every recorded case of lrnnx under tests/golden, in every dtype of the CPU and of the first GPU.

#include <algorithm>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/verify.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> case_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(LRNN_GOLDEN_DIR))
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

SafetensorsItem rounded_if_matrix(const SafetensorsFile& file, const SafetensorsEntry& entry) {
  if (!entry.name.ends_with("weight") || entry.shape.rank() < 2)
    return {entry.name, entry.dtype, entry.shape,
            [bytes = file.read_bytes(entry)] { return bytes; }};
  auto values = file.read_doubles(entry);
  for (double& v : values) v = static_cast<double>(to_float(to_bfloat16(static_cast<float>(v))));
  return safetensors_item(entry.name, entry.shape, values);
}

// The largest error of a gradient, in double, of the case with its matrices rounded to bfloat16.
double movement_by_rounding(const std::string& name) {
  const fs::path copy = fs::temp_directory_path() /
                        detail::concat("lrnn_rounded_", name, '_', static_cast<long>(getpid()));
  fs::copy(fs::path(LRNN_GOLDEN_DIR) / name, copy, fs::copy_options::recursive);
  std::vector<SafetensorsItem> items;
  const auto file = SafetensorsFile::open(fs::path(LRNN_GOLDEN_DIR) / name / "model.safetensors");
  for (const auto& [tensor, entry] : file.entries())
    items.push_back(rounded_if_matrix(file, entry));
  write_safetensors(copy / "model.safetensors", std::move(items));
  Context ctx = Context::cpu();
  const double error = verify_case(ctx, DType::float64, copy).gradient_error;
  fs::remove_all(copy);
  return error;
}

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  static VerifyResult run(Context& ctx, DType dtype) {
    return verify_case(ctx, dtype, fs::path(LRNN_GOLDEN_DIR) / GetParam());
  }
  static void verify(Context& ctx, DType dtype) { expect_ok(ctx, run(ctx, dtype)); }
  static void expect_ok(const Context& ctx, const VerifyResult& r) {
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
  VerifyResult r = run(ctx, DType::bfloat16);
  // Where a gradient is a small difference of large terms, it may be further off: four times as far
  // as the exact gradient moves with the matrices. Activations and their gradients are rounded at
  // some ten places in turn, with random signs, and 4 > sqrt(1 + 10).
  if (r.gradient_error > r.gradient_tolerance &&
      r.gradient_error <= 4 * movement_by_rounding(GetParam())) {
    EXPECT_TRUE(r.reason.starts_with("gradient of ")) << r.reason;
    r.status = VerifyStatus::Ok;
  }
  expect_ok(ctx, r);
}

INSTANTIATE_TEST_SUITE_P(Lrnnx, Golden, ::testing::ValuesIn(case_names()),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace lrnn
