/// Products in float32 on Hopper's tensor cores, by both ways: all three forms, broken tiles, cut
/// depths, numbers of all sizes, operands that are not finite.
#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/linear.hpp"

#include "common/linear_float32_sm90.cuh"

namespace lrnn {
namespace {

namespace float32 = cuda::linear_float32_sm90;
using float32::Operand;
using float32::Product;

struct Way {
  const char* name;
  bool (*applies)(const Product&);
  void (*run)(Context&, const Product&);
};
constexpr Way kWays[] = {
    {"bfloat16x3", float32::bfloat16x3::applies, float32::bfloat16x3::run},
    {"float16x2", float32::float16x2::applies, float32::float16x2::run},
};

struct Problem {
  std::int64_t rows, columns, depth;
  bool left_across = false;
  bool right_across = false;
  std::int64_t margin = 0;  // columns beside every matrix
  bool bias = false;
  bool accumulate = false;
};

struct Matrix {
  std::int64_t rows, columns, stride;
  std::vector<float> host;
  Tensor device;
};

class Float32OnTensorCores : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
    ctx = Context::cuda();
    make({128, 128, 64});
    if (!float32::applies(product({128, 128, 64}))) GTEST_SKIP() << "not a Hopper device";
  }

  Matrix matrix(const char* name, std::int64_t rows, std::int64_t columns, std::int64_t margin) {
    Matrix m{rows, columns, columns + margin, {}, {}};
    Rng rng(7, name);
    m.host.resize(static_cast<std::size_t>(rows * m.stride));
    for (float& e : m.host) e = static_cast<float>(rng.uniform(-1.0, 1.0));
    return m;
  }
  void send(Matrix& m) { m.device = ctx.from_host<float>({m.rows, m.stride}, m.host); }
  void send_all() {
    for (Matrix* m : {&left, &right, &bias, &y}) send(*m);
  }
  void make(const Problem& p) {
    const auto operand = [&](const char* name, std::int64_t width, bool across) {
      return across ? matrix(name, p.depth, width, p.margin)
                    : matrix(name, width, p.depth, p.margin);
    };
    left = operand("left", p.rows, p.left_across);
    right = operand("right", p.columns, p.right_across);
    bias = matrix("bias", 1, p.columns, 0);
    y = matrix("y", p.rows, p.columns, p.margin);
    send_all();
  }
  [[nodiscard]] Product product(const Problem& p) {
    const auto operand = [](const Matrix& m, bool across) {
      return Operand{m.device.view().data<float>(), m.stride, across};
    };
    return {.left = operand(left, p.left_across),
            .right = operand(right, p.right_across),
            .bias = p.bias ? bias.device.view().data<float>() : nullptr,
            .y = y.device.view().data<float>(),
            .y_stride = y.stride,
            .accumulate = p.accumulate,
            .rows = p.rows,
            .columns = p.columns,
            .depth = p.depth};
  }
  [[nodiscard]] static float at(const Matrix& m, bool across, std::int64_t row, std::int64_t k) {
    return m.host[static_cast<std::size_t>(across ? k * m.stride + row : row * m.stride + k)];
  }
  [[nodiscard]] static std::size_t place(const Matrix& m, std::int64_t r, std::int64_t c) {
    return static_cast<std::size_t>(r * m.stride + c);
  }

  /// y[r, c] as it should be, and the sum of the magnitudes of its terms.
  [[nodiscard]] std::pair<double, double> sum_of(const Problem& p, std::int64_t r,
                                                 std::int64_t c) const {
    double sum = p.bias         ? double{bias.host[static_cast<std::size_t>(c)]}
                 : p.accumulate ? double{y.host[place(y, r, c)]}
                                : 0.0;
    double magnitude = std::abs(sum);
    for (std::int64_t k = 0; k < p.depth; ++k) {
      const double term =
          double{at(left, p.left_across, r, k)} * double{at(right, p.right_across, c, k)};
      sum += term;
      magnitude += std::abs(term);
    }
    return {sum, magnitude};
  }
  /// By a way, from the operands as they are on the host.
  [[nodiscard]] std::vector<float> run(const Way& way, const Problem& p) {
    send_all();
    way.run(ctx, product(p));
    return ctx.to_host<float>(y.device);
  }
  /// Every element against a sum in double, relative to the sum of magnitudes.
  void expect_close(const Way& way, const Problem& p, double relative, double absolute = 0) {
    SCOPED_TRACE(way.name);
    const auto got = run(way, p);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (std::int64_t c = 0; c < p.columns; ++c) {
        const auto [sum, magnitude] = sum_of(p, r, c);
        ASSERT_NEAR(double{got[place(y, r, c)]}, sum, relative * magnitude + absolute)
            << r << ' ' << c;
      }
      for (std::int64_t c = p.columns; c < y.stride; ++c)
        ASSERT_EQ(got[place(y, r, c)], y.host[place(y, r, c)]) << "beside y";
    }
  }
  void expect_sums(const Problem& p) {
    make(p);
    ASSERT_TRUE(float32::applies(product(p)));
    for (const Way& way : kWays)
      if (way.applies(product(p))) expect_close(way, p, 0x1p-22);
  }

  Context ctx = Context::cpu();
  Matrix left, right, bias, y;
};

