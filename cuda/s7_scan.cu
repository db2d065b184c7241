// Forward of S7's factored scan.
//
// Per tile of tokens: GEMM x W_B^T into L2, contraction over channels with x -> drive [T, N]; then
// a scan over time, a block per segment of 256 steps of 16 states: what it does to the state, then
// the states from those of all segments before; then per tile GEMM x W_C^T and contraction over
// states with s. On Hopper and at H up to 256 both contractions are those of s7_scan_sm90.cu. One
// token of each sequence takes two kernels: a product with the whole weight and, a block per
// sequence, all that follows: 12.8 us at B 32, H 256, N 16 in bfloat16 on an H200, of which the
// product takes 4.5. Bound by the two GEMMs, 2 T H^2 N multiply-adds; the scan moves 5 N floats per
// token.
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "common/s7_contract.cuh"
#include "common/s7_sm90.cuh"
#include "ops/dispatch.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace {

using s7::kScanSteps;
using s7::kThreads;
using s7::Sequences;

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

// s holds the drive on entry and the states on return. kEnds writes what each segment does to the
// state instead.
template <bool kEnds>
__global__ __launch_bounds__(s7::kScanThreads) void scan_kernel(Sequences z, const float* A,
                                                                const float* state_in, float* s,
                                                                float* state_out,
                                                                s7::Affine* segments) {
  __shared__ s7::Affine ends[s7::kScanChunks][s7::kScanStates];
  const s7::ScanSeat at(z);
  const std::int64_t first = at.first();
  const s7::Window window(at, z, first);
  float a[kScanSteps];
  float b[kScanSteps];
  window.load(A, a);
  window.load(s, b);
  float state = at.exists && state_in != nullptr ? state_in[at.row] : 0.0F;
  if constexpr (!kEnds)
    for (std::int64_t i = 0; i < at.segment; ++i)
      state = segments[z.segment_at(at, i)].apply(state);
  s7::Affine end = {1.0F, 0.0F};
#pragma unroll
  for (int k = 0; k < kScanSteps; ++k) {
    // Behind the valid steps the state stays.
    a[k] = k < window.valid ? s7::multiplier(a[k]) : 1.0F;
    b[k] = k < window.valid ? b[k] : 0.0F;
    end.product *= a[k];
    end.sum = fmaf(a[k], end.sum, b[k]);
  }
  ends[at.chunk][at.state] = end;
  __syncthreads();
  if constexpr (kEnds) {
    if (at.chunk + 1 != s7::kScanChunks) return;
    for (int chunk = s7::kScanChunks - 2; chunk >= 0; --chunk)
      end = end.after(ends[chunk][at.state]);
    segments[z.segment_at(at, at.segment)] = end;
  } else {
    for (int chunk = 0; chunk < at.chunk; ++chunk) state = ends[chunk][at.state].apply(state);
    if (!at.exists) return;
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      state = fmaf(a[k], state, b[k]);
      if (first + k < z.seqlen) s[at.origin + (first + k) * z.dstate] = state;
    }
    const bool last = at.segment + 1 == z.segments() && at.chunk + 1 == s7::kScanChunks;
    if (state_out != nullptr && last) state_out[at.row] = state;
  }
}

