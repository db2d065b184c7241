#include "lrnn/ops/linear.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t rows, in, out;
  bool bias = true;
  std::int64_t margin = 0;  // columns beside x and y, and beside the weight if `slice_weight`
  bool slice_weight = false;
};

MutableTensorView columns(const Sizes& z, Tensor& t, std::int64_t width) {
  return t.view().slice(1, z.margin, width);
}
MutableTensorView weight(const Sizes& z, Tensor& t) {
  return z.slice_weight ? columns(z, t, z.in) : t.view();
}

void forward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["y"]);
  linear_forward(ctx, {.x = columns(z, t["x"], z.in),
                       .weight = weight(z, t["weight"]),
                       .bias = t["bias"],
                       .y = columns(z, t["y"], z.out)});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["dx"]);
  linear_backward(ctx, {.dy = columns(z, t["dy"], z.out),
                        .x = columns(z, t["x"], z.in),
                        .weight = weight(z, t["weight"]),
                        .dx = columns(z, t["dx"], z.in),
                        .dweight = weight(z, t["dweight"]),
                        .dbias = t["dbias"]});
}

OpCase linear_case(const Sizes& z) {
  const double flops = 2.0 * static_cast<double>(z.rows * z.in * z.out);
  const auto x = static_cast<double>(z.rows * z.in);
  const auto y = static_cast<double>(z.rows * z.out);
  const auto w = static_cast<double>(z.in * z.out);
  OpCase c{
      .name =
          detail::concat("linear/T:", z.rows, "/I:", z.in, "/O:", z.out, z.bias ? "" : "/no_bias",
                         z.margin > 0 ? detail::concat("/margin:", z.margin) : "",
                         z.slice_weight ? "/weight_slice" : ""),
      .inputs = {{.name = "x", .shape = {z.rows, z.in + z.margin}}},
      .params = {{.name = "weight", .shape = {z.out, z.in + (z.slice_weight ? z.margin : 0)}}},
      .outputs = {{.name = "y", .shape = {z.rows, z.out + z.margin}}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .bytes_forward = 4.0 * (x + w + y),
      .bytes_backward = 4.0 * (2.0 * x + 3.0 * w + y),
      .flops_forward = flops,
      .flops_backward = 2.0 * flops,
  };
  if (z.bias) c.params.push_back({.name = "bias", .shape = {z.out}});
  return c;
}

// y = x W1^T + x W2^T, the second product accumulated, and the same for dx.
OpCase accumulate_case(std::int64_t rows, std::int64_t in, std::int64_t out) {
  const auto backward_of = [](Context& ctx, Tensors& t, const char* w, const char* dw, bool add) {
    linear_backward(ctx, {.dy = t["dy"],
                          .x = t["x"],
                          .weight = t[w],
                          .dx = t["dx"],
                          .dweight = t[dw],
                          .accumulate_dx = add});
  };
  return {
      .name = detail::concat("linear/accumulate/T:", rows, "/I:", in, "/O:", out),
      .inputs = {{.name = "x", .shape = {rows, in}}},
      .params = {{.name = "w1", .shape = {out, in}}, {.name = "w2", .shape = {out, in}}},
      .outputs = {{.name = "y", .shape = {rows, out}}},
      .forward =
          [](Context& ctx, Tensors& t) {
            linear_forward(ctx, {.x = t["x"], .weight = t["w1"], .y = t["y"]});
            linear_forward(ctx, {.x = t["x"], .weight = t["w2"], .y = t["y"], .accumulate = true});
          },
      .backward =
          [backward_of](Context& ctx, Tensors& t) {
            backward_of(ctx, t, "w1", "dw1", false);
            backward_of(ctx, t, "w2", "dw2", true);
          },
  };
}

OpCase without_gradcheck(OpCase c) {
  c.gradcheck = false;
  return c;
}

// Decoding: the weight is read once, and there is little else.
OpCase decode_case(std::int64_t rows, std::int64_t in, std::int64_t out) {
  OpCase c = linear_case({rows, in, out, false});
  c.gradcheck = false;
  c.backward = {};
  c.bytes_forward = 4.0 * static_cast<double>(in * out);
  return c;
}

const RegisterOpCases kRegister({
    linear_case({1, 1, 1}),
    linear_case({3, 5, 7}),
    linear_case({1, 16, 9}),  // one row, as in decoding
    linear_case({17, 8, 16}),
    linear_case({5, 1, 4, false}),
    linear_case({4, 6, 1}),
    linear_case({4, 8, 8, true, 8}),         // aligned column slices
    linear_case({4, 6, 5, true, 3}),         // unaligned column slices
    linear_case({4, 8, 8, false, 8, true}),  // of the weight as well
    linear_case({4, 6, 5, true, 3, true}),
    accumulate_case(3, 5, 4),
    accumulate_case(8, 16, 8),
    // Around the numbers of rows at which CUDA changes its product, and depths of whole and broken
    // 16-byte accesses.
    linear_case({2, 24, 13}),
    linear_case({4, 12, 5, false}),
    linear_case({5, 40, 9}),
    linear_case({8, 8, 31}),
    linear_case({9, 32, 7, false}),
    linear_case({15, 16, 17}),
    linear_case({16, 24, 8}),
    linear_case({16, 13, 6}),
    linear_case({16, 32, 11, true, 8, true}),
    accumulate_case(16, 40, 9),
    // There, depths and widths that change how the product is cut.
    without_gradcheck(linear_case({1, 776, 129})),
    without_gradcheck(linear_case({3, 3080, 33, false})),
    without_gradcheck(linear_case({4, 104, 4099})),
    without_gradcheck(linear_case({8, 1544, 80})),
    without_gradcheck(linear_case({16, 4104, 70})),
    without_gradcheck(linear_case({16, 192, 4100, false})),
    without_gradcheck(linear_case({1, 40, 16387})),
    without_gradcheck(linear_case({3, 40, 16387})),
    without_gradcheck(linear_case({7, 104, 16387, false})),
    without_gradcheck(linear_case({16, 104, 16387})),
    without_gradcheck(linear_case({17, 104, 16387})),
    without_gradcheck(linear_case({130, 96, 200})),
    without_gradcheck(linear_case({257, 129, 65})),
    without_gradcheck(linear_case({2, 600, 300, false})),
    // More rows, in tiles whole and broken; weights that go the same way with few rows.
    without_gradcheck(linear_case({17, 48, 136})),
    without_gradcheck(linear_case({32, 1544, 80, false})),
    without_gradcheck(linear_case({33, 200, 70})),
    without_gradcheck(linear_case({64, 776, 264, true, 8, true})),
    without_gradcheck(linear_case({65, 4104, 33, false})),
    without_gradcheck(linear_case({128, 1032, 130})),
    without_gradcheck(linear_case({100, 1544, 200})),
    without_gradcheck(linear_case({2, 2056, 130})),
    decode_case(16, 264, 16387),
    // Large weights of few columns, whose sum is cut into four.
    decode_case(70, 2056, 2048),
    decode_case(101, 2104, 2003),
    // Many columns: rows of y that are aligned, or none like another, more tiles than blocks.
    decode_case(17, 104, 16387),
    decode_case(33, 40, 25553),
    decode_case(65, 200, 16583),
    decode_case(128, 72, 16400),
    // And of more rows, which are not aligned.
    without_gradcheck(linear_case({130, 40, 1031})),
    decode_case(1900, 24, 1036),
    without_gradcheck(accumulate_case(20, 200, 24)),
    without_gradcheck(accumulate_case(70, 136, 33)),
    // Many rows, but few columns or little depth.
    without_gradcheck(linear_case({4100, 136, 24, false})),
    without_gradcheck(linear_case({4097, 200, 80, false, 8, true})),
    without_gradcheck(linear_case({4100, 40, 136, false})),
    without_gradcheck(linear_case({4099, 64, 72, false, 8})),
    // Gradients of weights in TF32: whole and broken tiles of either operand.
    without_gradcheck(linear_case({4099, 256, 128, false})),
    without_gradcheck(linear_case({4097, 72, 388, false, 8, true})),
    without_gradcheck(linear_case({5000, 300, 260})),
    // Large enough for the tensor cores of Hopper in float32: tiles whole and broken, slices, a
    // depth that is cut for the gradient of the weight.
    without_gradcheck(linear_case({4224, 512, 512})),
    without_gradcheck(linear_case({4212, 388, 452, false, 4})),
    without_gradcheck(linear_case({8200, 452, 64, false, 4, true})),
    without_gradcheck(accumulate_case(4100, 384, 516)),
    // So many that those of little depth have a kernel of their own, in tiles whole and broken.
    without_gradcheck(linear_case({6208, 344, 80})),
    without_gradcheck(linear_case({6203, 40, 344, true, 8, true})),
    without_gradcheck(linear_case({8461, 264, 128, false, 8})),
    without_gradcheck(linear_case({8461, 120, 264})),
    without_gradcheck(linear_case({16903, 264, 24})),
    without_gradcheck(accumulate_case(6203, 344, 96)),
    without_gradcheck(accumulate_case(6203, 72, 344)),
    // And those of few columns.
    without_gradcheck(linear_case({8200, 1032, 80})),
    without_gradcheck(linear_case({12003, 760, 104, false, 8})),
    without_gradcheck(linear_case({8205, 40, 1096, true, 8, true})),
    without_gradcheck(accumulate_case(8200, 1096, 72)),
    without_gradcheck(accumulate_case(8200, 48, 1096)),
});
const RegisterBenchCases kRegisterBench({
    without_gradcheck(linear_case({16384, 768, 3072, false})),
    without_gradcheck(linear_case({16384, 1536, 768, false})),
    without_gradcheck(linear_case({16384, 1536, 80, false})),
    without_gradcheck(linear_case({16384, 48, 1536, false})),
    decode_case(1, 768, 3072),
    decode_case(1, 1536, 80),
    decode_case(1, 48, 1536),
    decode_case(1, 1536, 768),
    decode_case(1, 768, 50288),
    decode_case(16, 768, 3072),
    decode_case(16, 1536, 80),
    decode_case(16, 48, 1536),
    decode_case(16, 1536, 768),
    decode_case(16, 768, 50288),
    decode_case(64, 768, 3072),
    decode_case(64, 1536, 80),
    decode_case(64, 48, 1536),
    decode_case(64, 1536, 768),
    decode_case(128, 768, 3072),
    decode_case(128, 1536, 80),
    decode_case(128, 48, 1536),
    decode_case(128, 1536, 768),
    decode_case(1, 2048, 8192),
    decode_case(1, 4096, 2048),
    decode_case(16, 2048, 8192),
    decode_case(16, 4096, 2048),
    decode_case(128, 4096, 2048),
});

}  // namespace
}  // namespace lrnn::testing
