#include "support/op_parity.hpp"

#include <algorithm>

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

std::vector<Deviation> compare_with_double(const OpCase& c, Context& ctx, DType dtype) {
  const bool rounded = dtype == DType::bfloat16;
  const Values v = random_values(c);
  Context cpu = Context::cpu();
  Tensors want = make_tensors(cpu, c, v, DType::float64);
  Tensors got = make_tensors(ctx, c, v, dtype);
  std::vector<Deviation> all;
  const auto compare = [&](const std::string& name, double limit) {
    all.push_back(
        {name, nmse(ctx.to_host_as_double(got[name]), cpu.to_host_as_double(want[name])), limit});
  };
  c.forward(cpu, want);
  c.forward(ctx, got);
  for (const auto& o : c.outputs) compare(o.name, rounded ? c.bfloat16_nmse : c.forward_nmse);
  if (!c.backward) return all;
  c.backward(cpu, want);
  c.backward(ctx, got);
  for (const auto* group : {&c.inputs, &c.params})
    for (const auto& o : *group)
      compare("d" + o.name, rounded ? c.bfloat16_gradient_nmse : c.gradient_nmse);
  return all;
}

}  // namespace lrnn::testing
