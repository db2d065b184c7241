#include "lrnn/ops/first_order_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, seqlen, channels;
  bool log = false;  // whether the logarithm of the multiplier is given
  bool lengths = false;
  double low = -1.1;  // of the multiplier, or of its logarithm
  double high = 1.0;
};

FirstOrderScanInputs inputs(const Sizes& z, Tensors& t) {
  FirstOrderScanInputs in{.b = t["b"], .lengths = t["lengths"], .state_in = t["state_in"]};
  (z.log ? in.log_a : in.a) = t["gate"];
  return in;
}

void forward(const Sizes& z, Context& ctx, Tensors& t) {
  first_order_scan_forward(ctx, {.in = inputs(z, t), .h = t["h"], .state_out = t["state_out"]});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  FirstOrderScanBackward args{.in = inputs(z, t),
                              .h = t["h"],
                              .dh = t["dh"],
                              .dstate_out = t["dstate_out"],
                              .db = t["db"],
                              .dstate_in = t["dstate_in"]};
  (z.log ? args.dlog_a : args.da) = t["dgate"];
  first_order_scan_backward(ctx, args);
}
void step(const Sizes& z, Context& ctx, Tensors& t, MutableTensorView state) {
  FirstOrderScanStep args{.in = {.b = t["b"]}, .h = t["h"], .state = state};
  (z.log ? args.in.log_a : args.in.a) = t["gate"];
  first_order_scan_step(ctx, args);
}

OpCase first_order_scan_case(const Sizes& z) {
  const Shape sequence = {z.batch, z.seqlen, z.channels};
  const Shape state = {z.batch, z.channels};
  const auto accumulate = Storage::Accumulate;
  const auto elements = static_cast<double>(sequence.numel());
  OpCase c{
      .name = detail::concat("first_order_scan/B:", z.batch, "/L:", z.seqlen, "/D:", z.channels,
                             z.log ? "/log_a:" : "/a:", z.low, "..", z.high,
                             z.lengths ? "/lengths" : ""),
      .inputs = {{.name = "gate",
                  .shape = sequence,
                  .low = z.low,
                  .high = z.high,
                  .time = 1,
                  .storage = z.log ? accumulate : Storage::Activation},
                 {.name = "b", .shape = sequence, .time = 1},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .outputs = {{.name = "h", .shape = sequence, .time = 1},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .step = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state"]); },
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return first_order_scan_case(other);
          },
      .bytes_forward = 3.0 * 4.0 * elements,   // gate, b; h
      .bytes_backward = 5.0 * 4.0 * elements,  // gate, h, dh; dgate, db
  };
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 1,
                  .high = static_cast<double>(z.seqlen + 1)}};
  return c;
}

OpCase first_order_scan_step_case(const Sizes& z) {
  OpCase c = first_order_scan_case(z);
  c.name = detail::concat("first_order_scan_step/B:", z.batch, "/D:", z.channels,
                          z.log ? "/log_a" : "/a");
  c.forward = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state_out"]); };
  return step_case(std::move(c));
}

OpCase without_gradcheck(OpCase c) {
  c.gradcheck = false;
  return c;
}

constexpr bool kLog = true;

const RegisterOpCases kRegister({
    first_order_scan_case({1, 1, 1}),
    first_order_scan_case({2, 5, 3, kLog, false, -3.0, 0.0}),
    first_order_scan_case({1, 9, 17}),
    first_order_scan_case({3, 7, 8, false, true}),
    first_order_scan_case({2, 64, 5}),  // a full tile of CUDA
    first_order_scan_case({2, 65, 5, kLog, false, -0.5, 0.0}),
    first_order_scan_case({3, 130, 3, false, true, 0.5, 1.0}),
    first_order_scan_case({3, 200, 3, kLog, true, -0.1, 0.0}),
    first_order_scan_case({2, 9, 4, kLog, false, -1e-4, 0.0}),  // hardly any decay
    first_order_scan_case({2, 9, 4, kLog, false, -100.0, -60.0}),
    without_gradcheck(first_order_scan_case({2, 300, 96, false, false, 0.0, 1.0})),
    without_gradcheck(first_order_scan_case({3, 1100, 34, kLog, true, -0.2, 0.0})),
    // A cluster, half a tile of channels; channels that are odd; enough sequences for single blocks.
    without_gradcheck(first_order_scan_case({2, 700, 40, kLog, true, -0.2, 0.0})),
    without_gradcheck(first_order_scan_case({1, 4500, 33, false, false, 0.5, 1.0})),
    without_gradcheck(first_order_scan_case({97, 390, 20, false, true, 0.5, 1.0})),
    without_gradcheck(first_order_scan_case({420, 130, 24, kLog, true, -1.0, 0.0})),
});

const RegisterBenchCases kRegisterBench({
    first_order_scan_case({8, 2048, 1536, false, false, 0.9, 1.0}),
    first_order_scan_case({8, 2048, 1536, kLog, false, -0.1, 0.0}),
    first_order_scan_case({1, 65536, 1536, kLog, false, -0.1, 0.0}),
    first_order_scan_step_case({32, 1, 1536, false, false, 0.9, 1.0}),
});

}  // namespace
}  // namespace lrnn::testing
