#include "selective_scan_float.hpp"

#include <algorithm>
#include <omp.h>
#include <vector>

#include "lrnn/ops/selective_scan.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define LRNN_X86_TARGETS 1
#else
#define LRNN_X86_TARGETS 0
#endif
#ifdef __clang__
#define LRNN_PRAGMA(x) _Pragma(#x)
#define LRNN_BEGIN_TARGET(isa) \
  LRNN_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LRNN_END_TARGET LRNN_PRAGMA(clang attribute pop)
#define LRNN_UNROLL LRNN_PRAGMA(clang loop unroll(full))
#else
#define LRNN_PRAGMA(x) _Pragma(#x)
#define LRNN_BEGIN_TARGET(isa) LRNN_PRAGMA(GCC push_options) LRNN_PRAGMA(GCC target(isa))
#define LRNN_END_TARGET LRNN_PRAGMA(GCC pop_options)
#define LRNN_UNROLL LRNN_PRAGMA(GCC unroll 8)
#endif

namespace lrnn::cpu {
namespace {

constexpr int kFloatChannels = 16;  // of a work item: a cache line

// Scratch comes in cache lines, so that no vector lies across two.
struct alignas(64) Line {
  float v[16];
};
// Between buffers that are read and one that is written at the same time: loads wait for a store
// whose address is a multiple of 4 KiB away.
constexpr std::int64_t kFloatSkew = 192;
std::vector<Line> lines_of(std::int64_t floats) {
  return std::vector<Line>(static_cast<std::size_t>((floats + 15) / 16));
}

#define LRNN_LANES 4
#define LRNN_ISA baseline
#define LRNN_MAX(a, b) ((a) > (b) ? (a) : (b))
#include "selective_scan_float_kernel.hpp"
#include "selective_scan_float_backward_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX

#if LRNN_X86_TARGETS
LRNN_BEGIN_TARGET("avx2,fma")
#define LRNN_LANES 8
#define LRNN_ISA avx2
#define LRNN_MAX(a, b) _mm256_max_ps(a, b)
#include "selective_scan_float_kernel.hpp"
#include "selective_scan_float_backward_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
LRNN_END_TARGET
LRNN_BEGIN_TARGET("avx512f,fma")
#define LRNN_LANES 16
#define LRNN_ISA avx512
#define LRNN_MAX(a, b) _mm512_max_ps(a, b)
#include "selective_scan_float_kernel.hpp"
#include "selective_scan_float_backward_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
LRNN_END_TARGET
#endif

struct Passes {
  void (*forward)(const FloatScan&, std::int64_t, std::int64_t, std::int64_t, float*);
  void (*backward)(const FloatScanBackward&, std::int64_t, std::int64_t, float*);
};

const Passes& passes_of_machine() {
  static const Passes passes = [] {
#if LRNN_X86_TARGETS
    if (__builtin_cpu_supports("avx512f")) return Passes{avx512::run, avx512::run_backward};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Passes{avx2::run, avx2::run_backward};
#endif
    return Passes{baseline::run, baseline::run_backward};
  }();
  return passes;
}

// Floats that the widest vectors take; see Work.
std::int64_t backward_scratch(std::int64_t dstate) {
  constexpr std::int64_t kVectors = (kSelectiveScanChunk + 1) + 3 * kSelectiveScanChunk;
  return 3 * kFloatGroup * dstate + 2 * kFloatGroup + kVectors * dstate * kFloatChannels +
         2 * kSelectiveScanChunk * kFloatChannels + kFloatSkew;
}

}  // namespace

void run_float_scan(const FloatScan& p) {
  const auto run = passes_of_machine().forward;
  // Groups that a thread takes through time together: as many as leave every thread some, up to a
  // width whose states stay in the first cache. Groups know nothing of each other, nor do the bits.
  constexpr std::int64_t kMostGroups = 8;
  const std::int64_t all = (p.channels + kFloatChannels - 1) / kFloatChannels;
  const std::int64_t share = p.batch * all / omp_get_max_threads();
  const std::int64_t groups = std::clamp<std::int64_t>(share, 1, std::min(all, kMostGroups));
#pragma omp parallel
  {
    std::vector<Line> scratch = lines_of(groups * 2 * kFloatChannels * p.dstate);
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t g = 0; g < all; g += groups)
        run(p, b, g * kFloatChannels, std::min(groups, all - g), scratch.front().v);
  }
}

void run_float_scan_backward(const FloatScanBackward& p) {
  const auto run = passes_of_machine().backward;
#pragma omp parallel
  {
    std::vector<Line> scratch = lines_of(backward_scratch(p.in.dstate));
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.in.batch; ++b)
      for (std::int64_t group = 0; group < p.groups; ++group) run(p, b, group, scratch.front().v);
  }
}

}  // namespace lrnn::cpu
