#include "lrnn/train/text_data.hpp"

#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/core/error.hpp"
#include "lrnn/io/file.hpp"
#include "lrnn/ops/cross_entropy.hpp"

namespace lrnn {
namespace {

struct Batch {
  Batch(std::int64_t rows, std::int64_t seqlen)
      : input_ids(static_cast<std::size_t>(rows * seqlen)), targets(input_ids.size()) {}
  operator TokenBatch() { return {input_ids, targets}; }  // NOLINT(google-explicit-constructor)
  std::vector<std::int32_t> input_ids;
  std::vector<std::int32_t> targets;
};

/// Token i is i, so a window shows where it was taken from.
TextData counting(std::int32_t train, std::int32_t held_out) {
  std::vector<std::int32_t> a(static_cast<std::size_t>(train));
  std::vector<std::int32_t> b(static_cast<std::size_t>(held_out));
  std::iota(a.begin(), a.end(), 0);
  std::iota(b.begin(), b.end(), 1000);
  return TextData::from_tokens(a, b, 4.0);
}

TEST(TextData, HoldsOutTheEndOfEveryText) {
  const auto text = [](std::uint8_t first, std::size_t n) {
    std::vector<std::uint8_t> v(n);
    std::iota(v.begin(), v.end(), first);
    return v;
  };
  const TextData data = TextData::from_bytes({text(0, 100), text(100, 40)}, 0.05);
  EXPECT_EQ(data.train_size(), 95 + 38);
  EXPECT_EQ(data.held_out_size(), 5 + 2);
  EXPECT_EQ(data.max_token(), 139);
  EXPECT_EQ(data.bytes_per_token(), 1.0);
  Batch batch(1, 6);
  EXPECT_EQ(data.fill_held_out(0, 6, batch), 6);
  EXPECT_EQ(batch.input_ids, (std::vector<std::int32_t>{95, 96, 97, 98, 99, 138}));
  EXPECT_EQ(batch.targets, (std::vector<std::int32_t>{96, 97, 98, 99, 138, 139}));
  EXPECT_EQ(TextData::from_bytes({text(0, 100)}, 0.0).held_out_size(), 0);
  EXPECT_THROW(TextData::from_bytes({}, 1.0), ConfigError);
}

TEST(TextData, ReadsFiles) {
  const auto directory = std::filesystem::temp_directory_path() /
                         ("lrnn_text_data_test_" + std::to_string(::getpid()));
  std::filesystem::create_directories(directory);
  write_text_file(directory / "a.txt", std::string("abc\xff", 4));
  const TextData data = TextData::from_files({directory / "a.txt"}, 0.25);
  EXPECT_EQ(data.train_size(), 3);
  EXPECT_EQ(data.max_token(), 255);
  EXPECT_THROW(TextData::from_files({directory / "missing.txt"}), IoError);
  std::filesystem::remove_all(directory);
}

TEST(TextData, TargetsAreOneTokenLater) {
  const TextData data = counting(500, 0);
  Batch batch(16, 7);
  data.fill_train(3, 0, 7, batch);
  for (std::size_t i = 0; i < batch.targets.size(); ++i) {
    EXPECT_EQ(batch.targets[i], batch.input_ids[i] + 1);
    if (i % 7 != 0) {
      EXPECT_EQ(batch.input_ids[i], batch.input_ids[i - 1] + 1);
    }
  }
}

// Sequences 5, 6, 7 are the same whether they come alone or behind 0..4.
TEST(TextData, AnyPositionCanBeReached) {
  const TextData data = counting(5000, 0);
  Batch all(8, 4);
  Batch tail(3, 4);
  data.fill_train(9, 0, 4, all);
  data.fill_train(9, 5, 4, tail);
  EXPECT_TRUE(
      std::equal(tail.input_ids.begin(), tail.input_ids.end(), all.input_ids.begin() + 5 * 4));
  Batch other(8, 4);
  data.fill_train(10, 0, 4, other);
  EXPECT_NE(other.input_ids, all.input_ids);
}

// 10 starting points, 20000 draws: all are used, the last token is reached, frequencies are even
// (six standard deviations of about 42).
TEST(TextData, StartsAreUniform) {
  const TextData data = counting(14, 0);
  constexpr std::int64_t kDraws = 20000;
  Batch batch(kDraws, 4);
  data.fill_train(1, 0, 4, batch);
  std::vector<int> counts(14, 0);
  for (std::int64_t i = 0; i < kDraws; ++i)
    ++counts[static_cast<std::size_t>(batch.input_ids[static_cast<std::size_t>(4 * i)])];
  for (std::size_t start = 0; start < 10; ++start)
    EXPECT_NEAR(counts[start], 2000, 6 * 42) << start;
  EXPECT_EQ(std::accumulate(counts.begin() + 10, counts.end(), 0), 0);
}

TEST(TextData, HeldOutWindowsCountEveryTargetOnce) {
  const TextData data = counting(10, 23);  // 22 targets
  EXPECT_EQ(data.held_out_windows(5), 5);
  EXPECT_EQ(data.held_out_windows(22), 1);
  EXPECT_EQ(data.held_out_windows(21), 2);
  std::multiset<std::int32_t> targets;
  std::int64_t counted = 0;
  for (std::int64_t w = 0; w < 5; w += 2) {
    Batch batch(2, 5);
    counted += data.fill_held_out(w, 5, batch);
    for (std::size_t i = 0; i < 10; ++i) {
      if (batch.targets[i] == kIgnoreIndex) continue;
      EXPECT_EQ(batch.targets[i], batch.input_ids[i] + 1);
      targets.insert(batch.targets[i]);
    }
  }
  EXPECT_EQ(counted, 22);
  EXPECT_EQ(targets.size(), 22U);
  EXPECT_EQ(std::set<std::int32_t>(targets.begin(), targets.end()).size(), 22U);
  EXPECT_EQ(counting(10, 1).held_out_windows(5), 0);
  EXPECT_EQ(counting(10, 0).held_out_windows(5), 0);
}

TEST(TextData, RefusesTooLittleText) {
  const TextData data = counting(5, 0);
  Batch batch(1, 5);
  EXPECT_THROW(data.fill_train(0, 0, 5, batch), InvalidArgument);
  Batch fits(1, 4);
  EXPECT_NO_THROW(data.fill_train(0, 0, 4, fits));
  EXPECT_THROW(data.fill_train(0, 0, 3, fits), InvalidArgument);
  EXPECT_THROW(TextData::from_tokens({-1}, {}, 1.0), InvalidArgument);
}

}  // namespace
}  // namespace lrnn
