#include "lrnn/ops/projected_conv1d.hpp"

#include "support/norm_in_front.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, inputs, outputs, channels, width;
  std::int64_t side = 0;  // columns of the side projection
  Activation activation = Activation::Silu;
  bool biases = true;
  NormInFront norm = NormInFront::None;
};

void step(const Sizes& z, Context& ctx, Tensors& t, TensorView x, const AddNormForward* norm) {
  projected_conv1d_step(ctx, {.x = x,
                              .projection = t["projection"],
                              .projection_bias = t["projection_bias"],
                              .side_projection = t["side_projection"],
                              .side_bias = t["side_bias"],
                              .weight = t["weight"],
                              .bias = t["bias"],
                              .activation = z.activation,
                              .y = t["y"],
                              .side_y = t["side_y"],
                              .state = t["state_out"],
                              .norm = norm});
}

std::string name_of_case(const Sizes& z) {
  return detail::concat(
      "projected_conv1d/B:", z.batch, "/H:", z.inputs, "/N:", z.outputs, "/C:", z.channels,
      "/K:", z.width, z.side > 0 ? detail::concat("/M:", z.side) : "",
      z.activation == Activation::Silu ? "/silu" : "", z.biases ? "" : "/no_bias");
}

OpCase projected_conv1d_case(const Sizes& z) {
  const Shape state = {z.batch, z.channels, z.width};
  OpCase c{
      .name = name_of_case(z),
      .inputs = {{.name = "x", .shape = {z.batch, z.inputs}},
                 {.name = "state_in", .shape = state, .storage = Storage::Accumulate}},
      .params = {{.name = "projection", .shape = {z.outputs, z.inputs}},
                 {.name = "weight", .shape = {z.channels, z.width}}},
      .outputs = {{.name = "y", .shape = {z.batch, z.outputs}},
                  {.name = "state_out", .shape = state, .storage = Storage::Accumulate}},
      .forward = {},
  };
  if (z.biases) {
    c.params.push_back({.name = "projection_bias", .shape = {z.outputs}});
    c.params.push_back({.name = "bias", .shape = {z.channels}});
  }
  if (z.side > 0) {
    c.params.push_back({.name = "side_projection", .shape = {z.side, z.inputs}});
    if (z.biases) c.params.push_back({.name = "side_bias", .shape = {z.side}});
    c.outputs.push_back({.name = "side_y", .shape = {z.batch, z.side}});
  }
  return step_case(behind_norm(std::move(c), z.norm,
                               [z](Context& ctx, Tensors& t, TensorView x,
                                   const AddNormForward* norm) { step(z, ctx, t, x, norm); }));
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Sizes& z : {
           Sizes{1, 64, 48, 24, 4},                                 // vectors
           Sizes{3, 72, 40, 13, 4, 21, Activation::Identity},       // blocks in part, aside
           Sizes{4, 256, 96, 96, 3, 96, Activation::Silu, false},   // no columns beside
           Sizes{16, 136, 64, 32, 4, 64, Activation::Silu, false},  // most rows
           Sizes{17, 64, 32, 16, 4, 8},                             // the weight twice
           Sizes{33, 64, 32, 16, 4, 8},                             // the ops one by one
           Sizes{2, 37, 11, 5, 2, 3, Activation::Identity, false},  // the same: odd depth
           Sizes{1, 768, 3072, 1536, 4},                            // of a small Mamba
           // Many sequences, half of the columns channels: whole and broken tiles, parts of the
           // depth.
           Sizes{70, 136, 128, 64, 4},
           Sizes{128, 776, 256, 128, 4, 0, Activation::Identity, false},
           Sizes{97, 1536, 192, 96, 4},
       })
    all.push_back(projected_conv1d_case(z));
  // With the norm within the product: one row and the most, aside, blocks in part, the most depth.
  // Before it: more rows, more depth, odd depth, few rows of a large projection.
  for (const NormInFront norm : kNormsInFront)
    for (Sizes z :
         {Sizes{1, 64, 48, 24, 4}, Sizes{3, 72, 40, 13, 4, 21, Activation::Identity},
          Sizes{4, 256, 96, 96, 3, 96, Activation::Silu, false}, Sizes{5, 136, 64, 32, 4, 64},
          Sizes{2, 2040, 24, 8, 4}, Sizes{2, 2056, 24, 8, 4}, Sizes{17, 64, 32, 16, 4, 8},
          Sizes{2, 37, 11, 5, 2, 3}, Sizes{1, 768, 3072, 1536, 4}, Sizes{70, 136, 128, 64, 4}}) {
      z.norm = norm;
      all.push_back(projected_conv1d_case(z));
    }
  return all;
}
const RegisterOpCases kRegister(cases());

// Mamba-130m and 1.4b, RG-LRU.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const std::int64_t batch : {1, 32, 128}) {
    all.push_back(projected_conv1d_case({batch, 768, 3072, 1536, 4}));
    all.push_back(projected_conv1d_case({batch, 2048, 8192, 4096, 4}));
    all.push_back(projected_conv1d_case({batch, 768, 768, 768, 4, 768, Activation::Identity}));
  }
  for (const std::int64_t batch : {1, 16})
    all.push_back(projected_conv1d_case(
        {batch, 768, 768, 768, 4, 768, Activation::Identity, true, NormInFront::RmsWide}));
  return all;
}
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
