#include <cmath>

#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/projected_selective_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, channels, dstate, rank;
  bool gate = true;
  SelectiveDiscretization disc = SelectiveDiscretization::Mamba;

  [[nodiscard]] std::int64_t width() const { return rank + 2 * dstate; }
};

SelectiveScanInputs inputs(const Sizes& z, Tensors& t) {
  return {.discretization = z.disc,
          .u = t["u"],
          .dt = {},
          .dt_bias = t["dt_bias"],
          .A_log = t["A_log"],
          .B = {},
          .C = {},
          .D = t["D"],
          .z = t["z"]};
}
// The ops that a step stands for.
void forward(const Sizes& z, Context& ctx, Tensors& t) {
  const DType dtype = t["u"].dtype();
  Tensor x = ctx.empty({z.batch, z.seqlen, z.width()}, dtype);
  Tensor dt = ctx.empty({z.batch, z.seqlen, z.channels}, dtype);
  linear_forward(ctx, {.x = t["u"], .weight = t["projection"], .y = x});
  linear_forward(ctx, {.x = x.view().slice(2, 0, z.rank), .weight = t["dt_weight"], .y = dt});
  SelectiveScanInputs in = inputs(z, t);
  in.dt = dt;
  in.B = x.view().slice(2, z.rank, z.dstate);
  in.C = x.view().slice(2, z.rank + z.dstate, z.dstate);
  in.state_in = t["state_in"];
  selective_scan_forward(ctx, {.in = in, .y = t["y"], .state_out = t["state_out"]});
}
void step(const Sizes& z, Context& ctx, Tensors& t, MutableTensorView state) {
  projected_selective_scan_step(ctx, {.in = inputs(z, t),
                                      .projection = t["projection"],
                                      .dt_weight = t["dt_weight"],
                                      .y = t["y"],
                                      .state = state});
}

std::string name_of_case(const Sizes& z) {
  return detail::concat("projected_selective_scan/B:", z.batch, "/L:", z.seqlen, "/D:", z.channels,
                        "/N:", z.dstate, "/R:", z.rank, z.gate ? "" : "/plain",
                        z.disc == SelectiveDiscretization::Mamba ? "" : "/zoh");
}

OpCase projected_selective_scan_case(const Sizes& z) {
  const Shape x = {z.batch, z.seqlen, z.channels};
  const Shape state = {z.batch, z.channels, z.dstate};
  const auto accumulate = Storage::Accumulate;
  const double of_inputs = 2.0 / std::sqrt(static_cast<double>(z.channels));
  const double of_rank = 1.0 / std::sqrt(static_cast<double>(z.rank));
  OpCase c{
      .name = name_of_case(z),
      .inputs = {{.name = "u", .shape = x, .time = 1},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params =
          {{.name = "projection",
            .shape = {z.width(), z.channels},
            .low = -of_inputs,
            .high = of_inputs},
           {.name = "dt_weight", .shape = {z.channels, z.rank}, .low = -of_rank, .high = of_rank},
           {.name = "dt_bias", .shape = {z.channels}, .storage = accumulate},
           {.name = "A_log", .shape = {z.channels, z.dstate}, .storage = accumulate}},
      .outputs = {{.name = "y", .shape = x, .time = 1},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .step = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state"]); },
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return projected_selective_scan_case(other);
          },
  };
  if (z.gate) {
    c.inputs.push_back({.name = "z", .shape = x, .time = 1});
    c.params.push_back({.name = "D", .shape = {z.channels}, .storage = accumulate});
  }
  return c;
}

// Several tokens against the ops, and one token in every dtype.
std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Sizes& z : {
           Sizes{2, 2, 24, 5, 3},  // the ops one by one
           Sizes{3, 2, 7, 4, 2, true, SelectiveDiscretization::Zoh},
           Sizes{33, 2, 72, 16, 16},          // a tile of channels in part
           Sizes{17, 2, 64, 16, 16},          // the fewest sequences
           Sizes{70, 2, 192, 16, 48, false},  // blocks in part
           Sizes{128, 1, 1536, 16, 48},       // of a small Mamba
           Sizes{130, 2, 64, 16, 128},
           Sizes{45, 1, 8512, 16, 128},  // many sequences of a block
           Sizes{256, 1, 192, 16, 80},   // the most
       }) {
    all.push_back(projected_selective_scan_case(z));
    all.back().gradcheck = false;
    Sizes one = z;
    one.seqlen = 1;
    OpCase c = projected_selective_scan_case(one);
    c.name.insert(std::string("projected_selective_scan").size(), "_step");
    c.forward = [one](Context& ctx, Tensors& t) {
      ctx.copy(t["state_out"], t["state_in"]);
      step(one, ctx, t, t["state_out"]);
    };
    c.step = {};
    c.at_length = {};
    all.push_back(c);
  }
  return all;
}
const RegisterOpCases kRegister(cases());

}  // namespace
}  // namespace lrnn::testing