void scan(Context& ctx, const S7ScanForward& a, const Sequences& z, const float* A, float* s) {
  const cudaStream_t stream = ctx.stream().handle;
  const float* const state_in = a.state_in ? a.state_in.data<float>() : nullptr;
  float* const state_out = a.state_out ? a.state_out.data<float>() : nullptr;
  Tensor scratch = ctx.empty({z.segment_count(), 2}, DType::float32);
  auto* const segments = reinterpret_cast<s7::Affine*>(scratch.view().data<float>());
  if (z.segments() > 1) {
    scan_kernel<true>
        <<<z.blocks(), s7::kScanThreads, 0, stream>>>(z, A, state_in, s, state_out, segments);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  scan_kernel<false>
      <<<z.blocks(), s7::kScanThreads, 0, stream>>>(z, A, state_in, s, state_out, segments);
  LRNN_CUDA_CHECK_LAUNCH();
}

// Of a step in one block per sequence: states whose sums fit the shared memory that every device
// has, and projections of B: at 4096 fewer kernels were faster, at 49152 more blocks.
constexpr std::int64_t kMostStepStates = 1024;
constexpr std::int64_t kMostStepRows = 8192;
constexpr int kAhead = 8;                       // channels whose operands a lane asks for at once
constexpr std::int64_t kMostStepTokens = 1024;  // so that their projections take 64 MiB at most

template <class T>
struct StepArgs {
  const T* P;  // [tokens, 2 H N + H + 2 N], all projections
  const T* x;
  const float* base;
  const std::int32_t* lengths;
  const float* state_in;
  T* y;
  float* state_out;
  float* A;
  float* s;
  int dim, dstate;
};

// Lanes that serve the states of one channel in the step: a power of two.
__host__ __device__ constexpr int step_lanes(int dstate) {
  int lanes = 1;
  while (lanes < 32 && lanes < dstate) lanes *= 2;
  return lanes;
}

// One token of one sequence per block. Groups of lanes walk the channels; sums over channels are
// added by butterfly and over the warps in order.
template <class T>
__global__ __launch_bounds__(kThreads) void step_kernel(const StepArgs<T> a) {
  extern __shared__ float shared[];
  const int N = a.dstate;
  const int lanes = step_lanes(N);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first = warp * (32 / lanes) + lane / lanes;
  const int step = s7::kWarps * (32 / lanes);
  const std::int64_t token = blockIdx.x;
  const std::int64_t HN = static_cast<std::int64_t>(a.dim) * N;
  const T* const pA = a.P + token * (2 * HN + a.dim + 2 * N);
  const T* const pB = pA + N;
  const T* const pC = pB + HN;
  const T* const pD = pC + HN;
  const T* const x = a.x + token * a.dim;
  float* const states = shared + s7::kWarps * N;
  const int rounds = (N + lanes - 1) / lanes;
  for (int r = 0; r < rounds; ++r) {
    const int n = r * lanes + lane % lanes;
    float sum = 0.0F;
    if (n < N)
#pragma unroll kAhead
      for (int h = first; h < a.dim; h += step)
        sum = fmaf(to_float(pB[static_cast<std::int64_t>(h) * N + n]), to_float(x[h]), sum);
    for (int offset = lanes; offset < 32; offset *= 2)
      sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
    if (lane < lanes && n < N) shared[warp * N + n] = sum;
  }
  __syncthreads();
  const bool valid = a.lengths == nullptr || a.lengths[token] > 0;
  for (int n = static_cast<int>(threadIdx.x); n < N; n += kThreads) {
    float drive = to_float(pD[a.dim + n]);
    for (int w = 0; w < s7::kWarps; ++w) drive += shared[w * N + n];
    const std::int64_t i = token * N + n;
    const float A = to_float(pA[n]) + a.base[n];
    const float before = a.state_in != nullptr ? a.state_in[i] : 0.0F;
    const float state = valid ? fmaf(s7::multiplier(A), before, drive) : before;
    states[n] = state;
    if (a.A != nullptr) a.A[i] = A;
    if (a.s != nullptr) a.s[i] = state;
    if (a.state_out != nullptr) a.state_out[i] = state;
  }
  __syncthreads();
  // The bound is that of the first group, so that all lanes reach the shuffles. Loads of kAhead
  // channels come before the sums; channels beyond the last read it.
  for (int begin = warp * (32 / lanes); begin < a.dim; begin += kAhead * step) {
    const auto channel = [&](int r) { return begin + lane / lanes + r * step; };
    float sum[kAhead] = {};
    float skip[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int h = min(channel(r), a.dim - 1);
      skip[r] = to_float(pD[h]) * to_float(x[h]);
    }
    for (int n = lane % lanes; n < N; n += lanes) {
      float p[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
        p[r] = to_float(pC[static_cast<std::int64_t>(min(channel(r), a.dim - 1)) * N + n]);
#pragma unroll
      for (int r = 0; r < kAhead; ++r) sum[r] = fmaf(p[r], states[n], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      for (int offset = lanes / 2; offset > 0; offset /= 2)
        sum[r] += __shfl_xor_sync(0xFFFFFFFFU, sum[r], offset);
      if (channel(r) < a.dim && lane % lanes == 0)
        a.y[token * a.dim + channel(r)] = from_float<T>(valid ? sum[r] + skip[r] : 0.0F);
    }
  }
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
    if (seqlen_ == 1 && tokens_ <= kMostStepTokens && dstate_ <= kMostStepStates &&
        dim_ * dstate_ <= kMostStepRows)
      return step();
#ifdef LRNN_WITH_SM90A
    if (s7::fits_sm90(ctx_, a_.x.dtype(), tokens_, dim_, dstate_, {a_.x.raw(), a_.y.raw()})) {
      const auto problem = s7::problem_of<T>(a_.x, a_.weight, dstate_, lengths());
      const Tensor packed = s7::pack_forward_sm90<T>(ctx_, problem);
      s7::project_sm90<T>(ctx_, problem, packed, x_data(0), a_.base.data<float>(), A_, s_);
      scan(ctx_, a_, sequences(), A_, s_);
      s7::read_out_sm90<T>(ctx_, problem, packed, x_data(0), s_, a_.y.data<T>());
      return;
    }
#endif
    project_base();
    D_bias_ = ctx_.empty({tokens_, dim_ + dstate_}, a_.x.dtype());
    lrnn::linear_forward(ctx_,
                         {.x = x(0, tokens_), .weight = rows_.D_bias(a_.weight), .y = D_bias_});
    const std::int64_t tile = std::min(tokens_, s7::tile_tokens(dim_, dstate_, sizeof(T)));
    Tensor P = ctx_.empty({tile, dim_ * dstate_}, a_.x.dtype());
    for_tiles(tile, [&](std::int64_t t, std::int64_t count) {
      project(P.view().slice(0, 0, count), t, count);
    });
    scan(ctx_, a_, sequences(), A_, s_);
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
  [[nodiscard]] Sequences sequences() const {
    return {static_cast<int>(a_.x.dim(0)), N(), seqlen_, lengths()};
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
  void step() {
    Tensor P = ctx_.empty({tokens_, rows_.count()}, a_.x.dtype());
    lrnn::linear_forward(ctx_, {.x = x(0, tokens_), .weight = a_.weight, .y = P});
    const StepArgs<T> args{.P = P.view().template data<T>(),
                           .x = x_data(0),
                           .base = a_.base.data<float>(),
                           .lengths = lengths(),
                           .state_in = a_.state_in ? a_.state_in.data<float>() : nullptr,
                           .y = a_.y.data<T>(),
                           .state_out = a_.state_out ? a_.state_out.data<float>() : nullptr,
                           .A = A_,
                           .s = s_,
                           .dim = H(),
                           .dstate = N()};
    const std::size_t shared = sizeof(float) * (s7::kWarps + 1) * static_cast<std::size_t>(N());
    step_kernel<T><<<static_cast<unsigned>(tokens_), kThreads, shared, stream_>>>(args);
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
