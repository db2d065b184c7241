#include "diagonal_scan_float.hpp"

#include "lrnn/ops/diagonal_scan.hpp"

#include "common/exponential.hpp"
#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kChunk = kDiagonalScanChunk;

#define LRNN_KERNELS "diagonal_scan_float_kernel.hpp"
#include "common/each_isa.hpp"

// Items of some lanes of a sequence.
template <class Run, class Args>
void for_each_item(Run run, const Args& p) {
  const std::int64_t items = (p.in.lanes + kDiagonalLanes - 1) / kDiagonalLanes;
#pragma omp parallel for collapse(2)
  for (std::int64_t b = 0; b < p.in.batch; ++b)
    for (std::int64_t item = 0; item < items; ++item) run(p, b, item);
}

}  // namespace

void run_float_diagonal(const FloatDiagonalForward& p) {
  for_each_item(LRNN_OF_MACHINE(run), p);
}
void run_float_diagonal_backward(const FloatDiagonalBackward& p) {
  for_each_item(LRNN_OF_MACHINE(run_backward), p);
}

}  // namespace lrnn::cpu
