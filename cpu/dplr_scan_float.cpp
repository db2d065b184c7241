#include "dplr_scan_float.hpp"

#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kPlane = kFloatHeads;     // from a real part to its imaginary part
constexpr std::int64_t kPair = 2 * kFloatHeads;  // between complex numbers
constexpr std::int64_t kChunk = kDplrScanChunk;

#define LRNN_KERNELS "dplr_scan_float_kernel.hpp"
#include "common/each_isa.hpp"

}  // namespace

void run_float_dplr(const FloatDplrForward& p) {
  const FlushDenormals flush;
  LRNN_OF_MACHINE(run)(p);
}
void run_float_dplr_backward(const FloatDplrBackward& p) {
  const FlushDenormals flush;
  LRNN_OF_MACHINE(run_backward)(p);
}

}  // namespace lrnn::cpu
