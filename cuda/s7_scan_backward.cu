// Backward of S7's factored scan.
//
// Per tile of tokens: GEMM x W_C^T, contraction over channels with dy -> P [T, N]; reverse chunked
// scan -> g, dA; then per tile the GEMM x W_B^T contracted over states with g, and the rank-one
// rows (x outer g) and (dy outer s), formed in L2, as left operands of the GEMMs that give dx and
// the gradients of W_B and W_C. Bound by six GEMMs of 2 T H^2 N multiply-adds.
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "common/s7_contract.cuh"
#include "ops/dispatch.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace {

using s7::Chunks;
using s7::kAhead;
using s7::kChunk;
using s7::kThreads;

// Valid steps of a chunk: [first, first + steps) of the sequence.
struct Span {
  std::int64_t first;
  int steps;

  __device__ Span(const Chunks& c, int b, int chunk) {
    first = static_cast<std::int64_t>(chunk) * kChunk;
    const std::int64_t end = min(min(c.seqlen, first + kChunk), c.length(b));
    steps = end > first ? static_cast<int>(end - first) : 0;
  }
};

// What a chunk hands to the one on its left: carry = sum + product * (carry from its right).
__global__ __launch_bounds__(kThreads) void reverse_ends_kernel(Chunks c,
                                                                const float* __restrict__ A,
                                                                const float* __restrict__ P,
                                                                float2* __restrict__ ends) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c.count()) return;
  const int n = static_cast<int>(i % c.dstate);
  const int chunk = static_cast<int>(i / c.dstate % c.chunks);
  const int b = static_cast<int>(i / c.dstate / c.chunks);
  const Span span(c, b, chunk);
  float product = 1.0F;
  float carry = 0.0F;
  const std::int64_t base = (b * c.seqlen + span.first) * c.dstate + n;
  for (int last = span.steps - 1; last >= 0; last -= kAhead) {
    float a[kAhead];
    float gradient[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const std::int64_t at = base + static_cast<std::int64_t>(last - k) * c.dstate;
      a[k] = last >= k ? s7::multiplier(A[at]) : 1.0F;
      gradient[k] = last >= k ? P[at] : 0.0F;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      product *= a[k];
      carry = a[k] * (gradient[k] + carry);
    }
  }
  ends[i] = {product, carry};
}

// One thread per (batch, state): the carry that enters each chunk from the right.
__global__ __launch_bounds__(kThreads) void reverse_carry_kernel(
    Chunks c, const float* __restrict__ dstate_out, const float2* __restrict__ ends,
    float* __restrict__ entering) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= c.batch * c.dstate) return;
  const int b = i / c.dstate;
  const int n = i % c.dstate;
  float carry = dstate_out != nullptr ? dstate_out[i] : 0.0F;
#pragma unroll kAhead
  for (int chunk = c.chunks - 1; chunk >= 0; --chunk) {
    const std::int64_t at = (static_cast<std::int64_t>(b) * c.chunks + chunk) * c.dstate + n;
    entering[at] = carry;
    if (chunk > 0) carry = fmaf(ends[at].x, carry, ends[at].y);
  }
}

// Replaces P by g and writes dA.
__global__ __launch_bounds__(kThreads) void reverse_replay_kernel(
    Chunks c, const float* __restrict__ A, const float* __restrict__ s,
    const float* __restrict__ state_in, const float* __restrict__ entering, float* __restrict__ g,
    float* __restrict__ dA, float* __restrict__ dstate_in) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c.count()) return;
  const int n = static_cast<int>(i % c.dstate);
  const int chunk = static_cast<int>(i / c.dstate % c.chunks);
  const int b = static_cast<int>(i / c.dstate / c.chunks);
  const Span span(c, b, chunk);
  const auto steps_in_chunk =
      static_cast<int>(min(c.seqlen - span.first, static_cast<std::int64_t>(kChunk)));
  const std::int64_t base = (b * c.seqlen + span.first) * c.dstate + n;
  for (int t = steps_in_chunk - 1; t >= span.steps; --t) {
    const std::int64_t at = base + static_cast<std::int64_t>(t) * c.dstate;
    g[at] = 0.0F;
    dA[at] = 0.0F;
  }
  float carry = entering[i];
  const std::int64_t row = static_cast<std::int64_t>(b) * c.dstate + n;
  for (int last = span.steps - 1; last >= 0; last -= kAhead) {
    float A_t[kAhead];
    float before[kAhead];
    float from_output[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const std::int64_t at = base + static_cast<std::int64_t>(last - k) * c.dstate;
      const bool valid = last >= k;
      A_t[k] = valid ? A[at] : 0.0F;
      from_output[k] = valid ? g[at] : 0.0F;
      before[k] = 0.0F;
      if (valid && span.first + last > k)
        before[k] = s[at - c.dstate];
      else if (valid && state_in != nullptr)
        before[k] = state_in[row];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (last < k) break;
      const std::int64_t at = base + static_cast<std::int64_t>(last - k) * c.dstate;
      const float square = fmaf(A_t[k], A_t[k], 0.5F);
      const float gradient = from_output[k] + carry;
      g[at] = gradient;
      dA[at] = gradient * before[k] * 2.0F * A_t[k] / (square * square);
      carry = s7::multiplier(A_t[k]) * gradient;
    }
  }
  if (dstate_in != nullptr && chunk == 0) dstate_in[row] = carry;
}

