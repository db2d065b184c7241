#include "lrnn/ops/sample.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"

#include "ops/sample_math.hpp"

namespace lrnn {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<double> random_logits(std::int64_t n, double spread, std::uint64_t seed) {
  Rng rng(seed, "logits");
  std::vector<double> v(static_cast<std::size_t>(n));
  for (double& e : v) e = static_cast<double>(static_cast<float>(spread * rng.normal()));
  return v;
}

/// `draws` tokens from one distribution, one row each.
std::vector<std::int32_t> draw_many(Context& ctx, const std::vector<double>& logits,
                                    const SampleOptions& options, std::int64_t draws,
                                    std::uint64_t seed = 11) {
  const auto vocab_size = static_cast<std::int64_t>(logits.size());
  std::vector<double> rows;
  for (std::int64_t i = 0; i < draws; ++i) rows.insert(rows.end(), logits.begin(), logits.end());
  const Tensor all = ctx.from_host_as({draws, vocab_size}, DType::float32, rows);
  Tensor counters = ctx.zeros({draws}, DType::int64);
  Tensor ids = ctx.empty({draws}, DType::int32);
  sample_forward(
      ctx, {.logits = all, .options = options, .seed = seed, .counters = counters, .ids = ids});
  return ctx.to_host<std::int32_t>(ids);
}

/// Probabilities after the filters, in double, from their definition.
std::vector<double> expected_probabilities(const std::vector<double>& logits,
                                           const SampleOptions& o) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(logits.size(), 0.0);
  for (const std::size_t i : order) p[i] = std::exp((logits[i] - logits[order[0]]) / o.temperature);
  if (o.top_k > 0 && static_cast<std::size_t>(o.top_k) < order.size())
    order.resize(static_cast<std::size_t>(o.top_k));
  double total = 0;
  for (const std::size_t i : order) total += p[i];
  double sum = 0;
  std::size_t count = 0;
  while (count < order.size() && sum < o.top_p * total) sum += p[order[count++]];
  if (o.top_p < 1.0) order.resize(count);
  std::erase_if(order, [&](std::size_t i) { return p[i] < o.min_p; });
  total = 0;
  for (const std::size_t i : order) total += p[i];
  std::vector<double> out(logits.size(), 0.0);
  for (const std::size_t i : order) out[i] = p[i] / total;
  return out;
}

/// Frequencies agree with the probabilities, and nothing outside the support is drawn.
/// The statistic has mean (cells - 1) and variance about twice that; six deviations and a fixed
/// seed leave no room for chance.
void expect_distribution(Context& ctx, const std::vector<double>& logits,
                         const SampleOptions& options) {
  constexpr std::int64_t kDraws = 20000;
  const auto probabilities = expected_probabilities(logits, options);
  std::vector<double> counts(logits.size(), 0.0);
  for (const std::int32_t id : draw_many(ctx, logits, options, kDraws))
    counts.at(static_cast<std::size_t>(id)) += 1;
  double statistic = 0;
  double cells = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * kDraws;
    if (expected == 0.0) {
      EXPECT_EQ(counts[i], 0.0) << "token " << i << " is outside the support";
      continue;
    }
    if (expected > 20) {
      EXPECT_GT(counts[i], 0.0) << "token " << i << " is never drawn";
    }
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    cells += 1;
  }
  EXPECT_LE(statistic, cells - 1 + 6 * std::sqrt(2 * cells));
}

const std::vector<double> kLogits = {0.3, -1.0, 2.0, 1.5, -0.2, 0.9, 2.4, -3.0, 0.0, 1.1, 0.45};

const std::vector<SampleOptions> kOptions = {
    {},
    {.temperature = 0.5},
    {.temperature = 3.0},
    {.top_k = 2},
    {.top_k = 5},
    {.top_k = 100},
    {.top_p = 0.3},
    {.top_p = 0.8},
    {.top_p = 0.999},
    {.min_p = 0.2},
    {.min_p = 0.999},
    {.temperature = 1.3, .top_k = 7, .top_p = 0.9, .min_p = 0.05},
    {.temperature = 0.8, .top_k = 4, .top_p = 0.6},
};

TEST(Sample, FollowsTheDistribution) {
  Context ctx = Context::cpu();
  for (const SampleOptions& o : kOptions) {
    SCOPED_TRACE(
        detail::concat("T ", o.temperature, " k ", o.top_k, " p ", o.top_p, " m ", o.min_p));
    expect_distribution(ctx, kLogits, o);
  }
}

// Equal logits: the filters keep the lowest indices.
TEST(Sample, TiesKeepTheLowestIndices) {
  Context ctx = Context::cpu();
  const std::vector<double> equal(64, 1.25);
  expect_distribution(ctx, equal, {});
  expect_distribution(ctx, equal, {.top_k = 5});
  expect_distribution(ctx, equal, {.top_p = 0.5});  // exactly 32 tokens
  expect_distribution(ctx, equal, {.min_p = 0.5});
}

