/// The arithmetic of `sample` and `argmax`, shared by both backends so that they choose alike. No
/// expression here has a sum of a rounded product, which one compiler would fuse and another not.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/sample.hpp"

namespace lrnn::detail {

LRNN_HOST_DEVICE inline std::uint32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  return std::bit_cast<std::uint32_t>(v);
#endif
}
LRNN_HOST_DEVICE inline float bits_float(std::uint32_t v) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(v);
#else
  return std::bit_cast<float>(v);
#endif
}

/// Orders as the numbers do. NaN is minus infinity; the two zeros are equal.
LRNN_HOST_DEVICE inline std::uint32_t ordered_key(float v) {
  std::uint32_t bits = float_bits(v);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) bits = 0xFF800000U;
  if (bits == 0x80000000U) bits = 0;
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
LRNN_HOST_DEVICE inline float value_of_key(std::uint32_t key) {
  return bits_float((key & 0x80000000U) != 0 ? key & 0x7FFFFFFFU : ~key);
}
inline constexpr std::uint32_t kKeyOfMinusInfinity = 0x007FFFFFU;

/// The greater of two is that with the greater key, or with the lower index if the keys are equal.
LRNN_HOST_DEVICE inline std::uint64_t pack_candidate(std::uint32_t key, std::uint32_t index) {
  return (std::uint64_t{key} << 32) | (0xFFFFFFFFU - index);
}
/// Index of the best candidate; 0 if nothing is above minus infinity.
LRNN_HOST_DEVICE inline std::int32_t index_of_best(std::uint64_t best) {
  if (static_cast<std::uint32_t>(best >> 32) <= kKeyOfMinusInfinity) return 0;
  return static_cast<std::int32_t>(0xFFFFFFFFU - static_cast<std::uint32_t>(best));
}

/// Distances from the best token are in units of 2^-kDistanceBits bits.
inline constexpr int kDistanceBits = 26;
/// Weights are in units of 2^-kWeightBits of the weight of the best token.
inline constexpr int kWeightBits = 40;
/// Tokens at this distance or beyond have no weight.
inline constexpr std::uint32_t kDistanceEnd = static_cast<std::uint32_t>(kWeightBits)
                                              << kDistanceBits;

/// SampleOptions in the form that the rows are processed with.
struct SamplePlan {
  bool greedy = false;
  bool has_top_p = false;
  std::uint64_t top_p = 0;                    ///< in units of 2^-64
  std::int64_t top_k = 0;                     ///< 0: no limit
  std::uint32_t distance_end = kDistanceEnd;  ///< tokens below it pass min_p and have weight
  float distance_per_logit = 0;
  float penalty = 1;
  float inverse_penalty = 1;
};

inline SamplePlan plan_of(const SampleOptions& o) {
  SamplePlan plan;
  plan.greedy = o.temperature == 0.0 || o.top_k == 1;
  plan.has_top_p = o.top_p < 1.0;
  if (plan.has_top_p) plan.top_p = static_cast<std::uint64_t>(std::ldexp(o.top_p, 64));
  plan.top_k = o.top_k;
  if (o.min_p > 0.0) {
    const double distance = std::floor(std::ldexp(-std::log2(o.min_p), kDistanceBits));
    if (distance < static_cast<double>(kDistanceEnd - 1))
      plan.distance_end = static_cast<std::uint32_t>(distance) + 1;
  }
  if (!plan.greedy) {
    constexpr double kLn2 = 0.69314718055994530942;
    const double scale = std::ldexp(1.0, kDistanceBits) / (o.temperature * kLn2);
    plan.distance_per_logit = static_cast<float>(scale < 1e38 ? scale : 1e38);
  }
  plan.penalty = static_cast<float>(o.repetition_penalty);
  plan.inverse_penalty = static_cast<float>(1.0 / o.repetition_penalty);
  return plan;
}

LRNN_HOST_DEVICE inline bool is_seen(const std::int32_t* seen, std::int64_t token) {
  return ((static_cast<std::uint32_t>(seen[token >> 5]) >> (token & 31)) & 1U) != 0;
}

/// Key of a logit after the repetition penalty. `seen` is the mask of the row, or null.
LRNN_HOST_DEVICE inline std::uint32_t penalised_key(float logit, const std::int32_t* seen,
                                                    std::int64_t token, const SamplePlan& plan) {
  if (seen != nullptr && is_seen(seen, token))
    logit = logit * (logit > 0.0F ? plan.inverse_penalty : plan.penalty);
  return ordered_key(logit);
}

LRNN_HOST_DEVICE inline std::uint32_t distance_of(std::uint32_t best, std::uint32_t key,
                                                  const SamplePlan& plan) {
  if (key == best) return 0;
  const float distance = (value_of_key(best) - value_of_key(key)) * plan.distance_per_logit;
  return distance < 0x1p32F ? static_cast<std::uint32_t>(distance) : 0xFFFFFFFFU;
}

/// 2^-distance in units of 2^-kWeightBits, at least 1; for distances below kDistanceEnd.
LRNN_HOST_DEVICE inline std::uint64_t weight_of(std::uint32_t distance) {
  const int whole = static_cast<int>(distance >> kDistanceBits);
  const auto fraction = static_cast<float>(distance & ((1U << kDistanceBits) - 1U));
  const float g = fraction * 0x1p-26F - 0.5F;  // exact product: the same with and without fusing
  // sqrt(1/2) 2^-g: Taylor series to g^7, error 5e-9 for |g| <= 1/2.
  float p = -1.0785312e-5F;
  p = fmaf(p, g, 1.0891941e-4F);
  p = fmaf(p, g, -9.4282494e-4F);
  p = fmaf(p, g, 6.8010443e-3F);
  p = fmaf(p, g, -3.9247332e-2F);
  p = fmaf(p, g, 1.6986579e-1F);
  p = fmaf(p, g, -4.9012907e-1F);
  p = fmaf(p, g, 7.0710678e-1F);
  const std::uint64_t weight = static_cast<std::uint64_t>(p * 0x1p40F) >> whole;
  return weight > 0 ? weight : 1;
}

/// High 64 bits of the product.
LRNN_HOST_DEVICE inline std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t a_low = a & 0xFFFFFFFFU;
  const std::uint64_t a_high = a >> 32;
  const std::uint64_t b_low = b & 0xFFFFFFFFU;
  const std::uint64_t b_high = b >> 32;
  const std::uint64_t cross = a_high * b_low + ((a_low * b_low) >> 32);
  const std::uint64_t low_cross = a_low * b_high + (cross & 0xFFFFFFFFU);
  return a_high * b_high + (cross >> 32) + (low_cross >> 32);
}

/// Weight that top_p must keep of `total`.
LRNN_HOST_DEVICE inline std::uint64_t top_p_target(const SamplePlan& plan, std::uint64_t total) {
  const std::uint64_t target = multiply_high(plan.top_p, total);
  return target > 0 ? target : 1;
}

/// A number in [0, total).
LRNN_HOST_DEVICE inline std::uint64_t draw(std::uint64_t seed, std::uint64_t row,
                                           std::uint64_t counter, std::uint64_t total) {
  const PhiloxBlock block = philox(seed, counter, row);
  return multiply_high((std::uint64_t{block.v[1]} << 32) | block.v[0], total);
}

}  // namespace lrnn::detail
