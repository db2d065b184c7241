#include "lrnn/ops/elementwise.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

// Columns [margin, margin + width) of an operand with `margin` columns beside them.
struct Sizes {
  std::int64_t rows, width;
  std::int64_t margin = 0;

  [[nodiscard]] Shape shape() const { return {rows, width + margin}; }
  [[nodiscard]] MutableTensorView columns(Tensor& t) const {
    return t.view().slice(1, margin, width);
  }
  [[nodiscard]] std::string suffix() const {
    return detail::concat("/T:", rows, "/C:", width,
                          margin > 0 ? detail::concat("/margin:", margin) : "");
  }
};

std::vector<Sizes> all_sizes() {
  return {{1, 1}, {3, 7}, {4, 16}, {3, 8, 8}, {3, 8, 3}, {70, 5}};
}

OpCase cast_case(const Sizes& z, Storage from, Storage to) {
  return {
      .name = detail::concat("cast", from == Storage::Accumulate ? "/wide" : "", "_to",
                             to == Storage::Accumulate ? "_wide" : "", z.suffix()),
      .inputs = {{.name = "x", .shape = z.shape(), .storage = from}},
      .outputs = {{.name = "y", .shape = z.shape(), .storage = to}},
      .forward =
          [z](Context& ctx, Tensors& t) {
            ctx.zero(t["y"]);
            cast(ctx, {.src = z.columns(t["x"]), .dst = z.columns(t["y"])});
          },
      .backward =
          [z](Context& ctx, Tensors& t) {
            ctx.zero(t["dx"]);
            cast(ctx, {.src = z.columns(t["dy"]), .dst = z.columns(t["dx"])});
          },
  };
}

OpCase transpose_case(const Sizes& z, Storage from, Storage to) {
  const auto turned = [z](Tensor& t) { return t.view().slice(1, z.margin, z.rows); };
  return {
      .name = detail::concat("transpose", from == Storage::Accumulate ? "/wide" : "", "_to",
                             to == Storage::Accumulate ? "_wide" : "", z.suffix()),
      .inputs = {{.name = "x", .shape = z.shape(), .storage = from}},
      .outputs = {{.name = "y", .shape = {z.width, z.rows + z.margin}, .storage = to}},
      .forward =
          [z, turned](Context& ctx, Tensors& t) {
            ctx.zero(t["y"]);
            transpose(ctx, {.src = z.columns(t["x"]), .dst = turned(t["y"])});
          },
      .backward =
          [z, turned](Context& ctx, Tensors& t) {
            ctx.zero(t["dx"]);
            transpose(ctx, {.src = turned(t["dy"]), .dst = z.columns(t["dx"])});
          },
  };
}

// y = 0.75 + a + b, with operands of both dtypes.
OpCase fill_and_add_case(const Sizes& z) {
  return {
      .name = detail::concat("fill_and_add_to", z.suffix()),
      .inputs = {{.name = "a", .shape = z.shape()},
                 {.name = "b", .shape = z.shape(), .storage = Storage::Accumulate}},
      .outputs = {{.name = "y", .shape = z.shape()}},
      .forward =
          [z](Context& ctx, Tensors& t) {
            fill(ctx, {.dst = t["y"], .value = 0.75});
            add_to(ctx, {.src = z.columns(t["a"]), .dst = z.columns(t["y"])});
            add_to(ctx, {.src = z.columns(t["b"]), .dst = z.columns(t["y"])});
          },
      .backward =
          [z](Context& ctx, Tensors& t) {
            for (const char* name : {"da", "db"}) {
              fill(ctx, {.dst = t[name], .value = 0});
              add_to(ctx, {.src = z.columns(t["dy"]), .dst = z.columns(t[name])});
            }
          },
  };
}

