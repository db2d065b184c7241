#include "lrnn/ops/cross_entropy.hpp"
#include "lrnn/ops/elementwise.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, vocab;
  std::int64_t padding = 0;  // columns beyond the vocabulary
  std::int64_t margin = 0;   // columns beside the logits, whose rows are then column slices
  bool lengths = false;
  bool in_place = true;  // the gradient of the mean takes the place of (a copy of) the logits
};

MutableTensorView logits(const Sizes& z, Tensor& t) {
  return t.view()
      .reshape({z.batch * z.seqlen, z.vocab + z.padding + z.margin})
      .slice(1, z.margin, z.vocab + z.padding);
}
MutableTensorView flat(const Sizes& z, Tensor& t) {
  return t.view().reshape({z.batch * z.seqlen});
}

// The losses of all targets, and the gradient from the saved log-sum-exp.
void losses_forward(const Sizes& z, Context& ctx, Tensors& t) {
  t["counted"] = ctx.empty({z.batch, z.seqlen}, DType::int32);
  prepare_targets(ctx, {.targets = t["targets"],
                        .lengths = t["lengths"],
                        .counted = t["counted"],
                        .scale = t["scale"]});
  cross_entropy_forward(ctx, {.logits = logits(z, t["logits"]),
                              .targets = flat(z, t["counted"]),
                              .vocab_size = z.vocab,
                              .losses = flat(z, t["losses"]),
                              .lse = flat(z, t["lse"])});
}
void losses_backward(const Sizes& z, Context& ctx, Tensors& t) {
  if (z.margin > 0) ctx.zero(t["dlogits"]);
  cross_entropy_backward(ctx, {.dlosses = flat(z, t["dlosses"]),
                               .logits = logits(z, t["logits"]),
                               .targets = flat(z, t["counted"]),
                               .vocab_size = z.vocab,
                               .lse = flat(z, t["lse"]),
                               .dlogits = logits(z, t["dlogits"])});
}

// The mean loss, and the gradient from the fused pass: in place of a copy of the logits, or, where
// columns beside them must get no gradient or a copy must not be timed, into a tensor of its own.
void mean_forward(const Sizes& z, Context& ctx, Tensors& t) {
  losses_forward(z, ctx, t);
  mean_loss(ctx, {.losses = flat(z, t["losses"]), .scale = t["scale"], .loss = t["loss"]});
}
void mean_backward(const Sizes& z, Context& ctx, Tensors& t) {
  Tensor factor = ctx.empty({1}, t["scale"].dtype());
  scale_columns(ctx, {.src = t["dloss"], .scale = t["scale"], .dst = factor});
  const bool in_place = z.in_place && z.margin == 0;
  if (in_place)
    ctx.copy(t["dlogits"], t["logits"]);
  else if (z.margin > 0)
    ctx.zero(t["dlogits"]);
  cross_entropy_forward(ctx, {.logits = logits(z, in_place ? t["dlogits"] : t["logits"]),
                              .targets = flat(z, t["counted"]),
                              .vocab_size = z.vocab,
                              .losses = flat(z, t["losses"]),
                              .scale = factor,
                              .dlogits = logits(z, t["dlogits"])});
}

OpCase cross_entropy_case(const Sizes& z, bool mean) {
  const Shape tokens = {z.batch, z.seqlen};
  const Shape wide = {z.batch, z.seqlen, z.vocab + z.padding + z.margin};
  const auto accumulate = Storage::Accumulate;
  const Operand losses = {.name = "losses", .shape = tokens, .time = 1, .storage = accumulate};
  OpCase c{
      .name = detail::concat("cross_entropy/", mean ? "mean" : "losses", "/B:", z.batch,
                             "/L:", z.seqlen, "/V:", z.vocab, "/Vp:", z.vocab + z.padding,
                             z.margin > 0 ? detail::concat("/margin:", z.margin) : "",
                             z.lengths ? "/lengths" : ""),
      .inputs = {{.name = "logits", .shape = wide, .low = -4, .high = 4, .time = 1}},
      .indices = {{.name = "targets",
                   .shape = tokens,
                   .low = 0,
                   .high = static_cast<double>(z.vocab),
                   .time = 1}},
      .outputs = {losses},
      .saved = {{.name = "lse", .shape = tokens, .storage = accumulate},
                {.name = "scale", .shape = {1}, .storage = accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { losses_forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { losses_backward(z, ctx, t); },
      .bytes_forward = 4.0 * static_cast<double>(z.batch * z.seqlen * z.vocab),
      .bytes_backward = 8.0 * static_cast<double>(z.batch * z.seqlen * z.vocab),
  };
  if (mean) {
    c.outputs = {{.name = "loss", .shape = {1}, .storage = accumulate}};
    c.saved.push_back(losses);
    c.forward = [z](Context& ctx, Tensors& t) { mean_forward(z, ctx, t); };
    c.backward = [z](Context& ctx, Tensors& t) { mean_backward(z, ctx, t); };
  }
  if (z.lengths)
    c.indices.push_back({.name = "lengths",
                         .shape = {z.batch},
                         .low = 0,
                         .high = static_cast<double>(z.seqlen + 1)});
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Sizes& z : {
           Sizes{1, 1, 1}, Sizes{2, 3, 5}, Sizes{1, 4, 8},
           Sizes{2, 3, 13, 3},           // padded to a multiple of 16 bytes
           Sizes{3, 4, 7, 2, 0, true},   // lengths
           Sizes{2, 2, 11, 5, 8},        // aligned column slices
           Sizes{2, 2, 11, 4, 3, true},  // unaligned column slices
       })
    for (const bool mean : {false, true}) all.push_back(cross_entropy_case(z, mean));
  for (const Sizes& z : {Sizes{2, 5, 1000, 24}, Sizes{1, 3, 9001}, Sizes{3, 700, 17, 7, 0, true},
                         Sizes{1, 2, 50257, 31}, Sizes{1, 3, 20001, 7, 0, false, false}})
    for (const bool mean : {false, true}) {
      all.push_back(cross_entropy_case(z, mean));
      all.back().gradcheck = false;
    }
  return all;
}

std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const bool mean : {false, true}) {
    all.push_back(cross_entropy_case({2, 2048, 50277, 11, 0, false, false}, mean));
    all.back().gradcheck = false;
  }
  return all;
}

const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