// Gradients of the small projections: dA in the activation dtype and [dy x | g].
template <class T>
__global__ __launch_bounds__(kThreads) void small_rows_kernel(
    const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ g,
    const float* __restrict__ dA, T* __restrict__ dA_out, T* __restrict__ dD_bias, int dim,
    int dstate) {
  const auto token = static_cast<std::int64_t>(blockIdx.x);
  T* const row = dD_bias + token * (dim + dstate);
  for (int h = static_cast<int>(threadIdx.x); h < dim; h += kThreads)
    row[h] = from_float<T>(to_float(dy[token * dim + h]) * to_float(x[token * dim + h]));
  for (int n = static_cast<int>(threadIdx.x); n < dstate; n += kThreads) {
    row[dim + n] = from_float<T>(g[token * dstate + n]);
    dA_out[token * dstate + n] = from_float<T>(dA[token * dstate + n]);
  }
}

unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

void reverse_scan(Context& ctx, const S7ScanBackward& a, const Chunks& c, float* g, float* dA) {
  const cudaStream_t stream = ctx.stream().handle;
  Tensor ends = ctx.empty({c.count(), 2}, DType::float32);
  Tensor entering = ctx.empty({c.count()}, DType::float32);
  auto* const end_data = reinterpret_cast<float2*>(ends.view().data<float>());
  float* const entering_data = entering.view().data<float>();
  if (c.chunks > 1) {
    reverse_ends_kernel<<<blocks_for(c.count()), kThreads, 0, stream>>>(c, a.A.data<float>(), g,
                                                                        end_data);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  reverse_carry_kernel<<<blocks_for(static_cast<std::int64_t>(c.batch) * c.dstate), kThreads, 0,
                         stream>>>(c, a.dstate_out ? a.dstate_out.data<float>() : nullptr, end_data,
                                   entering_data);
  LRNN_CUDA_CHECK_LAUNCH();
  reverse_replay_kernel<<<blocks_for(c.count()), kThreads, 0, stream>>>(
      c, a.A.data<float>(), a.s.data<float>(), a.state_in ? a.state_in.data<float>() : nullptr,
      entering_data, g, dA, a.dstate_in ? a.dstate_in.data<float>() : nullptr);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
class Backward {
 public:
  Backward(Context& ctx, const S7ScanBackward& a)
      : ctx_(ctx),
        a_(a),
        stream_(ctx.stream().handle),
        seqlen_(a.x.dim(1)),
        dim_(a.x.dim(2)),
        dstate_(a.A.dim(2)),
        tokens_(a.x.dim(0) * seqlen_),
        rows_{dim_, dstate_},
        tile_(std::min(tokens_, s7::tile_tokens(dim_, dstate_, sizeof(T)))),
        x_(a.x.reshape({tokens_, dim_})),
        P_(ctx.empty({tile_, dim_ * dstate_}, a.x.dtype())),
        g_(ctx.empty({tokens_, dstate_}, DType::float32)) {}

  void run() {
    if (a_.lengths) {  // what stands at padding must not reach any sum
      dy_masked_ = ctx_.clone(a_.dy);
      lrnn::mask_padding(ctx_, {.x = dy_masked_, .lengths = a_.lengths});
    }
    dy_ = a_.lengths ? dy_masked_.view().template data<T>() : a_.dy.data<T>();
    const std::int32_t* const lengths = a_.lengths ? a_.lengths.data<std::int32_t>() : nullptr;
    for_tiles([&](std::int64_t t, std::int64_t count) {
      project(rows_.C(a_.weight), t, count);
      s7::contract_channels<T>(stream_, count, P_data(), dy_ + t * dim_, nullptr, 0,
                               g_data() + t * dstate_, H(), N());
    });
    Tensor dA = ctx_.empty({tokens_, dstate_}, DType::float32);
    reverse_scan(ctx_, a_,
                 {static_cast<int>(a_.x.dim(0)), static_cast<int>((seqlen_ + kChunk - 1) / kChunk),
                  N(), seqlen_, lengths},
                 g_data(), dA.view().template data<float>());
    lrnn::sum_columns(ctx_, {.a = dA, .out = a_.dbase});
    small_projections(dA);
    for_tiles([&](std::int64_t t, std::int64_t count) { tile_gradients(t, count, lengths); });
  }

 private:
  template <class F>
  void for_tiles(F&& f) {
    for (std::int64_t t = 0; t < tokens_; t += tile_) f(t, std::min(tile_, tokens_ - t));
  }
  T* P_data() { return P_.view().template data<T>(); }
  float* g_data() { return g_.view().template data<float>(); }
  [[nodiscard]] int H() const { return static_cast<int>(dim_); }
  [[nodiscard]] int N() const { return static_cast<int>(dstate_); }
  MutableTensorView dx_rows(std::int64_t t, std::int64_t count) {
    return a_.dx.reshape({tokens_, dim_}).slice(0, t, count);
  }
  void project(TensorView weight, std::int64_t t, std::int64_t count) {
    lrnn::linear_forward(
        ctx_, {.x = x_.slice(0, t, count), .weight = weight, .y = P_.view().slice(0, 0, count)});
  }

  // The rows of A, D and bias: dx is overwritten by the first, accumulated into by the second.
  void small_projections(const Tensor& dA) {
    Tensor dA_rows = ctx_.empty({tokens_, dstate_}, a_.x.dtype());
    Tensor dD_bias = ctx_.empty({tokens_, dim_ + dstate_}, a_.x.dtype());
    small_rows_kernel<T><<<static_cast<unsigned>(tokens_), kThreads, 0, stream_>>>(
        dy_, a_.x.data<T>(), g_data(), dA.view().template data<float>(),
        dA_rows.view().template data<T>(), dD_bias.view().template data<T>(), H(), N());
    LRNN_CUDA_CHECK_LAUNCH();
    lrnn::linear_backward(ctx_, {.dy = dA_rows,
                                 .x = x_,
                                 .weight = rows_.A(a_.weight),
                                 .dx = dx_rows(0, tokens_),
                                 .dweight = rows_.A(a_.dweight)});
    lrnn::linear_backward(ctx_, {.dy = dD_bias,
                                 .x = x_,
                                 .weight = rows_.D_bias(a_.weight),
                                 .dx = dx_rows(0, tokens_),
                                 .dweight = rows_.D_bias(a_.dweight),
                                 .accumulate_dx = true});
  }

  // Both rank-one operands, then the term in which x multiplies its own projection.
  void tile_gradients(std::int64_t t, std::int64_t count, const std::int32_t* lengths) {
    const T* const x = a_.x.data<T>() + t * dim_;
    const T* const dy = dy_ + t * dim_;
    const float* const g = g_data() + t * dstate_;
    s7::outer<T>(stream_, count, x, g, P_data(), H(), N());
    outer_gemms(rows_.B(a_.weight), rows_.B(a_.dweight), t, count);
    s7::outer<T>(stream_, count, dy, a_.s.data<float>() + t * dstate_, P_data(), H(), N());
    outer_gemms(rows_.C(a_.weight), rows_.C(a_.dweight), t, count);
    Tensor pD = ctx_.empty({count, dim_}, a_.x.dtype());
    lrnn::linear_forward(
        ctx_,
        {.x = x_.slice(0, t, count), .weight = rows_.D_bias(a_.weight).slice(0, 0, dim_), .y = pD});
    project(rows_.B(a_.weight), t, count);
    T* const dx = a_.dx.data<T>() + t * dim_;
    s7::contract_states<T>(stream_, t, count, P_data(), g, pD.view().template data<T>(), dim_, dy,
                           dx, {lengths, seqlen_}, dx, H(), N());
  }
  void outer_gemms(TensorView weight, MutableTensorView dweight, std::int64_t t,
                   std::int64_t count) {
    lrnn::linear_backward(ctx_, {.dy = P_.view().slice(0, 0, count),
                                 .x = x_.slice(0, t, count),
                                 .weight = weight,
                                 .dx = dx_rows(t, count),
                                 .dweight = dweight,
                                 .accumulate_dx = true});
  }

  Context& ctx_;
  const S7ScanBackward& a_;
  cudaStream_t stream_;
  std::int64_t seqlen_, dim_, dstate_, tokens_;
  detail::S7Rows rows_;
  std::int64_t tile_;
  TensorView x_;
  Tensor P_;
  Tensor g_;
  Tensor dy_masked_;
  const T* dy_ = nullptr;
};

}  // namespace

void s7_scan_backward(Context& ctx, const S7ScanBackward& a) {
  visit_float("s7_scan_backward", a.x.dtype(), [&]<class T>() { Backward<T>(ctx, a).run(); });
}

}  // namespace lrnn::cuda