TEST_F(Float32OnTensorCores, SumsAreThoseOfFloat32) {
  for (const auto& [left_across, right_across] :
       {std::pair{false, false}, {false, true}, {true, true}})
    for (const auto& [rows, columns, depth] : {std::tuple{128, 128, 64},
                                               {2, 4, 4},
                                               {130, 132, 68},
                                               {62, 260, 100},
                                               {258, 60, 300},
                                               {66, 68, 4100}})
      for (const std::int64_t margin : {0, 4})
        expect_sums({rows, columns, depth, left_across, right_across, margin, margin > 0});
  expect_sums({300, 40, 132, false, false, 0, false, true});
  expect_sums({130, 132, 2000, true, true, 4, false, true});
  expect_sums({131, 130, 132});  // whose rows need no alignment
}

// More numbers than are split at a time, in the rows or in the depth.
TEST_F(Float32OnTensorCores, LongProductsGoPieceByPiece) {
  for (const Problem& p : {Problem{.rows = 10'600'001, .columns = 4, .depth = 4, .bias = true},
                           Problem{.rows = 4,
                                   .columns = 8,
                                   .depth = 3'500'003,
                                   .left_across = true,
                                   .right_across = true,
                                   .bias = true}}) {
    make(p);
    const Way& way = kWays[1];
    ASSERT_TRUE(way.applies(product(p)));
    expect_close(way, p, 0x1p-21);
  }
}

// Numbers of all sizes: parts below the least normal number, sums near the largest.
TEST_F(Float32OnTensorCores, NumbersOfAllSizes) {
  for (const bool across : {false, true}) {
    const Problem p{.rows = across ? 132 : 130,
                    .columns = 132,
                    .depth = 68,
                    .left_across = across,
                    .right_across = across};
    make(p);
    for (Matrix* m : {&left, &right})
      for (std::size_t i = 0; i < m->host.size(); ++i) {
        const auto width = static_cast<std::size_t>(m->stride);
        const auto of_y = across ? i % width : i / width;
        m->host[i] *= std::ldexp(1.0F, static_cast<int>(of_y % 120) - 60);
      }
    for (const Way& way : kWays) expect_close(way, p, 0x1p-22, 0x1p-140);
  }
}

// Terms of one size whose factors differ by 2^40: tiny ones of either operand meet large ones.
TEST_F(Float32OnTensorCores, NumbersFarBelowTheirNeighbours) {
  for (const auto& [across, biased, adds] : {std::tuple{false, false, false},
                                             {true, false, false},
                                             {false, true, false},
                                             {true, false, true}}) {
    const Problem p{.rows = 68,
                    .columns = 132,
                    .depth = 260,
                    .left_across = across,
                    .right_across = across,
                    .bias = biased,
                    .accumulate = adds};
    make(p);
    const auto scale = [&, across = across](Matrix& m, int sign) {
      for (std::size_t i = 0; i < m.host.size(); ++i) {
        const auto width = static_cast<std::size_t>(m.stride);
        const auto k = across ? i / width : i % width;
        m.host[i] *= std::ldexp(1.0F, sign * static_cast<int>(k * 7 % 41));
      }
    };
    scale(left, 1);
    scale(right, -1);
    for (const Way& way : kWays) expect_close(way, p, 0x1p-20);
  }
}

// Infinity and NaN where a sum in float32 has them.
TEST_F(Float32OnTensorCores, OperandsThatAreNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Problem p{258, 132, 132};
  make(p);
  left.host[5] = kInfinity;
  left.host[3 * 132 + 7] = std::numeric_limits<float>::quiet_NaN();
  left.host[200 * 132 + 131] = -kInfinity;
  left.host[100 * 132 + 3] = std::numeric_limits<float>::max();
  right.host[40 * 132 + 9] = kInfinity;
  right.host[41 * 132 + 5] = 0;
  for (const Way& way : kWays) {
    SCOPED_TRACE(way.name);
    const auto got = run(way, p);
    for (std::int64_t r = 0; r < p.rows; ++r)
      for (std::int64_t c = 0; c < p.columns; ++c) {
        float sum = 0;
        for (std::int64_t k = 0; k < p.depth; ++k)
          sum = std::fma(at(left, false, r, k), at(right, false, c, k), sum);
        const float v = got[place(y, r, c)];
        ASSERT_EQ(std::isnan(v), std::isnan(sum)) << r << ' ' << c;
        if (std::isinf(sum) || std::isinf(v)) {
          ASSERT_EQ(v, sum) << r << ' ' << c;
        }
      }
  }
}

// linear takes one of these ways for products that are large enough, unless TF32 is allowed.
TEST_F(Float32OnTensorCores, LinearTakesThem) {
  constexpr std::int64_t kRows = 8192;
  constexpr std::int64_t kWidth = 512;
  const auto bits = [&](const Problem& p, const auto& linear) {
    make(p);
    if (p.accumulate) ctx.zero(y.device);
    linear();
    const auto got = ctx.to_host<float>(y.device);
    if (p.accumulate) ctx.zero(y.device);
    float32::run(ctx, product(p));
    const auto want = ctx.to_host<float>(y.device);
    return std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0;
  };
  const auto forward = [&] {
    linear_forward(ctx, {.x = left.device, .weight = right.device, .y = y.device});
  };
  EXPECT_TRUE(bits({kRows, kWidth, kWidth}, forward));
  EXPECT_TRUE(bits({kRows, kWidth, kWidth, false, true}, [&] {
    linear_backward(ctx, {.dy = left.device, .weight = right.device, .dx = y.device});
  }));
  EXPECT_TRUE(bits({kWidth, kWidth, kRows, true, true, 0, false, true}, [&] {
    linear_backward(ctx, {.dy = left.device, .x = right.device, .dweight = y.device});
  }));
  ctx.set_allow_tf32(true);
  EXPECT_FALSE(bits({kRows, kWidth, kWidth}, forward));
}

}  // namespace
}  // namespace lrnn
