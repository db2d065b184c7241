#include <algorithm>
#include <cmath>

#include "lrnn/ops/mamba_stack.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t layers, batch, inputs, channels, states, rank, width;
  bool conv_bias = true;
  bool narrow_residual = false;  // in bfloat16 runs
  bool residual = true;          // one enters

  [[nodiscard]] std::int64_t x_dbl() const { return rank + 2 * states; }
};

std::string of_layer(const char* operand, std::int64_t layer) {
  return detail::concat(operand, layer);
}

MambaStackLayer layer_of(Tensors& t, std::int64_t i) {
  const auto view = [&](const char* operand) { return t[of_layer(operand, i)].view(); };
  return {.norm_weight = view("norm_weight"),
          .in_proj = view("in_proj"),
          .conv_weight = view("conv_weight"),
          .conv_bias = view("conv_bias"),
          .x_proj = view("x_proj"),
          .dt_weight = view("dt_weight"),
          .dt_bias = view("dt_bias"),
          .A_log = view("A_log"),
          .D = view("D"),
          .out_proj = view("out_proj"),
          .conv_state = view("conv_state_out"),
          .lrnn_state = view("lrnn_state_out")};
}

void step(const Sizes& z, Context& ctx, Tensors& t) {
  std::vector<MambaStackLayer> layers;
  for (std::int64_t i = 0; i < z.layers; ++i) layers.push_back(layer_of(t, i));
  mamba_stack_step(ctx, {.layers = layers,
                         .x = t["x"],
                         .residual = t["residual"],
                         .y = t["y"],
                         .residual_out = t["residual_out"]});
}

void forward(const Sizes& z, Context& ctx, Tensors& t) {
  for (std::int64_t i = 0; i < z.layers; ++i)
    for (const char* state : {"conv_state", "lrnn_state"})
      ctx.copy(t[of_layer(detail::concat(state, "_out").c_str(), i)],
               t[of_layer(detail::concat(state, "_in").c_str(), i)]);
  step(z, ctx, t);
}

Operand uniform(const std::string& name, const Shape& shape, double bound,
                Storage storage = Storage::Activation) {
  return {.name = name, .shape = shape, .low = -bound, .high = bound, .storage = storage};
}

void add_layer(OpCase& c, const Sizes& z, std::int64_t i) {
  const auto add = [&](const char* operand, const Shape& shape, double fan_in) {
    c.params.push_back(uniform(of_layer(operand, i), shape, std::sqrt(3.0 / fan_in)));
  };
  const auto island = [&](const char* operand, const Shape& shape, double low, double high) {
    c.params.push_back({.name = of_layer(operand, i),
                        .shape = shape,
                        .low = low,
                        .high = high,
                        .storage = Storage::Accumulate});
  };
  const auto state = [&](const char* operand, const Shape& shape) {
    const std::string name = operand;
    c.inputs.push_back(uniform(of_layer((name + "_in").c_str(), i), shape, 1, Storage::Accumulate));
    c.outputs.push_back({.name = of_layer((name + "_out").c_str(), i),
                         .shape = shape,
                         .storage = Storage::Accumulate});
  };
  const auto channels = static_cast<double>(z.channels);
  island("norm_weight", {z.inputs}, 0.5, 1.5);
  add("in_proj", {2 * z.channels, z.inputs}, static_cast<double>(z.inputs));
  add("conv_weight", {z.channels, z.width}, static_cast<double>(z.width));
  if (z.conv_bias) add("conv_bias", {z.channels}, 4);
  add("x_proj", {z.x_dbl(), z.channels}, channels);
  add("dt_weight", {z.channels, z.rank}, static_cast<double>(z.rank));
  island("dt_bias", {z.channels}, -4.0, -1.0);
  island("A_log", {z.channels, z.states}, 0.0, 2.0);
  island("D", {z.channels}, 0.5, 1.5);
  add("out_proj", {z.inputs, z.channels}, channels);
  state("conv_state", {z.batch, z.channels, z.width});
  state("lrnn_state", {z.batch, z.channels, z.states});
}

