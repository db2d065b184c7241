#include "lrnn/ops/s7_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, dim, dstate;
  bool lengths = false;
};

void forward(Context& ctx, Tensors& t) {
  s7_scan_forward(ctx, {.x = t["x"],
                        .weight = t["weight"],
                        .base = t["base"],
                        .lengths = t["lengths"],
                        .state_in = t["state_in"],
                        .y = t["y"],
                        .state_out = t["state_out"],
                        .A = t["A"],
                        .s = t["s"]});
}
void backward(Context& ctx, Tensors& t) {
  s7_scan_backward(ctx, {.dy = t["dy"],
                         .x = t["x"],
                         .weight = t["weight"],
                         .A = t["A"],
                         .s = t["s"],
                         .lengths = t["lengths"],
                         .state_in = t["state_in"],
                         .dstate_out = t["dstate_out"],
                         .dx = t["dx"],
                         .dweight = t["dweight"],
                         .dbase = t["dbase"],
                         .dstate_in = t["dstate_in"]});
}
void step(Context& ctx, Tensors& t, MutableTensorView state) {
  s7_scan_step(
      ctx, {.x = t["x"], .weight = t["weight"], .base = t["base"], .y = t["y"], .state = state});
}

OpCase s7_scan_case(const Sizes& z) {
  const Shape x = {z.batch, z.seqlen, z.dim};
  const Shape state = {z.batch, z.dstate};
  const Shape sequence = {z.batch, z.seqlen, z.dstate};
  const std::int64_t rows = 2 * z.dim * z.dstate + z.dim + 2 * z.dstate;
  const auto accumulate = Storage::Accumulate;
  OpCase c{
      .name = detail::concat("s7_scan/B:", z.batch, "/L:", z.seqlen, "/H:", z.dim, "/N:", z.dstate,
                             z.lengths ? "/lengths" : ""),
      .inputs = {{.name = "x", .shape = x, .time = 1},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params = {{.name = "weight", .shape = {rows, z.dim}, .low = -0.3, .high = 0.3},
                 {.name = "base", .shape = {z.dstate}, .storage = accumulate}},
      .outputs = {{.name = "y", .shape = x, .time = 1},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .saved = {{.name = "A", .shape = sequence, .time = 1, .storage = accumulate},
                {.name = "s", .shape = sequence, .time = 1, .storage = accumulate}},
      .forward = forward,
      .backward = backward,
      .step = [](Context& ctx, Tensors& t) { step(ctx, t, t["state"]); },
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return s7_scan_case(other);
          },
      .gradcheck = z.dim <= 32,  // larger ones are for parity: a difference for each weight is slow
      .flops_forward = 2.0 * static_cast<double>(z.batch * z.seqlen * rows * z.dim),
      .flops_backward = 6.0 * static_cast<double>(z.batch * z.seqlen * rows * z.dim),
  };
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 1,
                  .high = static_cast<double>(z.seqlen + 1)}};
  return c;
}

const RegisterOpCases kRegister({
    s7_scan_case({1, 1, 1, 1}),
    s7_scan_case({2, 5, 3, 2}),
    s7_scan_case({1, 9, 4, 5}),
    s7_scan_case({3, 7, 2, 3, true}),
    s7_scan_case({2, 65, 3, 2}),   // one past a tile of tokens
    s7_scan_case({1, 300, 2, 3}),  // more than one chunk of the scan
    s7_scan_case({2, 270, 2, 3, true}),
    s7_scan_case({1, 20, 16, 8}),  // 16-byte accesses
    s7_scan_case({2, 9, 24, 8, true}),
    s7_scan_case({1, 6, 776, 2}),  // above the width that one pass of a contraction covers
    // Enough tokens for contractions by warpgroup products: one and two halves of the width, states
    // beyond a tile, several segments of the scans.
    s7_scan_case({1, 2050, 64, 2}),
    s7_scan_case({5, 420, 72, 17, true}),
    s7_scan_case({2, 1030, 136, 3}),
});

OpCase s7_scan_step_case(const Sizes& z) {
  OpCase c = s7_scan_case(z);
  c.name = detail::concat("s7_scan_step/B:", z.batch, "/H:", z.dim, "/N:", z.dstate);
  c.forward = [](Context& ctx, Tensors& t) { step(ctx, t, t["state_out"]); };
  c.saved = {};
  return step_case(std::move(c));
}

// A layer whose reference in double takes seconds, and a step of it.
const RegisterBenchCases kRegisterBench({s7_scan_case({8, 512, 256, 16}),
                                         s7_scan_step_case({32, 1, 256, 16})});

}  // namespace
}  // namespace lrnn::testing
