#include "lrnn/ops/causal_conv1d.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, channels, width;
  Activation activation = Activation::Silu;
  std::int64_t margin = 0;  // columns beside x and y, which are then column slices
  bool bias = true;
  bool lengths = false;
};

// The columns that the op sees.
MutableTensorView columns(const Sizes& z, Tensor& t) {
  return t.view().slice(2, z.margin, z.channels);
}
MutableTensorView token(const Sizes& z, Tensor& t) {
  return t.view().reshape({z.batch, z.channels + z.margin}).slice(1, z.margin, z.channels);
}

void forward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["y"]);
  causal_conv1d_forward(ctx, {.x = columns(z, t["x"]),
                              .weight = t["weight"],
                              .bias = t["bias"],
                              .activation = z.activation,
                              .lengths = t["lengths"],
                              .state_in = t["state_in"],
                              .y = columns(z, t["y"]),
                              .state_out = t["state_out"]});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["dx"]);
  causal_conv1d_backward(ctx, {.dy = columns(z, t["dy"]),
                               .x = columns(z, t["x"]),
                               .weight = t["weight"],
                               .bias = t["bias"],
                               .activation = z.activation,
                               .lengths = t["lengths"],
                               .state_in = t["state_in"],
                               .dstate_out = t["dstate_out"],
                               .dx = columns(z, t["dx"]),
                               .dweight = t["dweight"],
                               .dbias = t["dbias"],
                               .dstate_in = t["dstate_in"]});
}
void step(const Sizes& z, Context& ctx, Tensors& t, MutableTensorView state) {
  if (z.margin > 0) ctx.zero(t["y"]);
  causal_conv1d_step(ctx, {.x = token(z, t["x"]),
                           .weight = t["weight"],
                           .bias = t["bias"],
                           .activation = z.activation,
                           .y = token(z, t["y"]),
                           .state = state});
}

std::string name_of_case(const Sizes& z) {
  return detail::concat("causal_conv1d/B:", z.batch, "/L:", z.seqlen, "/C:", z.channels,
                        "/K:", z.width, z.activation == Activation::Silu ? "/silu" : "",
                        z.margin > 0 ? detail::concat("/margin:", z.margin) : "",
                        z.bias ? "" : "/no_bias", z.lengths ? "/lengths" : "");
}

OpCase causal_conv1d_case(const Sizes& z) {
  const Shape x = {z.batch, z.seqlen, z.channels + z.margin};
  const Shape state = {z.batch, z.channels, z.width};
  const auto elements = static_cast<double>(z.batch * z.seqlen * z.channels);
  OpCase c{
      .name = name_of_case(z),
      .inputs = {{.name = "x", .shape = x, .time = 1},
                 {.name = "state_in", .shape = state, .storage = Storage::Accumulate}},
      .params = {{.name = "weight", .shape = {z.channels, z.width}}},
      .outputs = {{.name = "y", .shape = x, .time = 1},
                  {.name = "state_out", .shape = state, .storage = Storage::Accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .step = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state"]); },
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return causal_conv1d_case(other);
          },
      .bytes_forward = 8.0 * elements,
      .bytes_backward = 12.0 * elements,
  };
  if (z.bias) c.params.push_back({.name = "bias", .shape = {z.channels}});
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 0,
                  .high = static_cast<double>(z.seqlen + 1)}};
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const std::int64_t width : {1, 2, 3, 4, 5})
    for (const std::int64_t seqlen : {1, 2, 3, 4, 5, 6})
      if (seqlen == 1 || (seqlen >= width - 1 && seqlen <= width + 1))
        all.push_back(causal_conv1d_case({2, seqlen, 3, width}));
  for (const std::int64_t width : {2, 3, 4, 6}) {
    all.push_back(causal_conv1d_case({5, 7, 8, width, Activation::Silu, 0, true, true}));
    all.push_back(causal_conv1d_case({3, 5, 3, width, Activation::Identity, 2, false, true}));
  }
  for (const Sizes& z : {
           Sizes{2, 70, 8, 4},                                   // vectors, chunks
           Sizes{2, 67, 4, 3, Activation::Silu, 0, true, true},  // chunks of other widths
           Sizes{2, 41, 4, 2, Activation::Identity, 0, true, true},
           Sizes{1, 131, 3, 4},                                  // single channels, chunks
           Sizes{1, 67, 2, 7},                                   // the plain kernels
           Sizes{3, 70, 4, 4, Activation::Silu, 0, true, true},  // lengths and chunks
           Sizes{2, 6, 16, 4, Activation::Silu, 8},              // aligned column slices
           Sizes{2, 6, 16, 3, Activation::Silu, 5},              // unaligned column slices
           Sizes{2, 9, 4, 4, Activation::Identity, 0, false},
       })
    all.push_back(causal_conv1d_case(z));
  // More channels than a warp takes, the last tile in part.
  for (const std::int64_t width : {2, 3, 4}) {
    all.push_back(causal_conv1d_case({3, 37, 264, width, Activation::Silu, 0, true, true}));
    all.back().gradcheck = false;
  }
  return all;
}

OpCase causal_conv1d_step_case(const Sizes& z) {
  OpCase c = causal_conv1d_case(z);
  c.name = detail::concat("causal_conv1d_step/B:", z.batch, "/C:", z.channels, "/K:", z.width);
  c.forward = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state_out"]); };
  return step_case(std::move(c));
}

std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const Sizes& z :
       {Sizes{8, 2048, 1536, 4}, Sizes{8, 2048, 5120, 4}, Sizes{1, 65536, 1536, 4}}) {
    all.push_back(causal_conv1d_case(z));
    all.back().gradcheck = false;
  }
  all.push_back(causal_conv1d_step_case({32, 1, 1536, 4}));
  return all;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
