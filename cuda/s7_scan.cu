// Forward of S7's factored scan.
//
// Per tile of tokens: GEMM x W_B^T into L2, contraction over channels with x -> drive [T, N]; then
// a chunked scan over time (one thread per (batch, chunk, state): chunk ends, carry, replay); then
// per tile GEMM x W_C^T and contraction over states with s. Bound by the two GEMMs, 2 T H^2 N
// multiply-adds; the scan moves 4 N floats per token.
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

template <class T>
__global__ __launch_bounds__(kThreads) void add_base_kernel(const T* __restrict__ pA,
                                                            const float* __restrict__ base,
                                                            float* __restrict__ A,
                                                            std::int64_t count, int dstate) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride)
    A[i] = to_float(pA[i]) + base[i % dstate];
}

/// Position of a thread in a chunked scan.
struct Place {
  int b, chunk, n;
  std::int64_t first;  // index of (b, first step, n) in [B, L, N]
  int steps;           // valid steps of the chunk

  __device__ Place(const Chunks& c, std::int64_t i) {
    n = static_cast<int>(i % c.dstate);
    chunk = static_cast<int>(i / c.dstate % c.chunks);
    b = static_cast<int>(i / c.dstate / c.chunks);
    const std::int64_t begin = static_cast<std::int64_t>(chunk) * kChunk;
    first = (b * c.seqlen + begin) * c.dstate + n;
    const std::int64_t end = min(c.seqlen, begin + kChunk);
    const std::int64_t valid = min(end, c.length(b));
    steps = valid > begin ? static_cast<int>(valid - begin) : 0;
  }
};

// Multipliers and drives of kAhead steps from t; behind the valid ones such that the state stays.
__device__ __forceinline__ void load_steps(const Place& p, int t, const float* A,
                                           const float* drive, int dstate, float (&a)[kAhead],
                                           float (&b)[kAhead]) {
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const bool valid = t + k < p.steps;
    const std::int64_t at = p.first + static_cast<std::int64_t>(t + k) * dstate;
    a[k] = valid ? s7::multiplier(A[at]) : 1.0F;
    b[k] = valid ? drive[at] : 0.0F;
  }
}

__global__ __launch_bounds__(kThreads) void chunk_ends_kernel(Chunks c, const float* __restrict__ A,
                                                              const float* __restrict__ drive,
                                                              float2* __restrict__ ends) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c.count()) return;
  const Place p(c, i);
  float product = 1.0F;
  float state = 0.0F;
  for (int t = 0; t < p.steps; t += kAhead) {
    float a[kAhead];
    float b[kAhead];
    load_steps(p, t, A, drive, c.dstate, a, b);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      product *= a[k];
      state = fmaf(a[k], state, b[k]);
    }
  }
  ends[i] = {product, state};
}

// One thread per (batch, state); chunk ends become the states before each chunk.
__global__ __launch_bounds__(kThreads) void carry_kernel(Chunks c,
                                                         const float* __restrict__ state_in,
                                                         const float2* __restrict__ ends,
                                                         float* __restrict__ before) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= c.batch * c.dstate) return;
  const int b = i / c.dstate;
  const int n = i % c.dstate;
  float state = state_in != nullptr ? state_in[i] : 0.0F;
#pragma unroll kAhead
  for (int chunk = 0; chunk < c.chunks; ++chunk) {
    const std::int64_t at = (static_cast<std::int64_t>(b) * c.chunks + chunk) * c.dstate + n;
    before[at] = state;
    if (chunk + 1 < c.chunks) state = fmaf(ends[at].x, state, ends[at].y);
  }
}

__global__ __launch_bounds__(kThreads) void replay_kernel(Chunks c, const float* __restrict__ A,
                                                          const float* __restrict__ before,
                                                          float* __restrict__ s,
                                                          float* __restrict__ state_out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= c.count()) return;
  const Place p(c, i);
  float state = before[i];
  const std::int64_t end =
      min(c.seqlen - static_cast<std::int64_t>(p.chunk) * kChunk, std::int64_t{kChunk});
  for (int t = 0; t < end; t += kAhead) {
    float a[kAhead];
    float b[kAhead];
    load_steps(p, t, A, s, c.dstate, a, b);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      state = fmaf(a[k], state, b[k]);
      if (t + k < end) s[p.first + static_cast<std::int64_t>(t + k) * c.dstate] = state;
    }
  }
  if (state_out != nullptr && p.chunk + 1 == c.chunks)
    state_out[static_cast<std::int64_t>(p.b) * c.dstate + p.n] = state;
}

unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

