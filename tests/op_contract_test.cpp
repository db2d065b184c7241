/// The contract every op in the registry must satisfy: calculus -> CPU in double -> float -> CUDA.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <omp.h>
#include <set>

#include <gtest/gtest.h>

#include "support/op_parity.hpp"

namespace lrnn::testing {
namespace {

class OpContract : public ::testing::TestWithParam<OpCase> {};

std::vector<Operand> differentiated(const OpCase& c) {
  std::vector<Operand> all = c.inputs;
  all.insert(all.end(), c.params.begin(), c.params.end());
  return all;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

// Fourth-order central difference: truncation O(h^4), so 1e-3 leaves about 1e-11 in double.
TEST_P(OpContract, BackwardMatchesNumericalGradient) {
  const OpCase& c = GetParam();
  if (!c.backward || !c.gradcheck) GTEST_SKIP() << "no gradient check for this case";
  Context ctx = Context::cpu();
  const Values values = random_values(c);
  Tensors t = make_tensors(ctx, c, values, DType::float64);
  const auto loss = [&] {
    c.forward(ctx, t);
    double sum = 0;
    for (const auto& o : c.outputs)
      sum += dot(ctx.to_host_as_double(t[o.name]), values.at("d" + o.name));
    return sum;
  };
  static_cast<void>(loss());
  c.backward(ctx, t);
  const double h = c.gradient_step;
  for (const auto& o : differentiated(c)) {
    auto view = t[o.name].view();
    const auto analytic = ctx.to_host_as_double(t["d" + o.name]);
    for (std::size_t i = 0; i < analytic.size(); ++i) {
      double& v = view.data<double>()[i];
      const double v0 = v;
      const auto at = [&](double step) {
        v = v0 + step;
        return loss();
      };
      const double numeric = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h);
      v = v0;
      ASSERT_NEAR(analytic[i], numeric, c.gradient_tolerance * (1 + std::abs(numeric)))
          << "d" << o.name << '[' << i << ']';
    }
  }
}

TEST_P(OpContract, ParameterGradientAccumulates) {
  const OpCase& c = GetParam();
  if (!c.backward) GTEST_SKIP() << "no gradient";
  Context ctx = Context::cpu();
  Tensors t = make_tensors(ctx, c, random_values(c), DType::float64);
  const auto run = [&] {
    c.forward(ctx, t);
    c.backward(ctx, t);
  };
  run();
  std::map<std::string, std::vector<double>> once;
  for (const auto& o : differentiated(c)) once[o.name] = ctx.to_host_as_double(t["d" + o.name]);
  run();
  for (const auto& o : c.inputs)
    EXPECT_EQ(ctx.to_host_as_double(t["d" + o.name]), once[o.name]) << "d" << o.name;
  for (const auto& o : c.params) {
    const auto twice = ctx.to_host_as_double(t["d" + o.name]);
    for (std::size_t i = 0; i < twice.size(); ++i)
      ASSERT_NEAR(twice[i], 2 * once[o.name][i], 1e-12 * (1 + std::abs(twice[i])))
          << "d" << o.name << '[' << i << ']';
  }
}

void expect_matches_double(const OpCase& c, Context& ctx, DType dtype) {
  for (const Deviation& d : compare_with_double(c, ctx, dtype))
    EXPECT_LE(d.nmse, d.limit) << d.name;
}

TEST_P(OpContract, CpuFloatMatchesDouble) {
  Context ctx = Context::cpu();
  expect_matches_double(GetParam(), ctx, DType::float32);
}
TEST_P(OpContract, CudaFloat32MatchesDouble) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  expect_matches_double(GetParam(), ctx, DType::float32);
}
TEST_P(OpContract, CudaBfloat16MatchesDouble) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  if (!GetParam().bfloat16) GTEST_SKIP() << "no bfloat16 form";
  Context ctx = Context::cuda();
  expect_matches_double(GetParam(), ctx, DType::bfloat16);
}

