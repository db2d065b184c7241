#include "selective_scan_float.hpp"

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
#else
#define LRNN_PRAGMA(x) _Pragma(#x)
#define LRNN_BEGIN_TARGET(isa) LRNN_PRAGMA(GCC push_options) LRNN_PRAGMA(GCC target(isa))
#define LRNN_END_TARGET LRNN_PRAGMA(GCC pop_options)
#endif

namespace lrnn::cpu {
namespace {

constexpr int kFloatChannels = 16;  // of a work item: a cache line

#define LRNN_LANES 4
#define LRNN_ISA baseline
#define LRNN_MAX(a, b) ((a) > (b) ? (a) : (b))
#include "selective_scan_float_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX

#if LRNN_X86_TARGETS
LRNN_BEGIN_TARGET("avx2,fma")
#define LRNN_LANES 8
#define LRNN_ISA avx2
#define LRNN_MAX(a, b) _mm256_max_ps(a, b)
#include "selective_scan_float_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
LRNN_END_TARGET
LRNN_BEGIN_TARGET("avx512f,fma")
#define LRNN_LANES 16
#define LRNN_ISA avx512
#define LRNN_MAX(a, b) _mm512_max_ps(a, b)
#include "selective_scan_float_kernel.hpp"
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
LRNN_END_TARGET
#endif

using Run = void (*)(const FloatScan&, std::int64_t, std::int64_t, float*);

Run run_of_machine() {
#if LRNN_X86_TARGETS
  if (__builtin_cpu_supports("avx512f")) return avx512::run;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::run;
#endif
  return baseline::run;
}

}  // namespace

void run_float_scan(const FloatScan& p) {
  static const Run run = run_of_machine();
#pragma omp parallel
  {
    std::vector<float> scratch(static_cast<std::size_t>(2 * kFloatChannels * p.dstate));
#pragma omp for collapse(2) schedule(dynamic)
    for (std::int64_t b = 0; b < p.batch; ++b)
      for (std::int64_t first = 0; first < p.channels; first += kFloatChannels)
        run(p, b, first, scratch.data());
  }
}

}  // namespace lrnn::cpu
