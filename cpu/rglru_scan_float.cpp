// Channels are the vector lanes. Work items are (sequence, group of channels); no sum is shared
// between vectors of channels, so that the bits depend on neither.
#include "rglru_scan_float.hpp"

#include <algorithm>

#include "lrnn/ops/rglru_scan.hpp"

#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

// Of a work item: long pieces of rows, and few enough that threads find work.
constexpr std::int64_t kGroup = 256;

#define LRNN_KERNELS "rglru_scan_float_kernel.hpp"
#include "common/each_isa.hpp"

template <class F>
void for_each_group(const FloatGatedScan& p, F&& f) {
#pragma omp parallel
  {
    const FlushDenormals flush;
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t e = 0; e < p.channels; e += kGroup)
        f(b, e, std::min(kGroup, p.channels - e));
  }
}

}  // namespace

void run_float_gated_scan(const FloatGatedScanForward& p) {
  const auto run = LRNN_OF_MACHINE(run);
  for_each_group(p.in, [&](auto b, auto first, auto count) { run(p, b, first, count); });
}
void run_float_gated_scan_backward(const FloatGatedScanBackward& p) {
  const auto run = LRNN_OF_MACHINE(run_backward);
  for_each_group(p.in, [&](auto b, auto first, auto count) { run(p, b, first, count); });
}

}  // namespace lrnn::cpu
