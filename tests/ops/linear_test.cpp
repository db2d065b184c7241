// linear_forward with a weight in bfloat16, and with few rows.
#include "lrnn/ops/linear.hpp"

#include <cmath>
#include <cstring>
#include <omp.h>
#include <string>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/embedding.hpp"

namespace lrnn {
namespace {

std::vector<double> random_values(const char* name, std::int64_t count) {
  Rng rng(5, name);
  std::vector<double> v(static_cast<std::size_t>(count));
  for (double& e : v) e = static_cast<double>(static_cast<float>(rng.uniform(-1.0, 1.0)));
  return v;
}

struct Problem {
  std::int64_t rows, in, out;
  std::int64_t margin = 0;  // columns beside x, the weight and y
  bool accumulate = false;
};

class LinearOfFewRows : public ::testing::Test {
 protected:
  /// y, and what it should be: sums in double over the weight that is stored.
  void make(const Problem& p, DType dtype, DType weight_dtype) {
    x = ctx.from_host_as({p.rows, p.in + p.margin}, dtype,
                         random_values("x", p.rows * (p.in + p.margin)));
    weight = ctx.from_host_as({p.out, p.in + p.margin}, weight_dtype,
                              random_values("weight", p.out * (p.in + p.margin)));
    bias = ctx.from_host_as({p.out}, dtype, random_values("bias", p.out));
    y = ctx.from_host_as({p.rows, p.out + p.margin}, dtype,
                         random_values("y", p.rows * (p.out + p.margin)));
  }
  void run(const Problem& p) {
    linear_forward(ctx, {.x = x.view().slice(1, p.margin, p.in),
                         .weight = weight.view().slice(1, p.margin, p.in),
                         .bias = p.accumulate ? TensorView() : TensorView(bias),
                         .y = y.view().slice(1, p.margin, p.out),
                         .accumulate = p.accumulate});
  }
  // Every element of y, those beside the slice included.
  [[nodiscard]] std::vector<double> expected(const Problem& p) {
    const auto xs = ctx.to_host_as_double(x);
    const auto ws = ctx.to_host_as_double(weight);
    const auto bs = ctx.to_host_as_double(bias);
    auto ys = ctx.to_host_as_double(y);
    const std::int64_t width = p.in + p.margin;
    for (std::int64_t r = 0; r < p.rows; ++r)
      for (std::int64_t o = 0; o < p.out; ++o) {
        double& sum = ys[static_cast<std::size_t>(r * (p.out + p.margin) + p.margin + o)];
        if (!p.accumulate) sum = bs[static_cast<std::size_t>(o)];
        for (std::int64_t i = p.margin; i < width; ++i)
          sum += xs[static_cast<std::size_t>(r * width + i)] *
                 ws[static_cast<std::size_t>(o * width + i)];
      }
    return ys;
  }

  /// Any neighbouring rows by themselves give the bits that they give together.
  void expect_rows_alone(const Problem& all, DType dtype, DType weight_dtype) {
    make(all, dtype, weight_dtype);
    run(all);
    const auto together = ctx.to_host_as_double(y);
    for (std::int64_t count = 1; count < all.rows; ++count)
      for (std::int64_t first = 0; first + count <= all.rows; ++first) {
        Tensor some = ctx.empty({count, all.out}, dtype);
        linear_forward(
            ctx, {.x = x.view().slice(0, first, count), .weight = weight, .bias = bias, .y = some});
        const auto alone = ctx.to_host_as_double(some);
        EXPECT_EQ(std::memcmp(alone.data(), together.data() + first * all.out,
                              alone.size() * sizeof(double)),
                  0)
            << dtype << ' ' << all.in << " x " << all.out << ": " << first << " + " << count;
      }
  }