// s holds the drive on entry and the states on return.
void scan(Context& ctx, const S7ScanForward& a, const Chunks& c, const float* A, float* s) {
  const cudaStream_t stream = ctx.stream().handle;
  Tensor ends = ctx.empty({c.count(), 2}, DType::float32);
  Tensor before = ctx.empty({c.count()}, DType::float32);
  auto* const end_data = reinterpret_cast<float2*>(ends.view().data<float>());
  float* const before_data = before.view().data<float>();
  if (c.chunks > 1) {
    chunk_ends_kernel<<<blocks_for(c.count()), kThreads, 0, stream>>>(c, A, s, end_data);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  carry_kernel<<<blocks_for(static_cast<std::int64_t>(c.batch) * c.dstate), kThreads, 0, stream>>>(
      c, a.state_in ? a.state_in.data<float>() : nullptr, end_data, before_data);
  LRNN_CUDA_CHECK_LAUNCH();
  replay_kernel<<<blocks_for(c.count()), kThreads, 0, stream>>>(
      c, A, before_data, s, a.state_out ? a.state_out.data<float>() : nullptr);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void forward(Context& ctx, const S7ScanForward& a) {
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t batch = a.x.dim(0);
  const std::int64_t seqlen = a.x.dim(1);
  const std::int64_t dim = a.x.dim(2);
  const std::int64_t dstate = a.base.dim(0);
  const std::int64_t tokens = batch * seqlen;
  const detail::S7Rows rows{dim, dstate};
  const DType dtype = a.x.dtype();
  const auto H = static_cast<int>(dim);
  const auto N = static_cast<int>(dstate);

  const TensorView x = a.x.reshape({tokens, dim});
  const MutableTensorView y = a.y.reshape({tokens, dim});
  Tensor A_scratch;
  Tensor s_scratch;
  if (!a.A) A_scratch = ctx.empty({tokens, dstate}, DType::float32);
  if (!a.s) s_scratch = ctx.empty({tokens, dstate}, DType::float32);
  float* const A = a.A ? a.A.data<float>() : A_scratch.view().data<float>();
  float* const s = a.s ? a.s.data<float>() : s_scratch.view().data<float>();

  Tensor D_bias = ctx.empty({tokens, dim + dstate}, dtype);
  lrnn::linear_forward(ctx, {.x = x, .weight = rows.D_bias(a.weight), .y = D_bias});
  {
    Tensor pA = ctx.empty({tokens, dstate}, dtype);
    lrnn::linear_forward(ctx, {.x = x, .weight = rows.A(a.weight), .y = pA});
    const std::int64_t count = tokens * dstate;
    add_base_kernel<T>
        <<<static_cast<unsigned>(std::min<std::int64_t>((count + kThreads - 1) / kThreads, 4096)),
           kThreads, 0, stream>>>(pA.view().data<T>(), a.base.data<float>(), A, count, N);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  const std::int64_t tile = std::min(tokens, s7::tile_tokens(dim, dstate, sizeof(T)));
  Tensor P = ctx.empty({tile, dim * dstate}, dtype);
  const T* const x_data = a.x.data<T>();
  const T* const D_bias_data = D_bias.view().data<T>();
  for (std::int64_t t = 0; t < tokens; t += tile) {
    const std::int64_t count = std::min(tile, tokens - t);
    lrnn::linear_forward(
        ctx,
        {.x = x.slice(0, t, count), .weight = rows.B(a.weight), .y = P.view().slice(0, 0, count)});
    s7::contract_channels<T>(stream, count, P.view().data<T>(), x_data + t * dim,
                             D_bias_data + t * (dim + dstate) + dim, dim + dstate, s + t * dstate,
                             H, N);
  }
  const std::int32_t* const lengths = a.lengths ? a.lengths.data<std::int32_t>() : nullptr;
  scan(ctx, a,
       {static_cast<int>(batch), static_cast<int>((seqlen + kChunk - 1) / kChunk), N, seqlen,
        lengths},
       A, s);
  for (std::int64_t t = 0; t < tokens; t += tile) {
    const std::int64_t count = std::min(tile, tokens - t);
    lrnn::linear_forward(
        ctx,
        {.x = x.slice(0, t, count), .weight = rows.C(a.weight), .y = P.view().slice(0, 0, count)});
    s7::contract_states<T>(stream, t, count, P.view().data<T>(), s + t * dstate,
                           D_bias_data + t * (dim + dstate), dim + dstate, x_data + t * dim,
                           {lengths, seqlen}, y.data<T>() + t * dim, H, N);
  }
}

}  // namespace

void s7_scan_forward(Context& ctx, const S7ScanForward& a) {
  visit_float("s7_scan_forward", a.x.dtype(), [&]<class T>() { forward<T>(ctx, a); });
}

}  // namespace lrnn::cuda
