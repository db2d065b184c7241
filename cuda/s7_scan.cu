// Forward of S7's factored scan.
//
// Per tile of tokens: GEMM x W_B^T into L2, contraction over channels with x -> drive [T, N]; then
// a scan over time, a block per (batch, 16 states): ends of 32 chunks, states before them, replay;
// then per tile GEMM x W_C^T and contraction over states with s. On Hopper and at H up to 256 both
// contractions are those of s7_scan_sm90.cu. Bound by the two GEMMs, 2 T H^2 N multiply-adds; the
// scan moves 3 N floats per token and waits for them, a block for 512 steps at once.
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "common/s7_contract.cuh"
#include "common/s7_sm90.cuh"
#include "ops/dispatch.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace {

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

constexpr int kSteps = 16;  // of a chunk

// s holds the drive on entry and the states on return.
__global__ __launch_bounds__(s7::kScanThreads) void scan_kernel(
    Sequences z, const float* A, const float* state_in, float* s, float* state_out) {
  __shared__ s7::Affine ends[s7::kScanChunks][s7::kScanStates];
  const s7::ScanSeat at(z);
  float carry = at.exists && state_in != nullptr ? state_in[at.row] : 0.0F;
  for (std::int64_t begin = 0; begin < z.seqlen; begin += s7::kScanChunks * kSteps) {
    const std::int64_t first = begin + at.chunk * kSteps;
    const s7::Window<kSteps> window(at, z, first);
    float a[kSteps];
    float b[kSteps];
    window.load(A, a);
    window.load(s, b);
    __syncthreads();  // all loads are under way; and `ends` has been read
    s7::Affine end = {1.0F, 0.0F};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      // Behind the valid steps the state stays.
      a[k] = k < window.valid ? s7::multiplier(a[k]) : 1.0F;
      b[k] = k < window.valid ? b[k] : 0.0F;
      end.product *= a[k];
      end.sum = fmaf(a[k], end.sum, b[k]);
    }
    ends[at.chunk][at.state] = end;
    __syncthreads();
    float state = carry;
#pragma unroll
    for (int chunk = 0; chunk < s7::kScanChunks; ++chunk) {
      const s7::Affine e = ends[chunk][at.state];
      if (chunk == at.chunk) state = carry;
      carry = fmaf(e.product, carry, e.sum);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      state = fmaf(a[k], state, b[k]);
      if (at.exists && first + k < z.seqlen)
        s[at.origin + (first + k) * z.dstate] = state;
    }
  }
  if (state_out != nullptr && at.exists && at.chunk == 0) state_out[at.row] = carry;
}

void scan(Context& ctx, const S7ScanForward& a, const Sequences& z, const float* A, float* s) {
  scan_kernel<<<z.blocks(), s7::kScanThreads, 0, ctx.stream().handle>>>(
      z, A, a.state_in ? a.state_in.data<float>() : nullptr, s,
      a.state_out ? a.state_out.data<float>() : nullptr);
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
      scan(ctx_, a_, sequences(), A_, s_);
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