// Everything a case writes.
std::vector<std::vector<double>> run_once(const OpCase& c, Context& ctx, DType dtype) {
  Tensors t = make_tensors(ctx, c, random_values(c), dtype);
  c.forward(ctx, t);
  if (c.backward) c.backward(ctx, t);
  std::vector<std::vector<double>> written;
  for (const auto& o : c.outputs) written.push_back(ctx.to_host_as_double(t[o.name]));
  if (c.backward)
    for (const auto& o : differentiated(c))
      written.push_back(ctx.to_host_as_double(t["d" + o.name]));
  return written;
}

bool same_bits(const std::vector<std::vector<double>>& a,
               const std::vector<std::vector<double>>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(double)) != 0) return false;
  return true;
}

TEST_P(OpContract, SameBitsForAnyNumberOfThreads) {
  const int before = omp_get_max_threads();
  Context ctx = Context::cpu();
  omp_set_num_threads(1);
  const auto one = run_once(GetParam(), ctx, DType::float32);
  for (const int threads : {2, 4}) {
    omp_set_num_threads(threads);
    EXPECT_TRUE(same_bits(run_once(GetParam(), ctx, DType::float32), one)) << threads;
  }
  omp_set_num_threads(before);
}

TEST_P(OpContract, CudaSameBitsEveryRun) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    if (dtype == DType::bfloat16 && !GetParam().bfloat16) continue;
    const auto first = run_once(GetParam(), ctx, dtype);
    for (int run = 0; run < 2; ++run)
      EXPECT_TRUE(same_bits(run_once(GetParam(), ctx, dtype), first)) << dtype;
  }
}

// Cases without a product in TF32 are those of CudaFloat32MatchesDouble once more.
TEST_P(OpContract, CudaTf32MatchesDouble) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  const auto full = run_once(GetParam(), ctx, DType::float32);
  ctx.set_allow_tf32(true);
  const auto first = run_once(GetParam(), ctx, DType::float32);
  if (same_bits(first, full)) GTEST_SKIP() << "no product in TF32";
  EXPECT_TRUE(same_bits(run_once(GetParam(), ctx, DType::float32), first));
  expect_matches_double(GetParam(), ctx, DType::float32);
}

// Nothing is written outside the operands and the scratch of the op.
void expect_stays_inside(const OpCase& c, Context ctx, DType dtype) {
  GuardResource guard(ctx.memory(), ctx.runtime());
  {
    const Context::MemoryScope scope(ctx, guard);
    static_cast<void>(run_once(c, ctx, dtype));
  }
  EXPECT_EQ(guard.violations(), 0U);
}

TEST_P(OpContract, StaysInsideItsMemory) {
  expect_stays_inside(GetParam(), Context::cpu(), DType::float64);
}
TEST_P(OpContract, CudaStaysInsideItsMemory) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  expect_stays_inside(GetParam(), Context::cuda(), DType::float32);
  if (GetParam().bfloat16) expect_stays_inside(GetParam(), Context::cuda(), DType::bfloat16);
}

std::int64_t seqlen_of(const OpCase& c) {
  for (const auto& o : c.inputs)
    if (o.time >= 0) return o.shape[o.time];
  return 0;
}

// Elements [begin, begin + length) of the time dimension.
std::vector<double> cut(const Operand& o, const std::vector<double>& v, std::int64_t begin,
                        std::int64_t length) {
  if (o.time < 0) return v;
  std::int64_t outer = 1;
  std::int64_t inner = 1;
  for (int i = 0; i < o.time; ++i) outer *= o.shape[i];
  for (int i = o.time + 1; i < o.shape.rank(); ++i) inner *= o.shape[i];
  std::vector<double> out;
  for (std::int64_t k = 0; k < outer; ++k) {
    const auto first = v.begin() + (k * o.shape[o.time] + begin) * inner;
    out.insert(out.end(), first, first + length * inner);
  }
  return out;
}

