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
// Of their rows in scratch: neighbours lie in different sets of the first cache.
constexpr std::int64_t kRowStride = kGroup + 16;

// Tokens in scratch. Chunks are shorter: backward starts from every kSpan / kRglruScanChunk-th.
constexpr std::int64_t kTile = 16;
constexpr std::int64_t kSpan = 64;

#define LRNN_KERNELS "rglru_scan_float_kernel.hpp"
#include "common/each_isa.hpp"

// With scratch for `rows` rows.
template <class Run, class Args>
void for_each_group(Run run, const Args& p, std::int64_t rows) {
#pragma omp parallel
  {
    const FlushDenormals flush;
    const auto scratch = lines_of(rows * kRowStride);
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.in.batch; ++b)
      for (std::int64_t e = 0; e < p.in.channels; e += kGroup)
        run(p, b, e, std::min(kGroup, p.in.channels - e), scratch[0].v);
  }
}

}  // namespace

void run_float_gated_scan(const FloatGatedScanForward& p) {
  for_each_group(LRNN_OF_MACHINE(run), p, 4 * kTile);
}
void run_float_gated_scan_backward(const FloatGatedScanBackward& p) {
  for_each_group(LRNN_OF_MACHINE(run_backward), p, 7 * kSpan);
}

}  // namespace lrnn::cpu
