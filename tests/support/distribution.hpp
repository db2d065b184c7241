/// Judging random initial values by range, moments and distribution function.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace lrnn::testing {

/// Kolmogorov's distance from the sorted values to the distribution function `cdf`, times sqrt(n).
/// It exceeds kKolmogorov with a chance of 1e-4.
inline constexpr double kKolmogorov = 2.23;
template <class Cdf>
double kolmogorov(const std::vector<double>& sorted, Cdf&& cdf) {
  const auto n = static_cast<double>(sorted.size());
  double distance = 0;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    const double p = cdf(sorted[i]);
    distance =
        std::max({distance, p - static_cast<double>(i) / n, static_cast<double>(i + 1) / n - p});
  }
  return distance * std::sqrt(n);
}

inline double mean_of(const std::vector<double>& v) {
  double sum = 0;
  for (const double e : v) sum += e;
  return sum / static_cast<double>(v.size());
}
inline double variance_of(const std::vector<double>& v) {
  const double mean = mean_of(v);
  double sum = 0;
  for (const double e : v) sum += (e - mean) * (e - mean);
  return sum / static_cast<double>(v.size());
}

/// Each check has a chance of about 1e-4 to fail for true draws from U(low, high).
inline void expect_uniform(std::vector<double> v, double low, double high,
                           const std::string& what) {
  const auto n = static_cast<double>(v.size());
  const double width = high - low;
  std::sort(v.begin(), v.end());
  EXPECT_GE(v.front(), low - 1e-12) << what;
  EXPECT_LE(v.back(), high + 1e-12) << what;
  EXPECT_LE(v.front(), low + 10 * width / n) << what;
  EXPECT_GE(v.back(), high - 10 * width / n) << what;
  EXPECT_NEAR(mean_of(v), (low + high) / 2, 4 * width / std::sqrt(12 * n)) << what;
  // The variance of (u - 1/2)^2 is 1/180.
  EXPECT_NEAR(variance_of(v), width * width / 12, 4 * width * width / std::sqrt(180 * n)) << what;
  EXPECT_LT(kolmogorov(v, [&](double x) { return (x - low) / width; }), kKolmogorov) << what;
}

/// The same for N(0, stddev^2).
inline void expect_normal(std::vector<double> v, double stddev, const std::string& what) {
  const auto n = static_cast<double>(v.size());
  std::sort(v.begin(), v.end());
  EXPECT_NEAR(mean_of(v), 0.0, 4 * stddev / std::sqrt(n)) << what;
  // The variance of a squared standard normal number is 2.
  EXPECT_NEAR(variance_of(v) / (stddev * stddev), 1.0, 4 * std::sqrt(2 / n)) << what;
  const auto cdf = [&](double x) { return 0.5 * std::erfc(-x / (stddev * std::numbers::sqrt2)); };
  EXPECT_LT(kolmogorov(v, cdf), kKolmogorov) << what;
}

}  // namespace lrnn::testing
