// The product with all projections, and what is behind it, on Hopper in one launch
// (s7_gated_step_sm90.cu), elsewhere in two: a block per token that contracts its projections,
// moves the state on, reads it out and applies GELU; and the product with the gate, whose epilogue
// gates and adds. Bound by latency. Sizes that the kernels do not take go through the ops one by
// one.
#include "lrnn/ops/linear.hpp"

#include "common/linear_two_products.cuh"
#include "common/s7_gated_step.cuh"
#include "ops/s7_gated_step_parts.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace s7 {
namespace {

constexpr std::int64_t kMostTokens = 1024;  // so that their projections take 32 MiB at most

template <class T, int kPer>
__global__ __launch_bounds__(kStepThreads) void s7_step_kernel(TokenArgs<T> a, T* v, T* gelu) {
  using Step = TokenStep<T, kPer>;
  __shared__ typename Step::Shared shared;
  let_next_kernel_start();
  Step step(a);
  wait_for_previous_kernel();
  const std::int64_t token = blockIdx.x;
  step.run(token, shared, [&](int channel, T value) {
    v[token * a.dim + channel] = value;
    gelu[token * a.dim + channel] = activated(value);
  });
}

/// y = sig(sum) v + hid.
template <class T>
struct Gate {
  DeviceRows<const T> v, hid;
  DeviceRows<T> y;

  struct Operands {
    float v, hid;
  };
  __device__ __forceinline__ Operands load(int r, int c) const {
    return {to_float(v.row(r)[c]), to_float(hid.row(r)[c])};
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, const Operands& o) const {
    y.row(r)[c] = gated<T>(sum, o.v, o.hid);
  }
};

template <class T>
few_rows::Args<T> gate_product(const S7GatedStep& a, TensorView gelu) {
  return {.x = device_rows<T>(gelu),
          .weight = device_rows<T>(a.gate),
          .rows = static_cast<int>(a.x.dim(0)),
          .columns = static_cast<int>(a.x.dim(2)),
          .depth = static_cast<int>(a.x.dim(2)),
          .stable_weight = true};
}

/// All behind the projections, in two launches.
template <class T, int kPer>
void step(Context& ctx, const S7GatedStep& a, TensorView P) {
  const cudaStream_t stream = ctx.stream().handle;
  const Shape shape = {a.x.dim(0), a.x.dim(2)};
  Tensor v = ctx.empty(shape, a.x.dtype());
  Tensor gelu = ctx.empty(shape, a.x.dtype());
  launch_overlapped(s7_step_kernel<T, kPer>, static_cast<unsigned>(shape[0]), kStepThreads, 0,
                    stream, token_args<T>(a, P), v.view().data<T>(), gelu.view().data<T>());
  few_rows::launch(stream, gate_product<T>(a, gelu),
                   Gate<T>{device_rows<T>(TensorView(v)), device_rows<T>(a.hid.reshape(shape)),
                           device_rows<T>(a.y.reshape(shape))});
}

/// Whether it did.
template <class T>
bool project_and_step(Context& ctx, const S7GatedStep& a) {
  const std::int64_t tokens = a.x.dim(0);
  const lrnn::detail::S7Rows rows{a.x.dim(2), a.base.dim(0)};
#ifdef LRNN_WITH_SM90A
  const bool sm90 = takes_sm90(a);
#else
  constexpr bool sm90 = false;
#endif
  if (tokens > kMostTokens || !(sm90 || few_rows::fuses<T>(a.x, a.gate))) return false;
  return visit_states<T>(rows.dim, rows.dstate, [&]<int kPer>() {
    Tensor P = ctx.empty({tokens, rows.count()}, a.x.dtype());
    lrnn::linear_forward(
        ctx,
        {.x = a.x.reshape({tokens, rows.dim}), .weight = a.weight, .y = P, .stable_weight = true});
#ifdef LRNN_WITH_SM90A
    if (sm90) return step_sm90(ctx, a, P);
#endif
    step<T, kPer>(ctx, a, P);
  });
}

}  // namespace
}  // namespace s7

void s7_gated_step(Context& ctx, const S7GatedStep& a) {
  visit_float("s7_gated_step", a.x.dtype(), [&]<class T>() {
    if (!s7::project_and_step<T>(ctx, a)) lrnn::detail::s7_gated_step_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
