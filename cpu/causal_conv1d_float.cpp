// Channels are the vector lanes. Work items are (sequence, group of channels); sums over time stay
// inside an item.
#include "causal_conv1d_float.hpp"

#include <algorithm>

#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kGroup = 256;  // channels of a work item
constexpr int kTile = 16;             // tokens that go through all of them before the next ones

// Floats of scratch for `count` channels of a group; see Taps.
std::int64_t scratch_size(std::int64_t width, std::int64_t count) {
  return (4 * width + 2 * (width - 1 + kTile)) * count;
}

#define LRNN_KERNELS "causal_conv1d_float_kernel.hpp"
#include "common/each_isa.hpp"

template <class Run, class Args>
void for_each_group(Run run, const Args& p) {
#pragma omp parallel
  {
    const FlushDenormals flush;
    const auto scratch = lines_of(scratch_size(p.in.width, kGroup));
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < p.in.batch; ++b)
      for (std::int64_t c = 0; c < p.in.channels; c += kGroup)
        run(p, b, c, std::min(kGroup, p.in.channels - c), scratch[0].v);
  }
}

}  // namespace

void run_float_conv(const FloatConvForward& p) {
  for_each_group(LRNN_OF_MACHINE(run), p);
}
void run_float_conv_backward(const FloatConvBackward& p) {
  for_each_group(LRNN_OF_MACHINE(run_backward), p);
}

}  // namespace lrnn::cpu
