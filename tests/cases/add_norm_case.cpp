#include "lrnn/ops/add_norm.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

enum class Residual { None, Activation, Wide };

struct Sizes {
  std::int64_t rows, width;
  NormKind kind = NormKind::Rms;
  Residual residual = Residual::Wide;
  bool bias = true;  // Layer only
};

void forward(const Sizes& z, Context& ctx, Tensors& t) {
  const bool layer = z.kind == NormKind::Layer;
  add_norm_forward(ctx, {.kind = z.kind,
                         .x = t["x"],
                         .residual = t["residual"],
                         .weight = t["weight"],
                         .bias = t["bias"],
                         .eps = 1e-3,
                         .y = t["y"],
                         .residual_out = t["residual_out"],
                         .rstd = t["rstd"],
                         .mean = layer ? t["mean"].view() : MutableTensorView()});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  add_norm_backward(ctx, {.kind = z.kind,
                          .dy = t["dy"],
                          .r = z.residual == Residual::None ? t["x"] : t["residual_out"],
                          .weight = t["weight"],
                          .rstd = t["rstd"],
                          .mean = t["mean"],
                          .dresidual_out = t["dresidual_out"],
                          .dx = t["dx"],
                          .dresidual = t["dresidual"],
                          .dweight = t["dweight"],
                          .dbias = t["dbias"]});
}

OpCase add_norm_case(const Sizes& z) {
  const bool layer = z.kind == NormKind::Layer;
  const Shape x = {z.rows, z.width};
  const auto accumulate = Storage::Accumulate;
  const auto elements = static_cast<double>(z.rows * z.width);
  OpCase c{
      .name = detail::concat("add_norm/", layer ? "layer" : "rms", "/T:", z.rows, "/H:", z.width,
                             z.residual == Residual::None   ? "/no_residual"
                             : z.residual == Residual::Wide ? "/wide"
                                                            : "",
                             layer && !z.bias ? "/no_bias" : ""),
      .inputs = {{.name = "x", .shape = x}},
      .params = {{.name = "weight", .shape = {z.width}, .storage = accumulate}},
      .outputs = {{.name = "y", .shape = x}},
      .saved = {{.name = "rstd", .shape = {z.rows}, .storage = accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .bytes_forward = 16.0 * elements,
      .bytes_backward = 20.0 * elements,
  };
  if (layer) c.saved.push_back({.name = "mean", .shape = {z.rows}, .storage = accumulate});
  if (layer && z.bias)
    c.params.push_back({.name = "bias", .shape = {z.width}, .storage = accumulate});
  if (z.residual == Residual::None) return c;
  const auto storage = z.residual == Residual::Wide ? accumulate : Storage::Activation;
  c.inputs.push_back({.name = "residual", .shape = x, .storage = storage});
  c.outputs.push_back({.name = "residual_out", .shape = x, .storage = storage});
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const NormKind kind : {NormKind::Rms, NormKind::Layer}) {
    for (const std::int64_t width : {5, 8, 33, 64})
      for (const Residual residual : {Residual::None, Residual::Activation, Residual::Wide})
        all.push_back(add_norm_case({3, width, kind, residual}));
    all.push_back(add_norm_case({1, 16, kind}));
    all.push_back(add_norm_case({300, 3, kind}));  // more rows than blocks of backward
    // Every layout of the CUDA kernels: 1, 2, 3 accesses per lane, block rows, strided.
    for (const std::int64_t width : {256, 264, 768, 776, 4096, 4104, 8192, 8200, 1027}) {
      all.push_back(add_norm_case({9, width, kind}));
      all.back().gradcheck = false;
    }
    all.push_back(add_norm_case({2500, 40, kind}));  // several rows per warp of backward
    all.back().gradcheck = false;
    // Several rows per block of backward, 8 and 16 columns per thread.
    all.push_back(add_norm_case({601, 1032, kind, Residual::Activation}));
    all.back().gradcheck = false;
    all.push_back(add_norm_case({270, 4104, kind}));
    all.back().gradcheck = false;
    // The least rows that are many, by layout.
    for (const std::int64_t width : {248, 512, 768, 776, 4096, 4104}) {
      all.push_back(add_norm_case({513, width, kind}));
      all.back().gradcheck = false;
    }
  }
  // Rows of which a warp takes several in turns, not as many as others.
  for (const Sizes& z : {Sizes{8195, 520, NormKind::Layer},
                         Sizes{8192, 768, NormKind::Layer, Residual::Activation, false},
                         Sizes{10563, 584, NormKind::Layer, Residual::None}}) {
    all.push_back(add_norm_case(z));
    all.back().gradcheck = false;
  }
  all.push_back(add_norm_case({4, 1}));
  all.push_back(add_norm_case({4, 7, NormKind::Layer, Residual::Wide, false}));
  return all;
}

std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const NormKind kind : {NormKind::Rms, NormKind::Layer})
    for (const std::int64_t width : {768, 2560, 5120}) {
      all.push_back(add_norm_case({16384, width, kind}));
      all.back().gradcheck = false;
    }
  return all;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
