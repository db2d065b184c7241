/// Kernels in float compiled for several instruction sets in one object, the machine's picked at
/// run time:
///
///     #define LRNN_KERNELS "some_kernel.hpp"
///     #include "common/each_isa.hpp"
///
/// inside a namespace without name includes common/vector_float.hpp and LRNN_KERNELS once per
/// instruction set, in the namespaces baseline, avx2 and avx512, and LRNN_OF_MACHINE(f) is the f of
/// the best of them. Such files have no include guard. They use no template and no inline function
/// from elsewhere: the linker might keep a copy for the wrong instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define LRNN_X86_TARGETS 1
#else
#define LRNN_X86_TARGETS 0
#endif
#ifdef __has_feature
#define LRNN_SANITIZED __has_feature(address_sanitizer)
#else
#define LRNN_SANITIZED 0
#endif
#define LRNN_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define LRNN_BEGIN_TARGET(isa) \
  LRNN_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LRNN_END_TARGET LRNN_PRAGMA(clang attribute pop)
#define LRNN_UNROLL LRNN_PRAGMA(clang loop unroll(full))
#else
#define LRNN_BEGIN_TARGET(isa) LRNN_PRAGMA(GCC push_options) LRNN_PRAGMA(GCC target(isa))
#define LRNN_END_TARGET LRNN_PRAGMA(GCC pop_options)
#define LRNN_UNROLL LRNN_PRAGMA(GCC unroll 8)
#endif
#if LRNN_SANITIZED  // what checks every access of an unrolled kernel compiles for many minutes
#undef LRNN_UNROLL
#define LRNN_UNROLL
#define LRNN_INLINE inline
#define LRNN_INLINE_LAMBDA
#else
#define LRNN_INLINE __attribute__((always_inline)) inline
#define LRNN_INLINE_LAMBDA __attribute__((always_inline))
#endif
/// A few vectors in turn, as many as the `count` of the function.
#define LRNN_EACH LRNN_UNROLL for (int j = 0; j < count; ++j)

#if LRNN_X86_TARGETS
#define LRNN_OF_MACHINE(f) \
  (::lrnn::cpu::has_avx512() ? avx512::f : ::lrnn::cpu::has_avx2() ? avx2::f : baseline::f)
#else
#define LRNN_OF_MACHINE(f) baseline::f
#endif

namespace lrnn::cpu {

#if LRNN_X86_TARGETS
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
}
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

/// While it lives, the thread takes what is below 2^-126 for zero: each operation on such a number
/// costs the processor more than 100 cycles, and a state that nothing drives passes through them.
class FlushDenormals {
#if LRNN_X86_TARGETS
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040U); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
#else
 public:
  FlushDenormals() {}
#endif
};

/// Scratch comes in cache lines, so that no vector lies across two.
struct alignas(64) Line {
  float v[16];
};
inline std::unique_ptr<Line[]> lines_of(std::int64_t floats) {
  return std::make_unique_for_overwrite<Line[]>(static_cast<std::size_t>((floats + 15) / 16));
}

}  // namespace lrnn::cpu
