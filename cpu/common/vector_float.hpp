// Vectors of LRNN_LANES floats and functions of them, once per instruction set: see common/isa.hpp.
namespace LRNN_ISA {

constexpr int kLanes = LRNN_LANES;
constexpr int kMost = 4;  // vectors that the functions below take at once

using Vec = float __attribute__((vector_size(sizeof(float) * kLanes)));
using Int = std::int32_t __attribute__((vector_size(sizeof(float) * kLanes)));

constexpr float kLog2e = 1.4426950408889634F;

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
// `count` <= kLanes floats; the rest is zero.
inline Vec load_some(const float* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
  float v[kLanes] = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return load(v);
}
inline void store_some(float* p, Vec v, std::int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
// Between rows of tensors and a dense tile of rows. Rows are walked along:
// one column of many rows after the other takes several times as long, as rows meet in few sets of
// the caches and each is on a page of its own. Columns of the tile beyond `count` are zero.
inline void copy_in(const float* rows, std::int64_t stride, std::int64_t tokens, std::int64_t count,
                    float* tile, std::int64_t tile_stride) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    __builtin_memcpy(tile + t * tile_stride, rows + t * stride,
                     static_cast<std::size_t>(count) * sizeof(float));
    for (std::int64_t i = count; i % kLanes != 0; ++i) tile[t * tile_stride + i] = 0.0F;
  }
}
inline void copy_out(const float* tile, std::int64_t tile_stride, std::int64_t tokens,
                     std::int64_t count, float* rows, std::int64_t stride) {
  for (std::int64_t t = 0; t < tokens; ++t)
    __builtin_memcpy(rows + t * stride, tile + t * tile_stride,
                     static_cast<std::size_t>(count) * sizeof(float));
}
// For rows further apart than pages are long, where the hardware fetches none ahead.
inline void prefetch_rows(const float* p, std::int64_t stride, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) __builtin_prefetch(p + r * stride);
}
#if LRNN_LANES == 4
inline Vec each_root(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return a * b + c;
}
#elif LRNN_LANES == 8  // with one rounding
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
#else
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
#endif
// Bounds keep NaN.
inline Vec at_least(Vec v, float low) {
  return LRNN_MAX(low - Vec{}, v);
}
inline Vec at_most(Vec v, float high) {
  return LRNN_MIN(high - Vec{}, v);
}
inline bool all_at_least(Vec v, float low) {
#if LRNN_LANES == 16
  return _mm512_cmp_ps_mask(v, low - Vec{}, _CMP_LT_OQ) == 0;
#elif LRNN_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(v, low - Vec{}, _CMP_LT_OQ)) == 0;
#else
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all = all && !(v[i] < low);
  return all;
#endif
}

// p := the polynomial in f with these coefficients, from the highest down. Each step for all
// `count` before the next: compilers keep this order, and the scheduler of a processor sees too few
// instructions to find it.
LRNN_INLINE void polynomial(Vec* p, const Vec* f, const int count, const float* c,
                            const int coefficients) {
  LRNN_EACH p[j] = f[j] * c[0] + c[1];
  LRNN_UNROLL
  for (int k = 2; k < coefficients; ++k) LRNN_EACH p[j] = p[j] * f[j] + c[k];
}

// Adds two sums over lanes of each of 2 `count` vectors to `sums`: those of v[i] and v[kMost + i]
// at 4 i, in turn. `count` is kMost, 1 or, with AVX2, 2.
LRNN_INLINE void add_lanes(const Vec* v, float* sums, const int count) {
  if (count == 1) {
    for (int l = 0; l < kLanes; ++l) {
      sums[l % 2] += v[0][l];
      sums[2 + l % 2] += v[kMost][l];
    }
    return;
  }
#if LRNN_LANES == 16
  Vec quarter[2];  // a vector's sums are a quarter of it
  LRNN_UNROLL
  for (int k = 0; k < 2; ++k) {
    Vec half[2];
    LRNN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Vec a = v[4 * k + 2 * i];
      const Vec b = v[4 * k + 2 * i + 1];
      half[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE);
    }
    quarter[k] =
        _mm512_shuffle_f32x4(half[0], half[1], 0x88) + _mm512_shuffle_f32x4(half[0], half[1], 0xDD);
  }
  store(sums, load(sums) + (_mm512_shuffle_ps(quarter[0], quarter[1], 0x44) +
                            _mm512_shuffle_ps(quarter[0], quarter[1], 0xEE)));
#elif LRNN_LANES == 8
  LRNN_UNROLL
  for (int i = 0; i < count; i += 2) {
    Vec half[2];
    LRNN_UNROLL
    for (int k = 0; k < 2; ++k) {
      const Vec a = v[k * kMost + i];
      const Vec b = v[k * kMost + i + 1];
      half[k] = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
    }
    store(sums + 4 * i, load(sums + 4 * i) + (_mm256_shuffle_ps(half[0], half[1], 0x44) +
                                              _mm256_shuffle_ps(half[0], half[1], 0xEE)));
  }
