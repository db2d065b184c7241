#include "lane_scan_float.hpp"

#include "lrnn/ops/lane_scan.hpp"

#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kPlane = kFloatLanes;     // from a real part to its imaginary part
constexpr std::int64_t kPair = 2 * kFloatLanes;  // between complex numbers
constexpr std::int64_t kChunk = kLaneScanChunk;

#define LRNN_KERNELS "lane_scan_float_kernel.hpp"
#include "common/each_isa.hpp"

}  // namespace

void run_float_lanes(const FloatLaneForward& p) {
  const FlushDenormals flush;
  LRNN_OF_MACHINE(run)(p);
}
void run_float_lanes_backward(const FloatLaneBackward& p) {
  const FlushDenormals flush;
  LRNN_OF_MACHINE(run_backward)(p);
}

}  // namespace lrnn::cpu
