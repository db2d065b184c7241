// See common/isa.hpp. LRNN_MAX(a, b) and LRNN_MIN(a, b) are b if one is NaN.
#define LRNN_LANES 4
#define LRNN_ISA baseline
#define LRNN_MAX(a, b) ((a) > (b) ? (a) : (b))
#define LRNN_MIN(a, b) ((a) < (b) ? (a) : (b))
#define LRNN_SQRT(a) each_root(a)
#include "common/vector_float.hpp"
#include LRNN_KERNELS
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
#undef LRNN_MIN
#undef LRNN_SQRT

#if LRNN_X86_TARGETS
LRNN_BEGIN_TARGET("avx2,fma")
#define LRNN_LANES 8
#define LRNN_ISA avx2
#define LRNN_MAX(a, b) _mm256_max_ps(a, b)
#define LRNN_MIN(a, b) _mm256_min_ps(a, b)
#define LRNN_SQRT(a) _mm256_sqrt_ps(a)
#include "common/vector_float.hpp"
#include LRNN_KERNELS
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
#undef LRNN_MIN
#undef LRNN_SQRT
LRNN_END_TARGET
LRNN_BEGIN_TARGET("avx512f,avx512dq,fma")
#define LRNN_LANES 16
#define LRNN_ISA avx512
#define LRNN_MAX(a, b) _mm512_max_ps(a, b)
#define LRNN_MIN(a, b) _mm512_min_ps(a, b)
#define LRNN_SQRT(a) _mm512_sqrt_ps(a)
#include "common/vector_float.hpp"
#include LRNN_KERNELS
#undef LRNN_LANES
#undef LRNN_ISA
#undef LRNN_MAX
#undef LRNN_MIN
#undef LRNN_SQRT
LRNN_END_TARGET
#endif
