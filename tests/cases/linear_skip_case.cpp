#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/linear_skip.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t rows, width, states;
  std::int64_t margin = 0;  // columns beside all rows
};

MutableTensorView columns(const Sizes& z, Tensor& t, std::int64_t width) {
  return t.view().slice(1, z.margin, width);
}

// v = x B^T, y = v C^T + scale o x: x has the two consumers that backward adds up.
void forward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) {
    ctx.zero(t["v"]);
    ctx.zero(t["y"]);
  }
  const MutableTensorView v = columns(z, t["v"], z.states);
  linear_forward(ctx, {.x = columns(z, t["x"], z.width), .weight = t["B"], .y = v});
  linear_skip_forward(ctx, {.x = v,
                            .weight = t["C"],
                            .skip = columns(z, t["x"], z.width),
                            .scale = t["scale"],
                            .y = columns(z, t["y"], z.width)});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["dx"]);
  const TensorView x = columns(z, t["x"], z.width);
  const TensorView dy = columns(z, t["dy"], z.width);
  Tensor storage = ctx.empty(t["v"].shape(), t["v"].dtype());
  const MutableTensorView dv = columns(z, storage, z.states);
  linear_backward(ctx, {.dy = dy,
                        .x = columns(z, t["v"], z.states),
                        .weight = t["C"],
                        .dx = dv,
                        .dweight = t["dC"]});
  linear_backward(ctx, {.dy = dv, .x = x, .dweight = t["dB"]});
  linear_skip_backward(ctx, {.dv = dv,
                             .weight = t["B"],
                             .dy = dy,
                             .x = x,
                             .scale = t["scale"],
                             .dx = columns(z, t["dx"], z.width),
                             .dscale = t["dscale"]});
}

OpCase linear_skip_case(const Sizes& z, bool gradcheck = false) {
  const double element = 4.0 * static_cast<double>(z.rows * z.width);
  const double state = 4.0 * static_cast<double>(z.rows * z.states);
  return {
      .name = detail::concat("linear_skip/T:", z.rows, "/H:", z.width, "/N:", z.states,
                             z.margin > 0 ? detail::concat("/margin:", z.margin) : ""),
      .inputs = {{.name = "x", .shape = {z.rows, z.width + z.margin}}},
      .params = {{.name = "B", .shape = {z.states, z.width}},
                 {.name = "C", .shape = {z.width, z.states}},
                 {.name = "scale", .shape = {z.width}, .storage = Storage::Accumulate}},
      .outputs = {{.name = "y", .shape = {z.rows, z.width + z.margin}}},
      .saved = {{.name = "v", .shape = {z.rows, z.states + z.margin}}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .gradcheck = gradcheck,
      .bytes_forward = 3.0 * element + 2.0 * state,
      .bytes_backward = 6.0 * element + 5.0 * state,
  };
}

const RegisterOpCases kRegister({
    linear_skip_case({1, 1, 1}, true),
    linear_skip_case({7, 5, 3}, true),
    linear_skip_case({6, 8, 4, 3}, true),
    linear_skip_case({17, 16, 8}),
    // Rows enough for Hopper's kernel: tiles whole and broken; widths below and above a block's and
    // beside it; depths in one, several and broken panels, and too large.
    linear_skip_case({512, 128, 32}),
    linear_skip_case({577, 200, 64, 8}),
    linear_skip_case({1000, 264, 128}),
    linear_skip_case({2111, 384, 136}),
    linear_skip_case({640, 60, 8}),
    linear_skip_case({600, 136, 256, 4}),
    linear_skip_case({530, 72, 520}),
    linear_skip_case({600, 130, 40}),
    linear_skip_case({9001, 132, 16}),
    linear_skip_case({32777, 40, 24}),  // enough for it in bfloat16
});
const RegisterBenchCases kRegisterBench({
    linear_skip_case({65536, 768, 128}),
    linear_skip_case({16384, 768, 128}),
});

}  // namespace
}  // namespace lrnn::testing