  Context ctx = Context::cpu();
  Tensor x, weight, bias, y;
};

// Around vectors of 2 to 16 elements, four of them at a time, and the number of rows at which
// another product takes over. Every term is below 1 and so is every rounding error below
// eps (sum of terms) (length of a chain of additions).
TEST_F(LinearOfFewRows, SumsAreThoseOfTheStoredWeight) {
  struct Types {
    DType x, weight;
    double eps;
  };
  for (const Types& t : {Types{DType::float32, DType::bfloat16, 0x1p-24},
                         Types{DType::float32, DType::float32, 0x1p-24},
                         Types{DType::float64, DType::float64, 0x1p-53}})
    for (const std::int64_t in : {1, 3, 15, 16, 17, 63, 64, 65, 81, 200})
      for (const std::int64_t rows : {1, 2, 3, 4, 7, 8, 9, 131})
        for (const Problem& p :
             {Problem{rows, in, 5}, Problem{rows, in, 130, 3}, Problem{rows, in, 9, 1, true}}) {
          make(p, t.x, t.weight);
          const auto want = expected(p);
          run(p);
          const auto got = ctx.to_host_as_double(y);
          const double bound = t.eps * static_cast<double>((in + 2) * (in / 4 + 8));
          for (std::size_t i = 0; i < want.size(); ++i)
            ASSERT_NEAR(got[i], want[i], bound)
                << t.weight << " rows " << rows << " in " << in << " margin " << p.margin;
        }
}

// Decoding one sequence or several is the same arithmetic.
TEST_F(LinearOfFewRows, RowsDoNotKnowEachOther) {
  for (const DType weight_dtype : {DType::float32, DType::bfloat16})
    expect_rows_alone({8, 203, 70}, DType::float32, weight_dtype);
}
// Up to the most rows that count as few; widths and depths that their kernels cut in all their
// ways.
TEST_F(LinearOfFewRows, RowsDoNotKnowEachOtherOnCuda) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  ctx = Context::cuda();
  for (const Problem& p : {Problem{16, 40, 9}, Problem{16, 1544, 70}, Problem{16, 104, 4099},
                           Problem{16, 200, 16387}, Problem{16, 2056, 2049}}) {
    expect_rows_alone(p, DType::bfloat16, DType::bfloat16);
    expect_rows_alone({4, p.in, p.out}, DType::float32, DType::float32);
  }
}

TEST_F(LinearOfFewRows, SameBitsForAnyNumberOfThreads) {
  const int before = omp_get_max_threads();
  for (const std::int64_t rows : {1, 3, 8, 40}) {
    const Problem p{rows, 300, 517};
    make(p, DType::float32, DType::bfloat16);
    std::vector<float> one;
    for (const int threads : {1, 2, 3, 4}) {
      omp_set_num_threads(threads);
      run(p);
      const auto got = ctx.to_host<float>(y);
      if (threads == 1) one = got;
      EXPECT_EQ(std::memcmp(got.data(), one.data(), one.size() * sizeof(float)), 0) << threads;
    }
  }
  omp_set_num_threads(before);
}

TEST_F(LinearOfFewRows, RefusesOtherMixtures) {
  const Problem p{2, 4, 3};
  make(p, DType::float64, DType::bfloat16);
  EXPECT_THROW(run(p), DTypeError);
  make(p, DType::bfloat16, DType::bfloat16);
  EXPECT_THROW(run(p), DTypeError);
  make(p, DType::float32, DType::float64);
  EXPECT_THROW(run(p), DTypeError);
  make(p, DType::float32, DType::bfloat16);
  Tensor dx = ctx.empty({2, 4}, DType::float32);
  EXPECT_THROW(linear_backward(ctx, {.dy = y, .weight = weight, .dx = dx}), DTypeError);
}

TEST(EmbeddingOfBfloat16, WidensRows) {
  Context ctx = Context::cpu();
  const Tensor table = ctx.from_host_as({5, 19}, DType::bfloat16, random_values("table", 5 * 19));
  const auto stored = ctx.to_host_as_double(table);
  const std::vector<std::int32_t> ids{4, 0, 4};
  Tensor y = ctx.empty({1, 3, 19}, DType::float32);
  embedding_forward(ctx,
                    {.ids = ctx.from_host<std::int32_t>({1, 3}, ids), .weight = table, .y = y});
  const auto got = ctx.to_host_as_double(y);
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT_EQ(got[i], stored[static_cast<std::size_t>(ids[i / 19]) * 19 + i % 19]);
  Tensor wide = ctx.empty({1, 3, 19}, DType::float64);
  EXPECT_THROW(
      embedding_forward(
          ctx, {.ids = ctx.from_host<std::int32_t>({1, 3}, ids), .weight = table, .y = wide}),
      DTypeError);
}

}  // namespace
}  // namespace lrnn