#else
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < 2; ++k) {
      sums[4 * i + k] += v[i][k] + v[i][k + 2];
      sums[4 * i + 2 + k] += v[kMost + i][k] + v[kMost + i][k + 2];
    }
#endif
}

// exp2_split(): x := 2^(k + f), where `rounded` is k + kRound, whose low bits select a power from a
// table of a register or two where there are instructions for that.
#if LRNN_LANES == 16
// Rounds to the nearest 32nd what is below 2^17 in magnitude; the low bits count them.
constexpr float kRound = 393216.0F;
alignas(64) constexpr float kPowers[32] = {
    1.0F,        1.0218972F,  1.04427373F, 1.06714046F, 1.09050775F, 1.1143868F,  1.13878858F,
    1.1637249F,  1.18920708F, 1.21524739F, 1.24185777F, 1.26905096F, 1.29683959F, 1.32523668F,
    1.35425556F, 1.38390994F, 1.41421354F, 1.44518077F, 1.47682619F, 1.50916445F, 1.54221082F,
    1.5759809F,  1.61049032F, 1.64575553F, 1.68179286F, 1.71861935F, 1.75625217F, 1.79470909F,
    1.8340081F,  1.87416768F, 1.91520655F, 1.95714414F};

// Relative error of the polynomial 5e-8 on |f| <= 1/64. Fewer instructions than a polynomial for
// all of [0, 1], and a chain half as long.
LRNN_INLINE void exp2_split(Vec* x, const Vec* rounded, const Vec* f, const int count) {
  Vec power[kMost];
  Vec p[kMost];
  LRNN_EACH power[j] = _mm512_permutex2var_ps(load(kPowers), reinterpret_cast<__m512i>(rounded[j]),
                                              load(kPowers + kLanes));
  constexpr float kSeries[] = {2.40226507e-1F, 6.93157345e-1F};
  polynomial(p, f, count, kSeries, 2);
  LRNN_EACH p[j] = (power[j] * f[j]) * p[j] + power[j];
  LRNN_EACH x[j] = _mm512_scalef_ps(p[j], rounded[j] - kRound);
}
#elif LRNN_LANES == 8
// Rounds to the nearest eighth what is below 2^19 in magnitude; the low bits count them.
constexpr float kRound = 1572864.0F;

// Relative error of the polynomial 3e-8 on |f| <= 1/16. Additions and the look-up leave the two
// units that multiply free.
LRNN_INLINE void exp2_split(Vec* x, const Vec* rounded, const Vec* f, const int count) {
  // 2^(i / 8) less the bits that i adds to its mantissa.
  const Int table = {0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7,
                     0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7};
  Vec p[kMost];
  LRNN_EACH {
    const Int n = reinterpret_cast<Int>(rounded[j]);
    const auto power =
        _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(n));
    x[j] = reinterpret_cast<Vec>(reinterpret_cast<Int>(power) + (n << 20));
  }
  constexpr float kSeries[] = {5.54886982e-2F, 2.40257546e-1F, 6.93147242e-1F};
  polynomial(p, f, count, kSeries, 3);
  LRNN_EACH x[j] += (x[j] * f[j]) * p[j];
}
#else
// Rounds to the nearest integer what is below 2^22 in magnitude, which its low bits then hold.
constexpr float kRound = 12582912.0F;

// p 2^n, where n is in the low bits of `rounded`.
inline Vec scale(Vec p, Vec rounded) {
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(p) + (reinterpret_cast<Int>(rounded) << 23));
}
// Relative error of the polynomial 2e-9 on |f| <= 1/2.
LRNN_INLINE void exp2_split(Vec* x, const Vec* rounded, const Vec* f, const int count) {
  Vec p[kMost];
  constexpr float kSeries[] = {1.5353362e-4F, 1.3398874e-3F, 9.618437e-3F, 5.5503324e-2F,
                               2.4022648e-1F, 6.931472e-1F,  1.0F};
  polynomial(p, f, count, kSeries, 7);
  LRNN_EACH x[j] = scale(p[j], rounded[j]);
}
#endif

// A product that compilers do not fuse with the addition it goes into. With AVX2 additions have a
// unit that multiplications lack: of exponents, half are multiplied first.
inline Vec unfused(Vec v) {
#if LRNN_LANES == 8
  asm("" : "+x"(v));
#endif
  return v;
}

// Where exp2_of_negative() stops; nothing lies below if its `in_range`, a constant.
constexpr float kLeastExponent = -125.0F;

