#include <cmath>

#include "lrnn/ops/attention.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, heads, heads_kv, head_dim;
  bool causal = true;
  bool lengths = false;
  std::int64_t cached = 0;  // at most so many keys precede the chunk
};

AttentionInputs inputs(const Sizes& z, Tensors& t) {
  return {.q = t["q"],
          .k = t["k"],
          .v = t["v"],
          .num_heads = z.heads,
          .num_heads_kv = z.heads_kv,
          .softmax_scale = 1.0 / std::sqrt(static_cast<double>(z.head_dim)),
          .causal = z.causal,
          .lengths = t["lengths"],
          .positions = t["positions"]};
}

OpCase attention_case(const Sizes& z) {
  const Shape q = {z.batch, z.seqlen, z.heads * z.head_dim};
  const Shape k = {z.batch, z.seqlen + z.cached, z.heads_kv * z.head_dim};
  const double products = 4.0 * static_cast<double>(z.batch * z.heads * z.seqlen * z.seqlen) *
                          static_cast<double>(z.head_dim) / (z.causal ? 2 : 1);
  OpCase c{
      .name = detail::concat("attention/B:", z.batch, "/L:", z.seqlen, "/Hq:", z.heads,
                             "/Hk:", z.heads_kv, "/d:", z.head_dim, z.causal ? "" : "/full",
                             z.lengths ? "/lengths" : "",
                             z.cached > 0 ? detail::concat("/cached:", z.cached) : ""),
      .inputs = {{.name = "q", .shape = q, .time = 1},
                 {.name = "k", .shape = k, .time = z.cached > 0 ? -1 : 1},
                 {.name = "v", .shape = k, .time = z.cached > 0 ? -1 : 1}},
      .outputs = {{.name = "o", .shape = q, .time = 1}},
      .saved = {{.name = "lse",
                 .shape = {z.batch, z.heads, z.seqlen},
                 .storage = Storage::Accumulate}},
      .forward =
          [z](Context& ctx, Tensors& t) {
            attention_forward(ctx, {.in = inputs(z, t), .o = t["o"], .lse = t["lse"]});
          },
      .backward =
          [z](Context& ctx, Tensors& t) {
            attention_backward(ctx, {.in = inputs(z, t),
                                     .o = t["o"],
                                     .lse = t["lse"],
                                     .d_o = t["do"],
                                     .dq = t["dq"],
                                     .dk = t["dk"],
                                     .dv = t["dv"]});
          },
      .flops_forward = products,
      .flops_backward = 2.5 * products,
  };
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 1,
                  .high = static_cast<double>(z.seqlen + 1)}};
  if (z.cached > 0)
    c.indices.push_back({.name = "positions",
                         .shape = {z.batch},
                         .low = 0,
                         .high = static_cast<double>(z.cached + 1)});
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all = {
      attention_case({1, 1, 1, 1, 1}),
      attention_case({2, 5, 2, 2, 4}),
      attention_case({2, 7, 4, 2, 3}),         // grouped, odd sizes
      attention_case({1, 6, 3, 1, 5}),         // one key/value head
      attention_case({2, 4, 2, 1, 4, false}),  // not causal
      attention_case({3, 6, 2, 2, 4, true, true}),
      attention_case({3, 6, 2, 1, 4, false, true}),
      attention_case({1, 33, 1, 1, 2}),  // one past a block of queries
      attention_case({2, 3, 2, 1, 4, true, false, 4}),
      attention_case({3, 1, 2, 1, 4, true, false, 5}),  // decoding
  };
  for (const std::int64_t head_dim : {32, 64, 80, 128})
    for (const std::int64_t seqlen : {63, 64, 65, 200}) {
      OpCase large = attention_case({2, seqlen, 4, 2, head_dim, true, seqlen == 65});
      large.gradcheck = false;
      all.push_back(large);
    }
  for (const Sizes& z :
       {Sizes{2, 130, 2, 2, 64, false}, Sizes{3, 400, 4, 2, 64, true, true},
        Sizes{3, 400, 4, 2, 128, true, true}, Sizes{3, 300, 2, 1, 128, false, true},
        Sizes{3, 300, 6, 2, 64, false, true}, Sizes{2, 200, 4, 2, 64, true, false, 300},
        Sizes{2, 130, 4, 2, 128, true, false, 270}, Sizes{2, 1100, 10, 2, 64}}) {
    OpCase large = attention_case(z);
    large.gradcheck = false;
    all.push_back(large);
  }
  return all;
}
const RegisterOpCases kRegister(cases());

const RegisterBenchCases kRegisterBench({
    attention_case({8, 2048, 12, 12, 64}),
    attention_case({2, 8192, 16, 16, 64}),
    attention_case({2, 8192, 16, 16, 128}),
    attention_case({1, 32768, 16, 16, 128}),
});

}  // namespace
}  // namespace lrnn::testing
