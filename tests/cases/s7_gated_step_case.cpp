#include <cmath>

#include "lrnn/ops/s7_gated_step.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

void step(Context& ctx, Tensors& t) {
  s7_gated_step(ctx, {.x = t["x"],
                      .weight = t["weight"],
                      .base = t["base"],
                      .gate = t["gate"],
                      .hid = t["hid"],
                      .y = t["y"],
                      .state = t["state_out"]});
}

OpCase s7_gated_step_case(std::int64_t batch, std::int64_t dim, std::int64_t dstate) {
  const Shape x = {batch, 1, dim};
  const Shape state = {batch, dstate};
  const auto accumulate = Storage::Accumulate;
  const double bound = 2.0 / std::sqrt(static_cast<double>(dim));
  return step_case({
      .name = detail::concat("s7_gated_step/B:", batch, "/H:", dim, "/N:", dstate),
      .inputs = {{.name = "x", .shape = x},
                 {.name = "hid", .shape = x},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params = {{.name = "weight",
                  .shape = {2 * dim * dstate + dim + 2 * dstate, dim},
                  .low = -bound,
                  .high = bound},
                 {.name = "base", .shape = {dstate}, .storage = accumulate},
                 {.name = "gate", .shape = {dim, dim}, .low = -bound, .high = bound}},
      .outputs = {{.name = "y", .shape = x},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .forward = step,
  });
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  struct Sizes {
    std::int64_t batch, dim, dstate;
  };
  for (const Sizes& z : {
           Sizes{1, 64, 8},
           Sizes{3, 40, 16},
           Sizes{5, 256, 32},  // threads in part, and all
           Sizes{2, 120, 64},
           Sizes{4, 16, 4},    // most and fewest states
           Sizes{17, 48, 16},  // the gate's weight twice
           Sizes{32, 256, 16},
           Sizes{33, 32, 16},
           Sizes{2, 40, 24},
           Sizes{2, 7, 3},     // the ops one by one
           Sizes{2, 272, 64},  // the same: too many projections
       })
    all.push_back(s7_gated_step_case(z.batch, z.dim, z.dstate));
  return all;
}
const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({s7_gated_step_case(1, 256, 16),
                                         s7_gated_step_case(32, 256, 16)});

}  // namespace
}  // namespace lrnn::testing
