#include "lrnn/ops/adamw.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.95;

struct Scalars {
  Tensor factors;
  Tensor options;
};

Scalars scalars(Context& ctx, DType dtype, double grad_norm) {
  const Tensor norm = ctx.from_host_as({}, dtype, std::vector<double>{grad_norm});
  const Tensor lr = ctx.from_host_as({}, dtype, std::vector<double>{0.01});
  Tensor counters = ctx.from_host<std::int64_t>({2}, std::vector<std::int64_t>{6, 2});
  Scalars s{ctx.empty({5}, dtype),
            ctx.from_host_as({3, 2}, dtype, std::vector<double>{1.0, 0.1, 0.5, 0.0, 2.0, 0.3})};
  adamw_begin(ctx, {.grad_norm = norm,
                    .lr = lr,
                    .grad_scale = 0.5,
                    .max_grad_norm = 1.0,
                    .beta1 = kBeta1,
                    .beta2 = kBeta2,
                    .counters = counters,
                    .factors = s.factors});
  return s;
}

// `values` of a bfloat16 run are rounded masters; otherwise they are updated themselves.
void run(Context& ctx, Tensors& t, double grad_norm) {
  const DType dtype = t["grad"].dtype();
  const Scalars s = scalars(ctx, dtype, grad_norm);
  const bool mixed = t["values"].dtype() == DType::bfloat16;
  ctx.copy(t["m"], t["m_in"]);
  ctx.copy(t["v"], t["v_in"]);
  ctx.copy(t["masters"], t["w_in"]);
  adamw_update(ctx, {.grad = t["grad"],
                     .factors = s.factors,
                     .group_options = t["group_options"],
                     .options = s.options,
                     .beta1 = kBeta1,
                     .beta2 = kBeta2,
                     .eps = 1e-8,
                     .m = t["m"],
                     .v = t["v"],
                     .masters = mixed ? t["masters"].view() : MutableTensorView(),
                     .values = mixed ? t["values"].view() : t["masters"].view()});
  if (!mixed) ctx.copy(t["values"], t["masters"]);
}

OpCase adamw_case(std::int64_t groups) {
  const std::int64_t n = groups * kAdamwGroup;
  const auto floats = [n](const char* name, double low = -1.0) {
    return Operand{.name = name, .shape = {n}, .low = low, .storage = Storage::Accumulate};
  };
  return {
      .name = detail::concat("adamw/n:", n),
      .inputs = {floats("grad"), floats("w_in"), floats("m_in"), floats("v_in", 1e-3)},
      .indices = {{.name = "group_options", .shape = {groups}, .low = 0, .high = 3}},
      .outputs = {floats("m"), floats("v"), floats("masters"), {.name = "values", .shape = {n}}},
      .forward = [](Context& ctx, Tensors& t) { run(ctx, t, 4.0); },
      // 28 bytes per element for the update; four copies around it make 32 more.
      .bytes_forward = 60.0 * static_cast<double>(n),
  };
}

const RegisterOpCases kRegister({adamw_case(1), adamw_case(3), adamw_case(37), adamw_case(1025)});
const RegisterBenchCases kRegisterBench({adamw_case(std::int64_t{1} << 16)});

}  // namespace
}  // namespace lrnn::testing
