#include <cmath>
#include <utility>

#include "lrnn/ops/projected_rglru.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

void step(Context& ctx, Tensors& t) {
  projected_rglru_step(ctx, {.v = t["v"],
                             .r_projection = t["r_projection"],
                             .r_bias = t["r_bias"],
                             .i_projection = t["i_projection"],
                             .i_bias = t["i_bias"],
                             .a_log = t["a_log"],
                             .gate = t["gate"],
                             .y = t["y"],
                             .state = t["state_out"]});
}

OpCase projected_rglru_case(std::int64_t batch, std::int64_t width) {
  const Shape rows = {batch, width};
  const Shape square = {width, width};
  const double bound = 2.0 / std::sqrt(static_cast<double>(width));
  return step_case({
      .name = detail::concat("projected_rglru/B:", batch, "/E:", width),
      .inputs = {{.name = "v", .shape = rows},
                 {.name = "gate", .shape = rows},
                 {.name = "state_in", .shape = rows, .storage = Storage::Accumulate}},
      .params = {{.name = "r_projection", .shape = square, .low = -bound, .high = bound},
                 {.name = "r_bias", .shape = {width}},
                 {.name = "i_projection", .shape = square, .low = -bound, .high = bound},
                 {.name = "i_bias", .shape = {width}},
                 {.name = "a_log",
                  .shape = {width},
                  .low = 2.0,
                  .high = 6.0,
                  .storage = Storage::Accumulate}},
      .outputs = {{.name = "y", .shape = rows},
                  {.name = "state_out", .shape = rows, .storage = Storage::Accumulate}},
      .forward = step,
  });
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  // 17 rows read the weights twice; 33, and odd depth: the ops one by one. 768: several steps of
  // every warp.
  for (const auto& [batch, width] : std::initializer_list<std::pair<std::int64_t, std::int64_t>>{
           {1, 64}, {2, 136}, {4, 24}, {16, 40}, {17, 32}, {33, 32}, {3, 5}, {1, 768}})
    all.push_back(projected_rglru_case(batch, width));
  return all;
}
const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({projected_rglru_case(1, 768),
                                         projected_rglru_case(32, 768),
                                         projected_rglru_case(1, 2560),
                                         projected_rglru_case(32, 2560)});

}  // namespace
}  // namespace lrnn::testing
