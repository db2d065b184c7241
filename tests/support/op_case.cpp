#include "support/op_case.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/core/random.hpp"

namespace lrnn::testing {
namespace {

std::vector<OpCase>& registry() {
  static std::vector<OpCase> cases;
  return cases;
}

std::vector<OpCase>& bench_registry() {
  static std::vector<OpCase> cases;
  return cases;
}

DType dtype_for(const Operand& o, DType dtype) {
  return o.storage == Storage::Accumulate ? accumulate_dtype(dtype) : dtype;
}

// Values are exact in bfloat16 for activations, and in float32 otherwise, so that all runs of a
// case see the same numbers.
std::vector<double> random_operand(const Operand& o, const std::string& name, std::uint64_t seed) {
  std::vector<double> v(static_cast<std::size_t>(o.shape.numel()));
  constexpr std::size_t kBlock = 1 << 16;
#pragma omp parallel for schedule(static)
  for (std::size_t begin = 0; begin < v.size(); begin += kBlock) {
    Rng rng(seed, name);
    rng.discard(2 * begin);
    for (std::size_t i = begin; i < std::min(v.size(), begin + kBlock); ++i) {
      const auto f = static_cast<float>(rng.uniform(o.low, o.high));
      v[i] = static_cast<double>(o.storage == Storage::Activation ? to_float(to_bfloat16(f)) : f);
    }
  }
  return v;
}

}  // namespace

const std::vector<OpCase>& all_op_cases() {
  return registry();
}
RegisterOpCases::RegisterOpCases(std::vector<OpCase> cases) {
  for (auto& c : cases) registry().push_back(std::move(c));
}

const std::vector<OpCase>& all_bench_cases() {
  return bench_registry();
}
RegisterBenchCases::RegisterBenchCases(std::vector<OpCase> cases) {
  for (auto& c : cases) bench_registry().push_back(std::move(c));
}

OpCase step_case(OpCase token) {
  std::erase_if(token.saved, [](const Operand& saved) { return saved.name == "chunk_states"; });
  token.timed = token.forward;
  token.forward = [step = token.forward](Context& ctx, Tensors& t) {
    ctx.copy(t["state_out"], t["state_in"]);
    step(ctx, t);
  };
  token.bytes_forward = 0;  // that of the states
  token.backward = {};
  token.step = {};
  token.at_length = {};
  return token;
}

Values random_values(const OpCase& c, std::uint64_t seed) {
  Values v;
  for (const auto* group : {&c.inputs, &c.params})
    for (const auto& o : *group) v[o.name] = random_operand(o, o.name, seed);
  for (const auto& o : c.outputs) {
    Operand cotangent = o;
    cotangent.low = -1.0;
    cotangent.high = 1.0;
    v["d" + o.name] = random_operand(cotangent, "d" + o.name, seed);
  }
  for (const auto& o : c.indices) {
    Rng rng(seed, o.name);
    auto& values = v[o.name];
    values.resize(static_cast<std::size_t>(o.shape.numel()));
    for (double& e : values) e = std::floor(rng.uniform(o.low, o.high));
  }
  return v;
}

Tensors make_tensors(Context& ctx, const OpCase& c, const Values& values, DType dtype) {
  Tensors t;
  for (const auto* group : {&c.inputs, &c.params})
    for (const auto& o : *group)
      t[o.name] = ctx.from_host_as(o.shape, dtype_for(o, dtype), values.at(o.name));
  for (const auto& o : c.indices)
    t[o.name] = ctx.from_host_as(o.shape, DType::int32, values.at(o.name));
  for (const auto& o : c.outputs) {
    t[o.name] = ctx.empty(o.shape, dtype_for(o, dtype));
    if (c.backward)
      t["d" + o.name] = ctx.from_host_as(o.shape, dtype_for(o, dtype), values.at("d" + o.name));
  }
  for (const auto& o : c.saved) t[o.name] = ctx.empty(o.shape, dtype_for(o, dtype));
  if (!c.backward) return t;
  for (const auto& o : c.inputs) t["d" + o.name] = ctx.empty(o.shape, dtype_for(o, dtype));
  for (const auto& o : c.params) t["d" + o.name] = ctx.zeros(o.shape, accumulate_dtype(dtype));
  return t;
}

}  // namespace lrnn::testing
