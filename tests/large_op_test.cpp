/// Ops over more than 2^31 elements: every batch row of a large call against a call of its own,
/// whose offsets fit 32 bits. bfloat16 on CUDA; needs about 50 GiB of device memory.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/causal_conv1d.hpp"
#include "lrnn/ops/cross_entropy.hpp"
#include "lrnn/ops/embedding.hpp"
#include "lrnn/ops/selective_scan.hpp"

namespace lrnn::testing {
namespace {

constexpr std::int64_t kBatch = 5;
constexpr std::int64_t kSeqlen = 32768;
constexpr std::int64_t kWidth = 13440;  // no power of two: a wrapped offset meets other values
static_assert(kBatch * kSeqlen * kWidth > std::numeric_limits<std::int32_t>::max());

constexpr std::int64_t kWindow = 4096;  // elements compared at a time
constexpr double kRounding = 0x1p-7;    // two results may round to neighbours in bfloat16

std::vector<double> random_block(std::int64_t n, double low, double high, std::uint64_t seed) {
  Rng rng(seed, "block");
  std::vector<double> v(static_cast<std::size_t>(n));
  for (double& e : v) e = rng.uniform(low, high);
  return v;
}

class LargeOps : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
    ctx_.emplace(Context::cuda());
  }
  Context& ctx() { return *ctx_; }

  // Random values, repeated with a period of 2^22 - 3 elements, which divides no power of two.
  Tensor filled(const Shape& shape, std::uint64_t seed, double low = -1, double high = 1,
                DType dtype = DType::bfloat16) {
    constexpr std::int64_t kPeriod = (std::int64_t{1} << 22) - 3;
    Tensor t = ctx().empty(shape, dtype);
    const std::int64_t n = shape.numel();
    const std::int64_t period = std::min(n, kPeriod);
    const Tensor block = ctx().from_host_as({period}, dtype, random_block(period, low, high, seed));
    const MutableTensorView flat = t.view().reshape({n});
    for (std::int64_t begin = 0; begin < n; begin += period) {
      const std::int64_t count = std::min(period, n - begin);
      ctx().copy(flat.slice(0, begin, count), block.view().slice(0, 0, count));
    }
    return t;
  }
  Tensor output(const Shape& shape) { return ctx().empty(shape, DType::bfloat16); }

  // Windows at both ends of a row and at random places between.
  void expect_row_close(TensorView whole, std::int64_t row, TensorView part, double tolerance,
                        const char* name) {
    const std::int64_t n = part.numel();
    const TensorView a = whole.slice(0, row, 1).reshape({n});
    const TensorView b = part.reshape({n});
    Rng rng(static_cast<std::uint64_t>(row), name);
    const std::int64_t count = std::min(n, kWindow);
    for (int i = 0; i < 40; ++i) {
      const auto room = static_cast<std::uint64_t>(n - count + 1);
      const std::int64_t begin =
          i == 0 ? 0 : (i == 1 ? n - count : static_cast<std::int64_t>(rng.below(room)));
      const auto got = ctx().to_host_as_double(a.slice(0, begin, count));
      const auto want = ctx().to_host_as_double(b.slice(0, begin, count));
      double scale = 0;
      for (const double w : want) scale = std::max(scale, std::abs(w));
      for (std::size_t k = 0; k < want.size(); ++k)
        ASSERT_LE(std::abs(got[k] - want[k]), tolerance * (std::abs(want[k]) + 0.01 * scale))
            << name << " row " << row << " element " << begin + static_cast<std::int64_t>(k) << ": "
            << got[k] << " against " << want[k];
    }
  }
  // Sums over all tokens, once in one call and once row by row into the same accumulator. float32
  // sums of n terms in two orders differ by about sqrt(n) 2^-24 of the sum of magnitudes.
  void expect_sums_close(TensorView whole, TensorView parts, const char* name) {
    const auto got = ctx().to_host_as_double(whole);
    const auto want = ctx().to_host_as_double(parts);
    double scale = 0;
    for (const double w : want) scale = std::max(scale, std::abs(w));
    ASSERT_GT(scale, 0) << name;
    for (std::size_t k = 0; k < want.size(); ++k)
      ASSERT_LE(std::abs(got[k] - want[k]), 1e-4 * scale) << name << '[' << k << ']';
  }

 private:
  std::optional<Context> ctx_;
};