// x := 2^x for x <= 0, 2^-125 for all below.
LRNN_INLINE void exp2_of_negative(Vec* x, const int count, const bool in_range) {
  Vec rounded[kMost];
  Vec f[kMost];
  LRNN_EACH {
    const Vec v = in_range ? x[j] : at_least(x[j], kLeastExponent);
    rounded[j] = v + kRound;
    f[j] = v - (rounded[j] - kRound);
  }
  exp2_split(x, rounded, f, count);
}
// x := e^x for x in [-86, 86].
LRNN_INLINE void exp_in_range(Vec* x, const int count) {
  Vec rounded[kMost];
  Vec f[kMost];
#if LRNN_LANES == 4  // ln 2 in two parts; relative error of the polynomial 5e-11
  Vec p[kMost];
  LRNN_EACH {
    rounded[j] = x[j] * kLog2e + kRound;
    const Vec k = rounded[j] - kRound;
    f[j] = (x[j] - k * 0.693359375F) + k * 2.12194440e-4F;
  }
  constexpr float kSeries[] = {1.9767632e-4F, 1.3945906e-3F, 8.333569e-3F, 4.1666273e-2F,
                               1.6666666e-1F, 0.5F,          1.0F,         1.0F};
  polynomial(p, f, count, kSeries, 8);
  LRNN_EACH x[j] = scale(p[j], rounded[j]);
#else  // f keeps what the product with log2(e) rounds off, and what its last bits lack
  LRNN_EACH {
    rounded[j] = multiply_add(x[j], kLog2e - Vec{}, kRound - Vec{});
    f[j] = multiply_add(x[j], kLog2e - Vec{}, kRound - rounded[j]);
    f[j] += x[j] * 1.92596303e-8F;
  }
  exp2_split(x, rounded, f, count);
#endif
}

// x := e^x.
LRNN_INLINE void exp(Vec* x, const int count) {
  LRNN_EACH x[j] = at_most(at_least(x[j], -86.0F), 86.0F);
  exp_in_range(x, count);
}
// x := e^-|x|.
LRNN_INLINE void exp_of_magnitude(Vec* x, const int count) {
  LRNN_EACH {
    const Int negative = reinterpret_cast<Int>(x[j]) | INT32_MIN;
    x[j] = at_least(reinterpret_cast<Vec>(negative), -86.0F);
  }
  exp_in_range(x, count);
}

// x := max(x, 0) + log1p(e), given e = exp(-|x|), by log1p(e) = 2 atanh(s), s = e / (2 + e): a
// polynomial in s^2 <= 1/9 with relative error 4e-9.
LRNN_INLINE void softplus(Vec* x, const Vec* e, const int count) {
  Vec s[kMost];
  Vec w[kMost];
  Vec p[kMost];
  LRNN_EACH s[j] = e[j] / (2.0F + e[j]);
  LRNN_EACH w[j] = s[j] * s[j];
  constexpr float kSeries[] = {0.281577784F, 0.279651577F, 0.400245952F, 0.666663216F, 2.0F};
  polynomial(p, w, count, kSeries, 5);
  LRNN_EACH x[j] = p[j] * s[j] + at_least(x[j], 0.0F);
}
LRNN_INLINE void softplus(Vec* x, const int count) {
  Vec e[kMost];
  LRNN_EACH e[j] = x[j];
  exp_of_magnitude(e, count);
  softplus(x, e, count);
}
// x := 1 / (1 + e^-x), and what is left to 1, without cancellation.
LRNN_INLINE void sigmoid(Vec* x, Vec* rest, const int count) {
  LRNN_EACH rest[j] = -x[j];
  exp(rest, count);
  LRNN_EACH x[j] = 1.0F / (1.0F + rest[j]);
  LRNN_EACH rest[j] *= x[j];
}
LRNN_INLINE void sigmoid(Vec* x, const int count) {
  Vec rest[kMost];
  sigmoid(x, rest, count);
}
// x := sqrt(1 - e^2x) for x <= 0, given e^x. By its Taylor series to the 8th power where the
// difference would cancel: relative error 2^-8 / 9! there.
LRNN_INLINE void root_of_rest(Vec* x, const Vec* exp_x, const int count) {
  constexpr float kSeries[] = {1.0F / 40320, 1.0F / 5040, 1.0F / 720, 1.0F / 120,
                               1.0F / 24,    1.0F / 6,    1.0F / 2,   1.0F};
  Vec p[kMost];
  LRNN_EACH x[j] += x[j];
  polynomial(p, x, count, kSeries, 8);
  LRNN_EACH {
    const Vec rest = x[j] > -0.5F ? -x[j] * p[j] : 1.0F - exp_x[j] * exp_x[j];
    x[j] = LRNN_SQRT(rest);
  }
}

}  // namespace LRNN_ISA