TEST(Sample, GreedyTakesTheBest) {
  Context ctx = Context::cpu();
  for (const SampleOptions& o : {SampleOptions{.temperature = 0}, SampleOptions{.top_k = 1}})
    for (const std::int32_t id : draw_many(ctx, {1, 4, 2, 4, kNaN}, o, 50)) EXPECT_EQ(id, 1);
}

TEST(Sample, OddValuesAreDefined) {
  Context ctx = Context::cpu();
  for (const std::int32_t id : draw_many(ctx, {kNaN, -kInf, kNaN}, {}, 20)) EXPECT_EQ(id, 0);
  for (const std::int32_t id : draw_many(ctx, {kNaN, -kInf, -1e30, kNaN}, {}, 20)) EXPECT_EQ(id, 2);
  std::set<std::int32_t> drawn;
  for (const std::int32_t id : draw_many(ctx, {3, kInf, 5, kInf}, {}, 200)) drawn.insert(id);
  EXPECT_EQ(drawn, (std::set<std::int32_t>{1, 3}));
  for (const std::int32_t id : draw_many(ctx, {0, 1e-3, 0}, {.temperature = 1e-30}, 20))
    EXPECT_EQ(id, 1);
}

// The tempered weights of 2^-y are those of exp: compared over the whole range that can be drawn.
TEST(Sample, TwoTokensAtEveryDistance) {
  Context ctx = Context::cpu();
  for (double gap = 0; gap < 6; gap += 0.37) expect_distribution(ctx, {0, -gap}, {});
}

TEST(Sample, WeightsArePowersOfTwo) {
  for (std::uint32_t d = 0; d < detail::kDistanceEnd; d += 1234567) {
    const double want = std::exp2(-std::ldexp(d, -detail::kDistanceBits) + detail::kWeightBits);
    EXPECT_NEAR(static_cast<double>(detail::weight_of(d)), want, 1 + 3e-7 * want) << d;
  }
}

TEST(Sample, CountersAdvanceAndSeedsDiffer) {
  Context ctx = Context::cpu();
  const Tensor logits = ctx.zeros({2, 1000}, DType::float32);
  Tensor counters = ctx.from_host<std::int64_t>({2}, std::vector<std::int64_t>{0, 41});
  Tensor ids = ctx.empty({2}, DType::int32);
  std::set<std::int32_t> drawn;
  for (int i = 0; i < 20; ++i) {
    sample_forward(ctx,
                   {.logits = logits, .options = {}, .seed = 5, .counters = counters, .ids = ids});
    for (const std::int32_t id : ctx.to_host<std::int32_t>(ids)) drawn.insert(id);
  }
  EXPECT_GT(drawn.size(), 30U);
  EXPECT_EQ(ctx.to_host<std::int64_t>(counters), (std::vector<std::int64_t>{20, 61}));
  const std::vector<double> flat(1000, 0.0);
  EXPECT_EQ(draw_many(ctx, flat, {}, 20, 1), draw_many(ctx, flat, {}, 20, 1));
  EXPECT_NE(draw_many(ctx, flat, {}, 20, 1), draw_many(ctx, flat, {}, 20, 2));
}

TEST(Sample, RepetitionPenalty) {
  Context ctx = Context::cpu();
  const Tensor logits = ctx.from_host_as({2, 40}, DType::float32, [] {
    std::vector<double> v(80, -5.0);
    v[3] = 4.0;  // row 0: halved to 2 once seen
    v[35] = 3.0;
    v[40 + 7] = -1.0;  // row 1: doubled to -2 once seen
    v[40 + 39] = -1.5;
    return v;
  }());
  Tensor seen = ctx.zeros({2, seen_words(40)}, DType::int32);
  Tensor ids = ctx.empty({2}, DType::int32);
  const auto next = [&] {
    sample_forward(ctx, {.logits = logits,
                         .options = {.temperature = 0, .repetition_penalty = 2.0},
                         .seed = 0,
                         .seen = seen,
                         .ids = ids});
    return ctx.to_host<std::int32_t>(ids);
  };
  EXPECT_EQ(next(), (std::vector<std::int32_t>{3, 7}));
  EXPECT_EQ(next(), (std::vector<std::int32_t>{35, 39}));
  EXPECT_EQ(next(), (std::vector<std::int32_t>{3, 7}));  // 2 beats 1.5, -2 beats -3
}

void expect_marks(Context& ctx) {
  const Tensor ids =
      ctx.from_host<std::int32_t>({2, 4}, std::vector<std::int32_t>{0, 33, 33, 7, -1, 40, 31, 2});
  const Tensor lengths = ctx.from_host<std::int32_t>({2}, std::vector<std::int32_t>{4, 3});
  Tensor seen = ctx.zeros({2, 2}, DType::int32);
  mark_seen(ctx, {.ids = ids, .vocab_size = 40, .seen = seen, .lengths = lengths});
  EXPECT_EQ(ctx.to_host<std::int32_t>(seen),
            (std::vector<std::int32_t>{(1 << 0) | (1 << 7), 1 << 1,
                                       std::numeric_limits<std::int32_t>::min(), 0}));
}

TEST(Sample, MarkSeen) {
  Context ctx = Context::cpu();
  expect_marks(ctx);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_marks(cuda);
}

