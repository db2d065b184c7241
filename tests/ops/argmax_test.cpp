#include "lrnn/ops/argmax.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"

namespace lrnn {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<std::int32_t> argmax_of(Context& ctx, DType dtype, const Shape& shape,
                                    const std::vector<double>& values) {
  return ctx.to_host<std::int32_t>(argmax(ctx, ctx.from_host_as(shape, dtype, values)));
}

void expect_defined_choices(Context& ctx, DType dtype) {
  const std::vector<double> rows = {
      1,     3,     2,     3,      // the lowest index on ties
      -5,    -7,    -4,    -6,     // all negative
      kNaN,  1,     kNaN,  2,      // NaN is below every number
      kNaN,  kNaN,  kNaN,  kNaN,   // nothing but NaN
      -kInf, -kInf, -kInf, -kInf,  // nothing above minus infinity
      0,     kInf,  1,     kInf,   // infinity
      -1,    -0.0,  0.0,   -0.0,   // the zeros are equal
      -kInf, kNaN,  -9,    kNaN,
  };
  EXPECT_EQ(argmax_of(ctx, dtype, {8, 4}, rows),
            (std::vector<std::int32_t>{1, 2, 3, 0, 0, 1, 1, 2}));
}

void expect_matches_search(Context& ctx, DType dtype) {
  for (const std::int64_t vocab_size : {1, 2, 31, 33, 257, 1000, 4097, 50257}) {
    Rng rng(3, std::to_string(vocab_size));
    const std::int64_t rows = 3;
    std::vector<double> values(static_cast<std::size_t>(rows * vocab_size));
    for (double& v : values) v = std::floor(rng.uniform(-100.0, 100.0));  // many ties
    std::vector<std::int32_t> want;
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto first = values.begin() + r * vocab_size;
      want.push_back(
          static_cast<std::int32_t>(std::max_element(first, first + vocab_size) - first));
    }
    EXPECT_EQ(argmax_of(ctx, dtype, {rows, 1, vocab_size}, values), want) << vocab_size;
  }
}

TEST(Argmax, DefinedChoices) {
  Context ctx = Context::cpu();
  expect_defined_choices(ctx, DType::float32);
  expect_defined_choices(ctx, DType::float64);
}

TEST(Argmax, MatchesSearch) {
  Context ctx = Context::cpu();
  expect_matches_search(ctx, DType::float32);
  expect_matches_search(ctx, DType::float64);
}

TEST(Argmax, Cuda) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    expect_defined_choices(ctx, dtype);
    expect_matches_search(ctx, dtype);
  }
}

// The columns behind the vocabulary hold greater values that must not be seen.
void expect_ignores_padding(Context& ctx) {
  const std::vector<double> values = {1, 5, 2, 9, 9, 9, 7, 4, 6, 9, 9, 9};
  const Tensor padded = ctx.from_host_as({2, 1, 6}, DType::float32, values);
  const Tensor ids = argmax(ctx, padded.view().slice(2, 0, 3));
  EXPECT_EQ(ids.shape(), (Shape{2, 1}));
  EXPECT_EQ(ctx.to_host<std::int32_t>(ids), (std::vector<std::int32_t>{1, 0}));
}

TEST(Argmax, IgnoresPaddedColumns) {
  Context ctx = Context::cpu();
  expect_ignores_padding(ctx);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_ignores_padding(cuda);
}

TEST(Argmax, RefusesBadOperands) {
  Context ctx = Context::cpu();
  const Tensor logits = ctx.zeros({2, 3}, DType::float32);
  Tensor ids = ctx.zeros({3}, DType::int32);
  EXPECT_THROW(argmax_forward(ctx, {.logits = logits, .ids = ids}), ShapeError);
  EXPECT_THROW(static_cast<void>(argmax(ctx, {})), ShapeError);
  const Tensor integers = ctx.zeros({2, 3}, DType::int32);
  EXPECT_THROW(static_cast<void>(argmax(ctx, integers)), DTypeError);
}

}  // namespace
}  // namespace lrnn
