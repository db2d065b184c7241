// Forward of S7's factored scan.
//
// Per tile of tokens: GEMM x W_B^T into L2, contraction over channels with x -> drive [T, N]; then
// a chunked scan over time (one thread per (batch, chunk, state): chunk ends, carry, replay); then
// per tile GEMM x W_C^T and contraction over states with s. Bound by the two GEMMs, 2 T H^2 N
// multiply-adds; the scan moves 4 N floats per token.
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "common/s7_contract.cuh"
#include "common/s7_sm90.cuh"
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
class Forward {
 public:
  Forward(Context& ctx, const S7ScanForward& a)
      : ctx_(ctx),
        a_(a),
        stream_(ctx.stream().handle),
        seqlen_(a.x.dim(1)),
        dim_(a.x.dim(2)),
        dstate_(a.base.dim(0)),
        tokens_(a.x.dim(0) * seqlen_),
        rows_{dim_, dstate_} {
    if (!a.A) A_scratch_ = ctx.empty({tokens_, dstate_}, DType::float32);
    if (!a.s) s_scratch_ = ctx.empty({tokens_, dstate_}, DType::float32);
    A_ = a.A ? a.A.data<float>() : A_scratch_.view().data<float>();
    s_ = a.s ? a.s.data<float>() : s_scratch_.view().data<float>();
  }

  void run() {
#ifdef LRNN_WITH_SM90A
    if (s7::fits_sm90(ctx_, a_.x.dtype(), dim_, dstate_, {a_.x.raw(), a_.y.raw()})) {
      const auto problem = s7::problem_of<T>(a_.x, a_.weight, dstate_, lengths());
      s7::project_sm90<T>(ctx_, problem, x_data(0), a_.base.data<float>(), A_, s_);
      scan(ctx_, a_, chunks(), A_, s_);
      s7::read_out_sm90<T>(ctx_, problem, x_data(0), s_, a_.y.data<T>());
      return;
    }
#endif
    project_base();
    D_bias_ = ctx_.empty({tokens_, dim_ + dstate_}, a_.x.dtype());
    lrnn::linear_forward(ctx_, {.x = x(0, tokens_), .weight = rows_.D_bias(a_.weight), .y = D_bias_});
    const std::int64_t tile = std::min(tokens_, s7::tile_tokens(dim_, dstate_, sizeof(T)));
    Tensor P = ctx_.empty({tile, dim_ * dstate_}, a_.x.dtype());
    for_tiles(tile, [&](std::int64_t t, std::int64_t count) {
      project(P.view().slice(0, 0, count), t, count);
    });
    scan(ctx_, a_, chunks(), A_, s_);
    for_tiles(tile, [&](std::int64_t t, std::int64_t count) {
      read_out(P.view().slice(0, 0, count), t, count);
    });
  }

 private:
  [[nodiscard]] TensorView x(std::int64_t t, std::int64_t count) const {
    return a_.x.reshape({tokens_, dim_}).slice(0, t, count);
  }
  [[nodiscard]] const T* x_data(std::int64_t t) const { return a_.x.data<T>() + t * dim_; }
  [[nodiscard]] const T* D_bias_data(std::int64_t t) const {
    return D_bias_.view().template data<T>() + t * (dim_ + dstate_);
  }
  [[nodiscard]] const std::int32_t* lengths() const {
    return a_.lengths ? a_.lengths.data<std::int32_t>() : nullptr;
  }
  [[nodiscard]] int H() const { return static_cast<int>(dim_); }
  [[nodiscard]] int N() const { return static_cast<int>(dstate_); }
  [[nodiscard]] Chunks chunks() const {
    return {static_cast<int>(a_.x.dim(0)), static_cast<int>((seqlen_ + kChunk - 1) / kChunk), N(),
            seqlen_, lengths()};
  }
  template <class F>
  void for_tiles(std::int64_t tile, F&& f) {
    for (std::int64_t t = 0; t < tokens_; t += tile) f(t, std::min(tile, tokens_ - t));
  }

  // A.
  void project_base() {
    Tensor pA = ctx_.empty({tokens_, dstate_}, a_.x.dtype());
    lrnn::linear_forward(ctx_, {.x = x(0, tokens_), .weight = rows_.A(a_.weight), .y = pA});
    const std::int64_t count = tokens_ * dstate_;
    add_base_kernel<T>
        <<<static_cast<unsigned>(std::min<std::int64_t>((count + kThreads - 1) / kThreads, 4096)),
           kThreads, 0, stream_>>>(pA.view().template data<T>(), a_.base.data<float>(), A_, count,
                                   N());
    LRNN_CUDA_CHECK_LAUNCH();
  }
  // The drive of a tile.
  void project(MutableTensorView P, std::int64_t t, std::int64_t count) {
    lrnn::linear_forward(ctx_, {.x = x(t, count), .weight = rows_.B(a_.weight), .y = P});
    s7::contract_channels<T>(stream_, count, P.data<T>(), x_data(t), D_bias_data(t) + dim_,
                             dim_ + dstate_, s_ + t * dstate_, H(), N());
  }
  void read_out(MutableTensorView P, std::int64_t t, std::int64_t count) {
    lrnn::linear_forward(ctx_, {.x = x(t, count), .weight = rows_.C(a_.weight), .y = P});
    s7::contract_states<T>(stream_, t, count, P.data<T>(), s_ + t * dstate_, D_bias_data(t),
                           dim_ + dstate_, x_data(t), {lengths(), seqlen_},
                           a_.y.data<T>() + t * dim_, H(), N());
  }

  Context& ctx_;
  const S7ScanForward& a_;
  cudaStream_t stream_;
  std::int64_t seqlen_, dim_, dstate_, tokens_;
  detail::S7Rows rows_;
  Tensor A_scratch_;
  Tensor s_scratch_;
  Tensor D_bias_;
  float* A_;
  float* s_;  // the drive before the scan
};

}  // namespace

void s7_scan_forward(Context& ctx, const S7ScanForward& a) {
  visit_float("s7_scan_forward", a.x.dtype(), [&]<class T>() { Forward<T>(ctx, a).run(); });
}

}  // namespace lrnn::cuda
