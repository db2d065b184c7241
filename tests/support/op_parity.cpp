#include "support/op_parity.hpp"

#include <algorithm>

#include "lrnn/core/random.hpp"

namespace lrnn::testing {

double nmse(const std::vector<double>& got, const std::vector<double>& want) {
  double error = 0;
  double power = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    power += want[i] * want[i];
  }
  return error / std::max(power, 1e-30);
}

namespace {

// How coarse the operands of a run are.
enum class Rounding { Float32, Tf32, BFloat16 };

// One unit of rounding: nearest in float32 and bfloat16; tensor cores cut float32 to TF32.
double unit_of(Rounding rounding) {
  switch (rounding) {
    case Rounding::Float32:
      return 0x1p-24;
    case Rounding::Tf32:
      return 0x1p-10;
    case Rounding::BFloat16:
      return 0x1p-8;
  }
  return 0;
}

// Each value moved at random by at most one unit of rounding.
Values moved_by_rounding(const OpCase& c, Values v, Rounding rounding, std::uint64_t seed) {
  Rng rng(seed, "rounding");
  const auto move = [&](const Operand& o, const std::string& name) {
    // Beside bfloat16 these are float32; a product in TF32 cuts them like all others.
    const bool wide = o.storage == Storage::Accumulate && rounding == Rounding::BFloat16;
    const double unit = unit_of(wide ? Rounding::Float32 : rounding);
    for (double& e : v.at(name)) e *= 1 + unit * rng.uniform(-1, 1);
  };
  for (const auto* group : {&c.inputs, &c.params})
    for (const auto& o : *group) move(o, o.name);
  if (c.backward)
    for (const auto& o : c.outputs) move(o, "d" + o.name);
  return v;
}

Tensors run_in_double(Context& cpu, const OpCase& c, const Values& v) {
  Tensors t = make_tensors(cpu, c, v, DType::float64);
  c.forward(cpu, t);
  if (c.backward) c.backward(cpu, t);
  return t;
}

// A result above its fixed limit may still be as far off as the exact result moves when inputs are
// rounded, where cancellation makes less impossible: kRoundings times that, since products on the
// way are rounded as well.
void widen_by_conditioning(const OpCase& c, const Values& v, Rounding rounding, Context& cpu,
                           Tensors& want, std::vector<Deviation>& all) {
  constexpr double kRoundings = 8;
  if (std::none_of(all.begin(), all.end(), [](const auto& d) { return d.nmse > d.limit; })) return;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    Tensors near = run_in_double(cpu, c, moved_by_rounding(c, v, rounding, seed));
    for (Deviation& d : all)
      d.limit = std::max(d.limit, kRoundings * nmse(cpu.to_host_as_double(near[d.name]),
                                                    cpu.to_host_as_double(want[d.name])));
  }
}

Rounding rounding_of(const Context& ctx, DType dtype) {
  if (dtype == DType::bfloat16) return Rounding::BFloat16;
  const bool tf32 = ctx.device().is_cuda() && ctx.allow_tf32();
  return tf32 ? Rounding::Tf32 : Rounding::Float32;
}

// In TF32 that of bfloat16, by the square of the ratio of their units.
double limit_of(Rounding rounding, double float32_nmse, double bfloat16_nmse) {
  if (rounding == Rounding::Float32) return float32_nmse;
  const double ratio = unit_of(rounding) / unit_of(Rounding::BFloat16);
  return bfloat16_nmse * ratio * ratio;
}

}  // namespace

std::vector<Deviation> compare_with_double(const OpCase& c, Context& ctx, DType dtype) {
  const Rounding rounding = rounding_of(ctx, dtype);
  const Values v = random_values(c);
  Context cpu = Context::cpu();
  Tensors want = run_in_double(cpu, c, v);
  Tensors got = make_tensors(ctx, c, v, dtype);
  std::vector<Deviation> all;
  const auto compare = [&](const std::string& name, double limit) {
    all.push_back(
        {name, nmse(ctx.to_host_as_double(got[name]), cpu.to_host_as_double(want[name])), limit});
  };
  c.forward(ctx, got);
  for (const auto& o : c.outputs)
    compare(o.name, limit_of(rounding, c.forward_nmse, c.bfloat16_nmse));
  if (c.backward) {
    c.backward(ctx, got);
    for (const auto* group : {&c.inputs, &c.params})
      for (const auto& o : *group)
        compare("d" + o.name, limit_of(rounding, c.gradient_nmse, c.bfloat16_gradient_nmse));
  }
  widen_by_conditioning(c, v, rounding, cpu, want, all);
  return all;
}

}  // namespace lrnn::testing
