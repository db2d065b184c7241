// Which way products take in float32 accuracy on Hopper's tensor cores
// (common/linear_float32_sm90.cuh).
#include "common/linear_float32_sm90.cuh"

namespace lrnn::cuda::linear_float32_sm90 {
namespace {

bool takes_float16x2(const Product& p) {
  return float16x2::applies(p) && float16x2::time(p) < bfloat16x3::time(p);
}

}  // namespace

bool applies(const Product& p) {
  return bfloat16x3::applies(p);
}

bool pays(const Product& p) {
  constexpr double kRate = 12e6;  // multiply-adds per microsecond of cuBLASLt where sizes are small
  if (!applies(p)) return false;
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const double time = takes_float16x2(p) ? float16x2::time(p) : bfloat16x3::time(p);
  return time < work / kRate;
}

void run(Context& ctx, const Product& p) {
  if (takes_float16x2(p)) return float16x2::run(ctx, p);
  bfloat16x3::run(ctx, p);
}

}  // namespace lrnn::cuda::linear_float32_sm90