TEST(Sample, RefusesBadOptions) {
  Context ctx = Context::cpu();
  for (const SampleOptions& o :
       {SampleOptions{.temperature = -1}, SampleOptions{.temperature = kNaN},
        SampleOptions{.top_k = -1}, SampleOptions{.top_p = 0}, SampleOptions{.top_p = 1.5},
        SampleOptions{.min_p = 1}, SampleOptions{.repetition_penalty = 0}})
    EXPECT_THROW(draw_many(ctx, {1, 2}, o, 1), ConfigError);
  const Tensor logits = ctx.zeros({2, 3}, DType::float32);
  Tensor ids = ctx.zeros({2}, DType::int32);
  EXPECT_THROW(sample_forward(ctx, {.logits = logits, .options = {}, .seed = 0, .ids = ids}),
               ShapeError);
}

/// Ids of eight draws for every row, then counters and masks.
std::vector<std::int32_t> draw_eight(Context& ctx, const std::vector<double>& logits,
                                     std::int64_t vocab_size, const SampleOptions& o) {
  const auto rows = static_cast<std::int64_t>(logits.size()) / vocab_size;
  const Tensor values = ctx.from_host_as({rows, vocab_size}, DType::float32, logits);
  Tensor counters = ctx.zeros({rows}, DType::int64);
  Tensor seen = ctx.zeros({rows, seen_words(vocab_size)}, DType::int32);
  Tensor ids = ctx.empty({rows}, DType::int32);
  std::vector<std::int32_t> all;
  for (int step = 0; step < 8; ++step) {
    sample_forward(ctx, {.logits = values,
                         .options = o,
                         .seed = 77,
                         .counters = counters,
                         .seen = seen,
                         .ids = ids});
    for (const std::int32_t id : ctx.to_host<std::int32_t>(ids)) all.push_back(id);
  }
  for (const std::int64_t c : ctx.to_host<std::int64_t>(counters))
    all.push_back(static_cast<std::int32_t>(c));
  for (const std::int32_t word : ctx.to_host<std::int32_t>(seen)) all.push_back(word);
  return all;
}

class SampleOnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
    cuda = Context::cuda();
    options.push_back({.temperature = 0, .repetition_penalty = 1.3});
    options.push_back({.top_k = 50, .top_p = 0.95, .repetition_penalty = 1.2});
    options.push_back({.top_k = 2000, .top_p = 0.5});
  }
  void expect_same_ids(std::int64_t rows, std::int64_t vocab_size, double spread) {
    auto logits = random_logits(rows * vocab_size, spread, 9);
    logits[0] = kNaN;
    logits.back() = -kInf;
    for (const SampleOptions& o : options)
      EXPECT_EQ(draw_eight(cuda, logits, vocab_size, o), draw_eight(cpu, logits, vocab_size, o))
          << "rows " << rows << " V " << vocab_size << " spread " << spread << " T "
          << o.temperature << " k " << o.top_k << " p " << o.top_p << " m " << o.min_p;
  }

  Context cpu = Context::cpu();
  Context cuda = Context::cpu();
  std::vector<SampleOptions> options = kOptions;
};

// Every id, counter and mask agrees with the CPU, over sizes around the block and option mixes.
TEST_F(SampleOnCuda, DrawsTheSameIds) {
  for (const std::int64_t vocab_size : {1, 5, 256, 1023, 1024, 1025, 4096, 50257})
    for (const double spread : {0.0, 0.3, 3.0, 30.0}) expect_same_ids(3, vocab_size, spread);
}

// Rows around those to which it gives other blocks, and vocabularies for which these need more
// shared memory than a kernel may have without asking.
TEST_F(SampleOnCuda, DrawsTheSameIdsForManyRows) {
  for (const std::int64_t rows : {16, 17, 32, 33}) {
    expect_same_ids(rows, 1025, 3.0);
    expect_same_ids(rows, 9001, 0.3);
  }
  expect_same_ids(2, 65537, 3.0);
}

// The boundary of a filter among equal tokens that are few of a row but too many of one block to be
// gathered, wherever blocks have their columns.
TEST_F(SampleOnCuda, DrawsTheSameIdsOfEqualTokensInOneBlock) {
  constexpr std::int64_t kVocabSize = 50257;
  for (const std::int64_t stride : {1, 8, 16, 64, 128, 256})
    for (const std::int64_t count : {63, 64, 65, 150}) {
      auto logits = random_logits(kVocabSize, 0.5, 4);
      for (std::int64_t i = 0; i < count; ++i)
        logits[static_cast<std::size_t>(1000 + i * stride)] = 12.0;
      for (const SampleOptions& o :
           {SampleOptions{.top_k = 40}, {.top_p = 0.6}, {.top_k = 60, .top_p = 0.9}})
        EXPECT_EQ(draw_eight(cuda, logits, kVocabSize, o), draw_eight(cpu, logits, kVocabSize, o))
            << "stride " << stride << " count " << count << " k " << o.top_k << " p " << o.top_p;
    }
}

}  // namespace
}  // namespace lrnn