// The values of positions [begin, begin + length) of a whole case.
Values cut_values(const OpCase& whole, const Values& v, std::int64_t begin, std::int64_t length) {
  Values out;
  for (const auto* group : {&whole.inputs, &whole.params, &whole.indices})
    for (const auto& o : *group) out[o.name] = cut(o, v.at(o.name), begin, length);
  for (const auto& o : whole.outputs) out["d" + o.name] = cut(o, v.at("d" + o.name), begin, length);
  return out;
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double scale = 0;
  for (const double w : want) scale = std::max(scale, std::abs(w));
  for (std::size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(got[i], want[i], tolerance * (1 + scale)) << what << '[' << i << ']';
}

bool has(const std::vector<Operand>& operands, const std::string& name) {
  return std::any_of(operands.begin(), operands.end(),
                     [&](const Operand& o) { return o.name == name; });
}

// Forward in two chunks with the state passed on, then backward in reverse order with the gradient
// of the state passed back, equals one pass over the whole.
void expect_chunks_match(const OpCase& c, Context& ctx, DType dtype, std::int64_t cut_at,
                         double tolerance) {
  const std::int64_t seqlen = seqlen_of(c);
  const Values v = random_values(c);
  Tensors whole = make_tensors(ctx, c, v, dtype);
  c.forward(ctx, whole);
  const OpCase first = c.at_length(cut_at);
  const OpCase second = c.at_length(seqlen - cut_at);
  Values v1 = cut_values(c, v, 0, cut_at);
  Tensors t1 = make_tensors(ctx, first, v1, dtype);
  first.forward(ctx, t1);
  Values v2 = cut_values(c, v, cut_at, seqlen - cut_at);
  v2["state_in"] = ctx.to_host_as_double(t1["state_out"]);
  Tensors t2 = make_tensors(ctx, second, v2, dtype);
  second.forward(ctx, t2);
  for (const auto& o : c.outputs) {
    const auto want = ctx.to_host_as_double(whole[o.name]);
    if (o.time < 0) {
      expect_close(ctx.to_host_as_double(t2[o.name]), want, tolerance, o.name);
      continue;
    }
    expect_close(ctx.to_host_as_double(t1[o.name]), cut(o, want, 0, cut_at), tolerance, o.name);
    expect_close(ctx.to_host_as_double(t2[o.name]), cut(o, want, cut_at, seqlen - cut_at),
                 tolerance, o.name);
  }
  if (!c.backward) return;
  c.backward(ctx, whole);
  second.backward(ctx, t2);
  ctx.write_from_host(t1["dstate_out"], ctx.to_host_as_double(t2["dstate_in"]));
  first.backward(ctx, t1);
  for (const auto& o : c.inputs) {
    const auto want = ctx.to_host_as_double(whole["d" + o.name]);
    expect_close(ctx.to_host_as_double(t1["d" + o.name]), cut(o, want, 0, cut_at), tolerance,
                 "d" + o.name);
    if (o.time >= 0)
      expect_close(ctx.to_host_as_double(t2["d" + o.name]), cut(o, want, cut_at, seqlen - cut_at),
                   tolerance, "d" + o.name);
  }
  for (const auto& o : c.params) {
    auto sum = ctx.to_host_as_double(t1["d" + o.name]);
    const auto other = ctx.to_host_as_double(t2["d" + o.name]);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
    expect_close(sum, ctx.to_host_as_double(whole["d" + o.name]), tolerance, "d" + o.name);
  }
}

bool can_cut(const OpCase& c) {
  return c.at_length && has(c.inputs, "state_in") && !has(c.indices, "lengths") && seqlen_of(c) > 1;
}

std::set<std::int64_t> cut_points(std::int64_t seqlen) {
  return {1, (seqlen + 1) / 2, seqlen - 1};
}

TEST_P(OpContract, ChunksMatchForwardAndBackward) {
  const OpCase& c = GetParam();
  if (!can_cut(c)) GTEST_SKIP() << "no state to pass on";
  Context ctx = Context::cpu();
  for (const std::int64_t at : cut_points(seqlen_of(c)))
    expect_chunks_match(c, ctx, DType::float64, at, 1e-11);
}

TEST_P(OpContract, CudaChunksMatchForwardAndBackward) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const OpCase& c = GetParam();
  if (!can_cut(c)) GTEST_SKIP() << "no state to pass on";
  Context ctx = Context::cuda();
  for (const std::int64_t at : cut_points(seqlen_of(c)))
    expect_chunks_match(c, ctx, DType::float32, at, 1e-4);
}

