#include "lrnn/core/random.hpp"

#include <cmath>

#include <gtest/gtest.h>

namespace lrnn {
namespace {

// Known answers published with the reference implementation of Random123 (philox4x32, 10 rounds).
TEST(Philox, KnownAnswers) {
  const PhiloxBlock zero = philox(0, 0, 0);
  EXPECT_EQ(zero.v[0], 0x6627e8d5U);
  EXPECT_EQ(zero.v[1], 0xe169c58dU);
  EXPECT_EQ(zero.v[2], 0xbc57ac4cU);
  EXPECT_EQ(zero.v[3], 0x9b00dbd8U);
  const PhiloxBlock ones = philox(~std::uint64_t{0}, ~std::uint64_t{0}, ~std::uint64_t{0});
  EXPECT_EQ(ones.v[0], 0x408f276dU);
  EXPECT_EQ(ones.v[1], 0x41c83b0eU);
  EXPECT_EQ(ones.v[2], 0xa20bc7c6U);
  EXPECT_EQ(ones.v[3], 0x6d5451fdU);
}

TEST(Rng, MomentsAndRange) {
  constexpr int kDraws = 100000;
  Rng rng(3, "moments");
  double sum = 0, squares = 0, normal = 0, normal_squares = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = rng.uniform();
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    squares += u * u;
    const double z = rng.normal();
    normal += z;
    normal_squares += z * z;
  }
  // Five standard errors.
  EXPECT_NEAR(sum / kDraws, 0.5, 5 * std::sqrt(1.0 / 12 / kDraws));
  EXPECT_NEAR(squares / kDraws, 1.0 / 3, 5 * std::sqrt(4.0 / 45 / kDraws));
  EXPECT_NEAR(normal / kDraws, 0.0, 5 / std::sqrt(kDraws));
  EXPECT_NEAR(normal_squares / kDraws, 1.0, 5 * std::sqrt(2.0 / kDraws));
}

TEST(Rng, NamesSelectIndependentStreams) {
  Rng a(1, "a"), again(1, "a"), b(1, "b"), other(2, "a");
  const auto first = a.bits();
  EXPECT_EQ(again.bits(), first);
  EXPECT_NE(b.bits(), first);
  EXPECT_NE(other.bits(), first);
}

TEST(Rng, DiscardSkipsWhatWouldHaveBeenDrawn) {
  for (std::uint64_t drawn = 0; drawn < 6; ++drawn)
    for (std::uint64_t skipped = 0; skipped < 11; ++skipped) {
      Rng serial(3, "stream");
      Rng jumped(3, "stream");
      for (std::uint64_t i = 0; i < drawn; ++i) {
        static_cast<void>(serial.bits());
        static_cast<void>(jumped.bits());
      }
      for (std::uint64_t i = 0; i < skipped; ++i) static_cast<void>(serial.bits());
      jumped.discard(skipped);
      for (int i = 0; i < 9; ++i)
        ASSERT_EQ(jumped.bits(), serial.bits()) << drawn << " drawn, " << skipped << " skipped";
    }
}

}  // namespace
}  // namespace lrnn