OpCase mamba_stack_case(const Sizes& z) {
  const Shape rows = {z.batch, z.inputs};
  const Storage residual = z.narrow_residual ? Storage::Activation : Storage::Accumulate;
  OpCase c{
      .name = detail::concat("mamba_stack/layers:", z.layers, "/B:", z.batch, "/H:", z.inputs,
                             "/E:", z.channels, "/N:", z.states, "/R:", z.rank, "/K:", z.width,
                             z.conv_bias ? "" : "/no_bias", z.narrow_residual ? "/narrow" : "",
                             z.residual ? "" : "/first"),
      .inputs = {{.name = "x", .shape = rows}},
      .outputs = {{.name = "y", .shape = rows},
                  {.name = "residual_out", .shape = rows, .storage = residual}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .timed = [z](Context& ctx, Tensors& t) { step(z, ctx, t); },
  };
  // A float sum of K terms in turn is off by u^2 K / 6 of its square on average: its partial sums
  // grow as sqrt(k), and each is rounded by at most u = 2^-24 of it. A layer chains four sums.
  c.forward_nmse =
      std::max(c.forward_nmse,
               static_cast<double>(z.layers * (z.inputs + 2 * z.channels + z.rank)) * 0x1p-48 / 6);
  if (z.residual) c.inputs.push_back(uniform("residual", rows, 1, residual));
  for (std::int64_t i = 0; i < z.layers; ++i) add_layer(c, z, i);
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Sizes& z : {
           Sizes{2, 1, 768, 1536, 16, 48, 4},                      // one launch
           Sizes{3, 2, 256, 512, 16, 16, 4, false, false, false},  // nothing before
           Sizes{2, 2, 768, 1536, 16, 48, 4, true, true},          // rounded residual
           Sizes{25, 1, 256, 512, 16, 16, 4},                      // two launches before CUDA 12.1
           Sizes{1, 2, 1024, 2048, 16, 64, 4},                     // tiles of all rows
           Sizes{1, 1, 1536, 3072, 16, 96, 4},                     // and of half of them
           Sizes{1, 1, 2048, 4096, 16, 128, 4},                    // weights in many parts
           Sizes{6, 3, 256, 512, 16, 16, 4, false, true, false},   // many sequences: all turns
           Sizes{2, 16, 768, 1536, 16, 48, 4},                     // all of them
           Sizes{26, 9, 256, 512, 16, 16, 4},                      // two launches before CUDA 12.1
           Sizes{2, 8, 1024, 2048, 16, 64, 4},                     // half of the sequences
           Sizes{2, 11, 1536, 3072, 16, 96, 4},                    // operands in two parts
           Sizes{2, 16, 2048, 4096, 16, 128, 4, true, true},       // out_proj by two blocks
           Sizes{2, 5, 2048, 4096, 16, 128, 4},                    // and some of the sequences
           Sizes{2, 17, 256, 512, 16, 16, 4},                      // by parts: sequences
           Sizes{3, 128, 256, 512, 16, 16, 4},                     // no norms between layers
           Sizes{2, 65, 768, 1536, 16, 48, 4, false, false, false},
           Sizes{2, 99, 1024, 2048, 16, 64, 4},            // panels of W in turns
           Sizes{2, 70, 320, 576, 16, 16, 4},              // a part of K without panels
           Sizes{2, 67, 128, 4608, 16, 16, 4},             // panels of x_proj in turns
           Sizes{2, 65, 2048, 2112, 16, 16, 4},            // weights that leave L2 first
           Sizes{2, 68, 1088, 4160, 16, 16, 4},            // panels of a wide out_proj in turns
           Sizes{2, 65, 2048, 4096, 16, 128, 4},           // sums received behind panels in turns
           Sizes{2, 66, 256, 512, 16, 16, 4, true, true},  // by parts: rounded residual
           Sizes{2, 129, 256, 512, 16, 16, 4},             // by parts: sequences
           Sizes{2, 1, 6, 9, 3, 2, 3, true, true},         // by parts: sizes
       })
    all.push_back(mamba_stack_case(z));
  return all;
}
const RegisterOpCases kRegister(cases());
// Mamba-130m.
const RegisterBenchCases kRegisterBench({mamba_stack_case({24, 1, 768, 1536, 16, 48, 4}),
                                         mamba_stack_case({24, 16, 768, 1536, 16, 48, 4}),
                                         // Two layers of Mamba-1.4b.
                                         mamba_stack_case({2, 1, 2048, 4096, 16, 128, 4}),
                                         mamba_stack_case({2, 16, 2048, 4096, 16, 128, 4}),
                                         mamba_stack_case({2, 128, 2048, 4096, 16, 128, 4})});

}  // namespace
}  // namespace lrnn::testing