TEST_F(LargeOps, CudaCausalConv1d) {
  const Shape shape = {kBatch, kSeqlen, kWidth};
  const Shape row = {1, kSeqlen, kWidth};
  const Tensor x = filled(shape, 1);
  const Tensor dy = filled(shape, 2);
  const Tensor weight = filled({kWidth, 4}, 3);
  const Tensor bias = filled({kWidth}, 4);
  Tensor y = output(shape);
  Tensor dx = output(shape);
  Tensor dweight = ctx().zeros({kWidth, 4}, DType::float32);
  Tensor dbias = ctx().zeros({kWidth}, DType::float32);
  const auto run = [&](TensorView in, TensorView cotangent, MutableTensorView out,
                       MutableTensorView gradient, MutableTensorView dw, MutableTensorView db) {
    causal_conv1d_forward(
        ctx(), {.x = in, .weight = weight, .bias = bias, .activation = Activation::Silu, .y = out});
    causal_conv1d_backward(ctx(), {.dy = cotangent,
                                   .x = in,
                                   .weight = weight,
                                   .bias = bias,
                                   .activation = Activation::Silu,
                                   .dx = gradient,
                                   .dweight = dw,
                                   .dbias = db});
  };
  run(x, dy, y, dx, dweight, dbias);
  Tensor part_y = output(row);
  Tensor part_dx = output(row);
  Tensor part_dweight = ctx().zeros({kWidth, 4}, DType::float32);
  Tensor part_dbias = ctx().zeros({kWidth}, DType::float32);
  for (std::int64_t b = 0; b < kBatch; ++b) {
    run(x.view().slice(0, b, 1), dy.view().slice(0, b, 1), part_y, part_dx, part_dweight,
        part_dbias);
    expect_row_close(y, b, part_y, kRounding, "y");
    expect_row_close(dx, b, part_dx, kRounding, "dx");
  }
  expect_sums_close(dweight, part_dweight, "dweight");
  expect_sums_close(dbias, part_dbias, "dbias");
}

TEST_F(LargeOps, CudaSelectiveScan) {
  constexpr std::int64_t kStates = 4;
  const auto channels = [](std::int64_t batch) { return Shape{batch, kSeqlen, kWidth}; };
  const auto states = [](std::int64_t batch) { return Shape{batch, kSeqlen, kStates}; };
  const Tensor u = filled(channels(kBatch), 1);
  const Tensor dt = filled(channels(kBatch), 2);
  const Tensor z = filled(channels(kBatch), 3);
  const Tensor dy = filled(channels(kBatch), 4);
  const Tensor B = filled(states(kBatch), 5);
  const Tensor C = filled(states(kBatch), 6);
  const Tensor dt_bias = filled({kWidth}, 7, -3, -1, DType::float32);
  const Tensor A_log = filled({kWidth, kStates}, 8, 0, 1, DType::float32);
  const Tensor D = filled({kWidth}, 9, -1, 1, DType::float32);
  struct Results {
    Tensor y, chunk_states, du, ddt, dB, dC, dz, ddt_bias, dA_log, dD;
  };
  const auto make = [&](std::int64_t batch) {
    const auto sum = [&](const Shape& shape) { return ctx().zeros(shape, DType::float32); };
    return Results{
        output(channels(batch)),
        ctx().empty({batch, selective_scan_chunks(kSeqlen), kWidth, kStates}, DType::float32),
        output(channels(batch)),
        output(channels(batch)),
        output(states(batch)),
        output(states(batch)),
        output(channels(batch)),
        sum({kWidth}),
        sum({kWidth, kStates}),
        sum({kWidth})};
  };
  const auto run = [&](std::int64_t first, std::int64_t count, Results& r) {
    const auto rows = [&](const Tensor& t) { return t.view().slice(0, first, count); };
    const SelectiveScanInputs in{.u = rows(u),
                                 .dt = rows(dt),
                                 .dt_bias = dt_bias,
                                 .A_log = A_log,
                                 .B = rows(B),
                                 .C = rows(C),
                                 .D = D,
                                 .z = rows(z)};
    selective_scan_forward(ctx(), {.in = in, .y = r.y, .chunk_states = r.chunk_states});
    selective_scan_backward(ctx(), {.in = in,
                                    .dy = rows(dy),
                                    .chunk_states = r.chunk_states,
                                    .du = r.du,
                                    .ddt = r.ddt,
                                    .dB = r.dB,
                                    .dC = r.dC,
                                    .dz = r.dz,
                                    .ddt_bias = r.ddt_bias,
                                    .dA_log = r.dA_log,
                                    .dD = r.dD});
  };
  Results whole = make(kBatch);
  run(0, kBatch, whole);
  Results part = make(1);
  for (std::int64_t b = 0; b < kBatch; ++b) {
    run(b, 1, part);
    expect_row_close(whole.y, b, part.y, kRounding, "y");
    expect_row_close(whole.du, b, part.du, kRounding, "du");
    expect_row_close(whole.ddt, b, part.ddt, kRounding, "ddt");
    expect_row_close(whole.dB, b, part.dB, kRounding, "dB");
    expect_row_close(whole.dC, b, part.dC, kRounding, "dC");
    expect_row_close(whole.dz, b, part.dz, kRounding, "dz");
  }
  expect_sums_close(whole.ddt_bias, part.ddt_bias, "ddt_bias");
  expect_sums_close(whole.dA_log, part.dA_log, "dA_log");
  expect_sums_close(whole.dD, part.dD, "dD");
}

