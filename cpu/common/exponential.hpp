/// Exponentials in double by polynomials, with errors of about a unit in the last place. Without
/// branches or calls, so that compilers vectorise loops over them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace lrnn::cpu {
namespace detail {

/// Added, rounds what is below 2^51 to an integer, which the low bits of the sum then hold.
inline constexpr double kRound = 6755399441055744.0;

/// From the highest coefficient down.
template <std::size_t n>
constexpr double polynomial(double x, const double (&c)[n]) {
  double p = c[0];
  for (std::size_t i = 1; i < n; ++i) p = p * x + c[i];
  return p;
}

inline constexpr double kExp[] = {1.0 / 479001600,
                                  1.0 / 39916800,
                                  1.0 / 3628800,
                                  1.0 / 362880,
                                  1.0 / 40320,
                                  1.0 / 5040,
                                  1.0 / 720,
                                  1.0 / 120,
                                  1.0 / 24,
                                  1.0 / 6,
                                  1.0 / 2,
                                  1.0,
                                  1.0};
/// sin(x) / x and cos(x) in x^2.
inline constexpr double kSin[] = {
    -1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
    -1.0 / 5040,          1.0 / 120,        -1.0 / 6,        1.0};
inline constexpr double kCos[] = {1.0 / 20922789888000,
                                  -1.0 / 87178291200,
                                  1.0 / 479001600,
                                  -1.0 / 3628800,
                                  1.0 / 40320,
                                  -1.0 / 720,
                                  1.0 / 24,
                                  -1.0 / 2,
                                  1.0};

}  // namespace detail

/// e^x, where it neither overflows nor underflows by far; what lies outside of e^+-700 is put
/// there.
inline double exponential(double x) {
  constexpr double kLog2e = 1.4426950408889634;
  constexpr double kLn2 = 0.693147180369123816490;  // ends in zeros: its products here are exact
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  const double low = x < -700.0 ? -700.0 : x;
  const double v = low > 700.0 ? 700.0 : low;
  const double n = v * kLog2e + detail::kRound;
  const double k = n - detail::kRound;
  const double p = detail::polynomial((v - k * kLn2) - k * kLn2Low, detail::kExp);
  return std::bit_cast<double>(std::bit_cast<std::int64_t>(p) +
                               (std::bit_cast<std::int64_t>(n) << 52));
}

struct SinCos {
  double sin, cos;
};
/// Of an angle in turns, below 2^49.
inline SinCos sin_cos_of_turns(double turns) {
  constexpr double kQuarter = 1.5707963267948966;
  const double n = 4.0 * turns + detail::kRound;
  const std::int64_t quarter = std::bit_cast<std::int64_t>(n);
  const double x = kQuarter * (4.0 * turns - (n - detail::kRound));
  const double s = x * detail::polynomial(x * x, detail::kSin);
  const double c = detail::polynomial(x * x, detail::kCos);
  const bool odd = (quarter & 1) != 0;
  const double sin = odd ? c : s;
  const double cos = odd ? s : c;
  return {.sin = (quarter & 2) != 0 ? -sin : sin, .cos = ((quarter + 1) & 2) != 0 ? -cos : cos};
}

}  // namespace lrnn::cpu
