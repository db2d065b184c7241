#include "lrnn/train/lr_schedule.hpp"

#include <cmath>

#include <gtest/gtest.h>

#include "lrnn/core/error.hpp"

namespace lrnn {
namespace {

using enum LrScheduleKind;

TEST(LrSchedule, WarmUpRisesInEqualSteps) {
  for (const auto kind : {Constant, Linear, Cosine, Wsd}) {
    const LrSchedule s{.kind = kind, .lr = 0.5, .warmup_steps = 4, .total_steps = 20};
    for (int i = 0; i < 4; ++i) EXPECT_DOUBLE_EQ(s.at(i), 0.5 * (i + 1) / 5.0);
    EXPECT_DOUBLE_EQ(s.at(4), 0.5);
  }
}

TEST(LrSchedule, Constant) {
  const LrSchedule s{.lr = 0.25};
  for (const int step : {0, 1, 1000000}) EXPECT_EQ(s.at(step), 0.25);
}

TEST(LrSchedule, Linear) {
  const LrSchedule s{
      .kind = Linear, .lr = 2, .warmup_steps = 10, .total_steps = 110, .final_fraction = 0.1};
  EXPECT_DOUBLE_EQ(s.at(10), 2.0);
  EXPECT_DOUBLE_EQ(s.at(60), 1.1);
  EXPECT_DOUBLE_EQ(s.at(85), 0.65);
  EXPECT_DOUBLE_EQ(s.at(110), 0.2);
  EXPECT_DOUBLE_EQ(s.at(1000), 0.2);
}

// At one sixth, half and five sixths the cosine is sqrt(3)/2, 0 and -sqrt(3)/2.
TEST(LrSchedule, Cosine) {
  const LrSchedule s{
      .kind = Cosine, .lr = 1, .warmup_steps = 6, .total_steps = 66, .final_fraction = 0.2};
  EXPECT_NEAR(s.at(16), 0.2 + 0.4 * (1 + std::sqrt(0.75)), 1e-15);
  EXPECT_NEAR(s.at(36), 0.6, 1e-15);
  EXPECT_NEAR(s.at(56), 0.2 + 0.4 * (1 - std::sqrt(0.75)), 1e-15);
  EXPECT_DOUBLE_EQ(s.at(66), 0.2);
}

TEST(LrSchedule, WarmUpStableDecay) {
  const LrSchedule s{.kind = Wsd,
                     .lr = 1,
                     .warmup_steps = 10,
                     .total_steps = 100,
                     .decay_steps = 20,
                     .final_fraction = 0.5};
  for (const int step : {10, 50, 80}) EXPECT_DOUBLE_EQ(s.at(step), 1.0);
  EXPECT_DOUBLE_EQ(s.at(90), 0.75);
  EXPECT_DOUBLE_EQ(s.at(95), 0.625);
  EXPECT_DOUBLE_EQ(s.at(100), 0.5);
}

TEST(LrSchedule, NamesAndErrors) {
  for (const auto kind : {Constant, Linear, Cosine, Wsd})
    EXPECT_EQ(lr_schedule_kind(name_of(kind)), kind);
  EXPECT_THROW(static_cast<void>(lr_schedule_kind("cosin")), ConfigError);
  EXPECT_NO_THROW(LrSchedule{}.validate());
  EXPECT_THROW((LrSchedule{.lr = -1}.validate()), ConfigError);
  EXPECT_THROW((LrSchedule{.kind = Cosine}.validate()), ConfigError);
  EXPECT_THROW((LrSchedule{.kind = Wsd, .total_steps = 5, .decay_steps = 6}.validate()),
               ConfigError);
  EXPECT_THROW((LrSchedule{.warmup_steps = -1}.validate()), ConfigError);
  EXPECT_THROW((LrSchedule{.final_fraction = 2}.validate()), ConfigError);
}

}  // namespace
}  // namespace lrnn