// L steps from state_in give the outputs and the final state of forward.
void expect_steps_match(const OpCase& c, Context& ctx, DType dtype, double tolerance) {
  const std::int64_t seqlen = seqlen_of(c);
  const Values v = random_values(c);
  Tensors whole = make_tensors(ctx, c, v, dtype);
  c.forward(ctx, whole);
  const OpCase token = c.at_length(1);
  Tensor state = ctx.clone(whole["state_in"]);
  for (std::int64_t i = 0; i < seqlen; ++i) {
    Tensors t = make_tensors(ctx, token, cut_values(c, v, i, 1), dtype);
    t["state"] = std::move(state);
    token.step(ctx, t);
    state = std::move(t["state"]);
    for (const auto& o : c.outputs) {
      if (o.time < 0) continue;
      expect_close(ctx.to_host_as_double(t[o.name]),
                   cut(o, ctx.to_host_as_double(whole[o.name]), i, 1), tolerance, o.name);
    }
  }
  expect_close(ctx.to_host_as_double(state), ctx.to_host_as_double(whole["state_out"]), tolerance,
               "state");
}

TEST_P(OpContract, StepsMatchForward) {
  const OpCase& c = GetParam();
  if (!c.step || !c.at_length || has(c.indices, "lengths")) GTEST_SKIP() << "no step";
  Context ctx = Context::cpu();
  expect_steps_match(c, ctx, DType::float64, 1e-11);
}

TEST_P(OpContract, CudaStepsMatchForward) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const OpCase& c = GetParam();
  if (!c.step || !c.at_length || has(c.indices, "lengths")) GTEST_SKIP() << "no step";
  Context ctx = Context::cuda();
  expect_steps_match(c, ctx, DType::float32, 1e-4);
}

// Poisoning the inputs at padded positions changes no bit of any result.
TEST_P(OpContract, PaddingIsIgnored) {
  const OpCase& c = GetParam();
  if (!has(c.indices, "lengths")) GTEST_SKIP() << "no lengths";
  Context ctx = Context::cpu();
  const Values clean = random_values(c);
  Values dirty = clean;
  const auto& lengths = clean.at("lengths");
  const std::int64_t seqlen = seqlen_of(c);
  const auto poison = [&](const Operand& o, std::vector<double>& v) {
    if (o.time < 0) return;
    std::int64_t inner = 1;
    for (int i = o.time + 1; i < o.shape.rank(); ++i) inner *= o.shape[i];
    for (std::size_t b = 0; b < lengths.size(); ++b)
      for (auto i = static_cast<std::int64_t>(lengths[b]) * inner; i < seqlen * inner; ++i)
        v[b * static_cast<std::size_t>(seqlen * inner) + static_cast<std::size_t>(i)] = 1e3;
  };
  for (const auto& o : c.inputs) poison(o, dirty[o.name]);
  const auto run = [&](const Values& v) {
    Tensors t = make_tensors(ctx, c, v, DType::float64);
    c.forward(ctx, t);
    if (c.backward) c.backward(ctx, t);
    std::vector<std::vector<double>> written;
    for (const auto& o : c.outputs) written.push_back(ctx.to_host_as_double(t[o.name]));
    if (c.backward)
      for (const auto& o : differentiated(c))
        written.push_back(ctx.to_host_as_double(t["d" + o.name]));
    return written;
  };
  EXPECT_TRUE(same_bits(run(clean), run(dirty)));
}

std::string case_name(const ::testing::TestParamInfo<OpCase>& info) {
  std::string name = info.param.name;
  for (char& ch : name)
    if (!std::isalnum(static_cast<unsigned char>(ch))) ch = '_';
  return name;
}
INSTANTIATE_TEST_SUITE_P(AllOps, OpContract, ::testing::ValuesIn(all_op_cases()), case_name);

}  // namespace
}  // namespace lrnn::testing