// `apart`: backward by scale_columns and sum_columns.
OpCase scale_columns_case(const Sizes& z, bool apart = false) {
  return {
      .name = detail::concat(apart ? "scale_columns_apart" : "scale_columns", z.suffix()),
      .inputs = {{.name = "x", .shape = z.shape()}},
      .params = {{.name = "scale", .shape = {z.width}, .storage = Storage::Accumulate}},
      .outputs = {{.name = "y", .shape = z.shape()}},
      .forward =
          [z](Context& ctx, Tensors& t) {
            ctx.zero(t["y"]);
            scale_columns(
                ctx, {.src = z.columns(t["x"]), .scale = t["scale"], .dst = z.columns(t["y"])});
          },
      .backward =
          [z, apart](Context& ctx, Tensors& t) {
            ctx.zero(t["dx"]);
            if (!apart)
              return scale_columns_backward(ctx, {.dy = z.columns(t["dy"]),
                                                  .x = z.columns(t["x"]),
                                                  .scale = t["scale"],
                                                  .dx = z.columns(t["dx"]),
                                                  .dscale = t["dscale"]});
            scale_columns(
                ctx, {.src = z.columns(t["dy"]), .scale = t["scale"], .dst = z.columns(t["dx"])});
            sum_columns(ctx, {.a = z.columns(t["dy"]), .b = z.columns(t["x"]), .out = t["dscale"]});
          },
  };
}

// The gradient of a column sum is its cotangent in every row.
OpCase sum_columns_case(const Sizes& z) {
  OpCase c{
      .name = detail::concat("sum_columns", z.suffix()),
      .inputs = {{.name = "x", .shape = z.shape()}},
      .outputs = {{.name = "sums", .shape = {z.width}, .storage = Storage::Accumulate}},
      .forward =
          [z](Context& ctx, Tensors& t) {
            ctx.zero(t["sums"]);
            sum_columns(ctx, {.a = z.columns(t["x"]), .out = t["sums"]});
          },
      .backward =
          [z](Context& ctx, Tensors& t) {
            ctx.zero(t["dx"]);
            for (std::int64_t r = 0; r < z.rows; ++r)
              cast(ctx, {.src = t["dsums"].view().reshape({1, z.width}),
                         .dst = z.columns(t["dx"]).slice(0, r, 1)});
          },
  };
  return c;
}

OpCase mask_padding_case(std::int64_t batch, std::int64_t seqlen, std::int64_t width) {
  const Shape shape = {batch, seqlen, width};
  return {
      .name = detail::concat("mask_padding/B:", batch, "/L:", seqlen, "/C:", width),
      .inputs = {{.name = "x", .shape = shape, .time = 1}},
      .indices = {{.name = "lengths",
                   .shape = {batch},
                   .low = 0,
                   .high = static_cast<double>(seqlen + 1)}},
      .outputs = {{.name = "y", .shape = shape, .time = 1}},
      .forward =
          [](Context& ctx, Tensors& t) {
            ctx.copy(t["y"], t["x"]);
            mask_padding(ctx, {.x = t["y"], .lengths = t["lengths"]});
          },
      .backward =
          [](Context& ctx, Tensors& t) {
            ctx.copy(t["dx"], t["dy"]);
            mask_padding(ctx, {.x = t["dx"], .lengths = t["lengths"]});
          },
  };
}

std::vector<OpCase> cases() {
  const auto narrow = Storage::Activation;
  const auto wide = Storage::Accumulate;
  std::vector<OpCase> all;
  for (const Sizes& z : all_sizes()) {
    all.push_back(transpose_case(z, narrow, narrow));
    all.push_back(transpose_case(z, wide, narrow));
    all.push_back(cast_case(z, narrow, narrow));
    all.push_back(cast_case(z, narrow, wide));
    all.push_back(cast_case(z, wide, narrow));
    all.push_back(fill_and_add_case(z));
    all.push_back(scale_columns_case(z));
    all.push_back(scale_columns_case(z, true));
    all.push_back(sum_columns_case(z));
  }
  for (const Sizes& z : {Sizes{1030, 3}, Sizes{2100, 40}}) {  // more than one partial sum
    all.push_back(scale_columns_case(z));
    all.push_back(sum_columns_case(z));
    all[all.size() - 2].gradcheck = false;
    all.back().gradcheck = false;
  }
  all.push_back(mask_padding_case(1, 1, 1));
  all.push_back(mask_padding_case(5, 3, 7));
  all.push_back(mask_padding_case(4, 6, 16));
  return all;
}

OpCase without_gradcheck(OpCase c) {
  c.gradcheck = false;
  return c;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({
    without_gradcheck(cast_case({16384, 1536}, Storage::Activation, Storage::Accumulate)),
    without_gradcheck(scale_columns_case({16384, 1536})),
});

}  // namespace
}  // namespace lrnn::testing
