#include "selective_scan_float.hpp"

#include <algorithm>
#include <omp.h>

#include "lrnn/ops/selective_scan.hpp"

#include "common/isa.hpp"

namespace lrnn::cpu {
namespace {

// Whose state and rate stay in the second cache: rows are read in pieces as long as can be.
constexpr std::int64_t kMostStates = std::int64_t{1} << 16;
constexpr int kFloatChannels = 16;  // of a group: a cache line
// In scratch: what a piece has there stays in the first cache.
constexpr int kFloatTile = 16;            // tokens
constexpr std::int64_t kFloatPiece = 64;  // channels

// Between buffers that are read and one that is written at the same time: loads wait for a store
// whose address is a multiple of 4 KiB away.
constexpr std::int64_t kFloatSkew = 192;
constexpr std::int64_t kFloatParts = 16;  // of dB and dC of a few tokens and a state
// Of rows of kFloatGroup channels in scratch: neighbours lie in different sets of the first cache.
constexpr std::int64_t kRowStride = kFloatGroup + kFloatChannels;
constexpr std::int64_t kPieceStride = kFloatPiece + kFloatChannels;  // likewise, of pieces
// Floats of a group in the backward pass; see Work.
std::int64_t group_scratch(std::int64_t dstate) {
  return 3 * kFloatGroup * dstate + 2 * kFloatGroup;
}

#define LRNN_KERNELS "selective_scan_float_backward_kernel.hpp"
#include "common/each_isa.hpp"

// Floats that a chunk of the widest vectors takes; see Work.
std::int64_t chunk_scratch(std::int64_t dstate) {
  constexpr std::int64_t kVectors = (kSelectiveScanChunk + 1) + 2 * kSelectiveScanChunk;
  return kVectors * dstate * kFloatChannels + 7 * kSelectiveScanChunk * kRowStride + kFloatSkew;
}

// Groups that a thread takes through time together: as many as leave every thread some, up to
// `most`. They know nothing of each other, nor do the bits.
std::int64_t groups_of_item(const FloatScan& p, std::int64_t groups, std::int64_t most) {
  const std::int64_t share = p.batch * groups / omp_get_max_threads();
  return std::clamp<std::int64_t>(share, 1, std::clamp<std::int64_t>(most, 1, groups));
}

}  // namespace

void run_float_scan(const FloatScan& p) {
  const auto run = LRNN_OF_MACHINE(run);
  const std::int64_t all = (p.channels + kFloatChannels - 1) / kFloatChannels;
  const std::int64_t groups = groups_of_item(p, all, kMostStates / (kFloatChannels * p.dstate));
#pragma omp parallel
  {
    const FlushDenormals flush;
    const auto scratch =
        lines_of(groups * 2 * kFloatChannels * (p.dstate + 1) + 3 * kFloatTile * kPieceStride);
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t g = 0; g < all; g += groups)
        run(p, b, g * kFloatChannels, std::min(groups, all - g), scratch[0].v);
  }
}

void run_float_scan_backward(const FloatScanBackward& p) {
  const auto run = LRNN_OF_MACHINE(run_backward);
  const std::int64_t groups =
      groups_of_item(p.in, p.groups, kMostStates / (kFloatGroup * p.in.dstate));
#pragma omp parallel
  {
    const FlushDenormals flush;
    const auto scratch = lines_of(groups * group_scratch(p.in.dstate) + chunk_scratch(p.in.dstate));
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.in.batch; ++b)
      for (std::int64_t g = 0; g < p.groups; g += groups)
        run(p, b, g, std::min(groups, p.groups - g), scratch[0].v);
  }
}

}  // namespace lrnn::cpu
