#include "lrnn/ops/rglru_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, channels;
  bool lengths = false;
  double low = -1.0;  // of a_log
  double high = 5.0;
  double c = 8.0;
};

RglruScanInputs inputs(Tensors& t, double c) {
  return {.v = t["v"],
          .pre_r = t["pre_r"],
          .pre_i = t["pre_i"],
          .a_log = t["a_log"],
          .c = c,
          .lengths = t["lengths"],
          .state_in = t["state_in"]};
}

std::function<void(Context&, Tensors&)> forward(double c) {
  return [c](Context& ctx, Tensors& t) {
    rglru_scan_forward(ctx, {.in = inputs(t, c),
                             .h = t["h"],
                             .state_out = t["state_out"],
                             .chunk_states = t["chunk_states"]});
  };
}
std::function<void(Context&, Tensors&)> backward(double c) {
  return [c](Context& ctx, Tensors& t) {
    rglru_scan_backward(ctx, {.in = inputs(t, c),
                              .dh = t["dh"],
                              .chunk_states = t["chunk_states"],
                              .dstate_out = t["dstate_out"],
                              .dv = t["dv"],
                              .dpre_r = t["dpre_r"],
                              .dpre_i = t["dpre_i"],
                              .da_log = t["da_log"],
                              .dstate_in = t["dstate_in"]});
  };
}
std::function<void(Context&, Tensors&)> step(double c, const char* state = "state") {
  return [=](Context& ctx, Tensors& t) {
    rglru_scan_step(
        ctx,
        {.in = {.v = t["v"], .pre_r = t["pre_r"], .pre_i = t["pre_i"], .a_log = t["a_log"], .c = c},
         .h = t["h"],
         .state = t[state]});
  };
}

OpCase rglru_scan_case(const Sizes& z) {
  const Shape sequence = {z.batch, z.seqlen, z.channels};
  const Shape state = {z.batch, z.channels};
  const Shape chunks = {z.batch, rglru_scan_chunks(z.seqlen), z.channels};
  const auto accumulate = Storage::Accumulate;
  const auto elements = static_cast<double>(sequence.numel());
  OpCase c{
      .name = detail::concat("rglru_scan/B:", z.batch, "/L:", z.seqlen, "/E:", z.channels,
                             "/a_log:", z.low, "..", z.high, z.lengths ? "/lengths" : ""),
      .inputs = {{.name = "v", .shape = sequence, .time = 1},
                 {.name = "pre_r", .shape = sequence, .low = -4, .high = 4, .time = 1},
                 {.name = "pre_i", .shape = sequence, .low = -4, .high = 4, .time = 1},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params = {{.name = "a_log",
                  .shape = {z.channels},
                  .low = z.low,
                  .high = z.high,
                  .storage = accumulate}},
      .outputs = {{.name = "h", .shape = sequence, .time = 1},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .saved = {{.name = "chunk_states", .shape = chunks, .storage = accumulate}},
      .forward = forward(z.c),
      .backward = backward(z.c),
      .step = step(z.c),
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return rglru_scan_case(other);
          },
      .bytes_forward = 4.0 * 4.0 * elements,   // v, pre_r, pre_i; h
      .bytes_backward = 7.0 * 4.0 * elements,  // and dh; dv, dpre_r, dpre_i
  };
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 1,
                  .high = static_cast<double>(z.seqlen + 1)}};
  return c;
}

OpCase rglru_scan_step_case(const Sizes& z) {
  OpCase c = rglru_scan_case(z);
  c.name = detail::concat("rglru_scan_step/B:", z.batch, "/E:", z.channels);
  c.forward = step(z.c, "state_out");
  return step_case(std::move(c));
}

OpCase without_gradcheck(OpCase c) {
  c.gradcheck = false;
  return c;
}

const RegisterOpCases kRegister({
    rglru_scan_case({1, 1, 1}), rglru_scan_case({2, 5, 3}), rglru_scan_case({1, 9, 17}),
    rglru_scan_case({3, 7, 8, true}), rglru_scan_case({2, 8, 5}),  // a full chunk
    rglru_scan_case({2, 64, 5}),                                   // a full tile of CUDA
    rglru_scan_case({2, 65, 5}),                                   // one past it
    rglru_scan_case({1, 200, 3}),                                  // several chunks
    rglru_scan_case({3, 200, 3, true}),                            // lengths that end in any chunk
    rglru_scan_case({2, 9, 4, false, 12.0, 20.0}),                 // a within 1e-4 of 1
    rglru_scan_case({2, 9, 4, false, -3.0, 0.0, 2.0}),             // a far from 1, another c
    rglru_scan_case({2, 9, 4, false, 30.0, 80.0}),                 // a rounds to 1 in float
    without_gradcheck(rglru_scan_case({2, 300, 96})),
    without_gradcheck(rglru_scan_case({3, 1100, 34, true})),
    without_gradcheck(rglru_scan_case({2, 700, 40, true})),    // a cluster, half a tile of channels
    without_gradcheck(rglru_scan_case({1, 4500, 33})),         // a cluster, channels that are odd
    without_gradcheck(rglru_scan_case({97, 390, 20, true})),   // a few rounds of a cluster
    without_gradcheck(rglru_scan_case({420, 130, 24, true})),  // sequences enough for single blocks
});

const RegisterBenchCases kRegisterBench({
    rglru_scan_case({8, 2048, 2560}),
    rglru_scan_case({1, 65536, 2560}),
    rglru_scan_case({8, 2048, 768}),
    rglru_scan_case({32, 2048, 128}),
    rglru_scan_step_case({32, 1, 2560}),
});

}  // namespace
}  // namespace lrnn::testing