// More than 2^31 elements in the rows that are looked up and in the table.
TEST_F(LargeOps, CudaEmbedding) {
  constexpr std::int64_t kVocab = kBatch * kSeqlen;
  const Tensor weight = filled({kVocab, kWidth}, 1);
  std::vector<std::int32_t> host(static_cast<std::size_t>(kVocab));
  Rng rng(2, "ids");
  for (auto& id : host) id = static_cast<std::int32_t>(rng.below(kVocab));
  host.back() = static_cast<std::int32_t>(kVocab - 1);
  const Tensor ids = ctx().from_host<std::int32_t>({kBatch, kSeqlen}, host);
  Tensor y = output({kBatch, kSeqlen, kWidth});
  embedding_forward(ctx(), {.ids = ids, .weight = weight, .y = y});
  Tensor part = output({1, kSeqlen, kWidth});
  for (std::int64_t b = 0; b < kBatch; ++b) {
    // Of a table that holds only the rows in question, at offsets that fit 32 bits.
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{777}, kSeqlen - 1}) {
      const std::int64_t id = host[static_cast<std::size_t>(b * kSeqlen + t)];
      EXPECT_EQ(ctx().to_host_as_double(y.view().slice(0, b, 1).slice(1, t, 1)),
                ctx().to_host_as_double(weight.view().slice(0, id, 1)))
          << "row " << b << " position " << t;
    }
    embedding_forward(ctx(), {.ids = ids.view().slice(0, b, 1), .weight = weight, .y = part});
    expect_row_close(y, b, part, 0, "y");
  }
  // Backward: position p adds its row of dy to row ids[p] of dweight.
  const Tensor dy = filled({kBatch, kSeqlen, kWidth}, 3);
  Tensor dweight = ctx().zeros({kVocab, kWidth}, DType::float32);
  embedding_backward(ctx(), {.ids = ids, .dy = dy, .dweight = dweight});
  const TensorView rows = dy.view().reshape({kVocab, kWidth});
  for (const std::int64_t p : {std::int64_t{0}, kVocab / 2, kVocab - 1}) {
    const std::int64_t id = host[static_cast<std::size_t>(p)];
    std::vector<double> want(static_cast<std::size_t>(kWidth));
    for (std::int64_t q = 0; q < kVocab; ++q) {
      if (host[static_cast<std::size_t>(q)] != id) continue;
      const auto row = ctx().to_host_as_double(rows.slice(0, q, 1));
      for (std::size_t k = 0; k < row.size(); ++k) want[k] += row[k];
    }
    const auto got = ctx().to_host_as_double(dweight.view().slice(0, id, 1));
    for (std::size_t k = 0; k < want.size(); ++k)
      ASSERT_NEAR(got[k], want[k], 1e-5) << "dweight[" << id << ", " << k << ']';
  }
}

TEST_F(LargeOps, CudaCrossEntropy) {
  constexpr std::int64_t kVocab = 50277;
  constexpr std::int64_t kPadded = 50288;
  constexpr std::int64_t kRows = 8700;  // of each of kBatch parts
  static_assert(kBatch * kRows * kPadded > std::numeric_limits<std::int32_t>::max());
  const Tensor logits = filled({kBatch * kRows, kPadded}, 1, -4, 4);
  std::vector<std::int32_t> host(static_cast<std::size_t>(kBatch * kRows));
  Rng rng(2, "targets");
  for (auto& t : host) t = static_cast<std::int32_t>(rng.below(kVocab));
  const Tensor targets = ctx().from_host<std::int32_t>({kBatch * kRows}, host);
  struct Results {
    Tensor losses, lse, dlogits;
  };
  const auto make = [&](std::int64_t rows) {
    return Results{ctx().empty({rows}, DType::float32), ctx().empty({rows}, DType::float32),
                   output({rows, kPadded})};
  };
  const Tensor dlosses = filled({kBatch * kRows}, 3, 0.5, 1, DType::float32);
  const auto run = [&](std::int64_t first, std::int64_t rows, Results& r) {
    const auto part = [&](const Tensor& t) { return t.view().slice(0, first, rows); };
    cross_entropy_forward(ctx(), {.logits = part(logits),
                                  .targets = part(targets),
                                  .vocab_size = kVocab,
                                  .losses = r.losses,
                                  .lse = r.lse});
    cross_entropy_backward(ctx(), {.dlosses = part(dlosses),
                                   .logits = part(logits),
                                   .targets = part(targets),
                                   .vocab_size = kVocab,
                                   .lse = r.lse,
                                   .dlogits = r.dlogits});
  };
  Results whole = make(kBatch * kRows);
  run(0, kBatch * kRows, whole);
  Results part = make(kRows);
  const auto parts = [&](Tensor& t, const Shape& shape) { return t.view().reshape(shape); };
  for (std::int64_t b = 0; b < kBatch; ++b) {
    run(b * kRows, kRows, part);
    expect_row_close(parts(whole.losses, {kBatch, kRows}), b, part.losses, 1e-6, "losses");
    expect_row_close(parts(whole.dlogits, {kBatch, kRows * kPadded}), b, part.dlogits, kRounding,
                     "dlogits");
  }
}

}  // namespace
}  // namespace lrnn::testing
