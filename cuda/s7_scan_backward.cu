// Backward of S7's factored scan, in four GEMMs of 2 T H^2 N multiply-adds.
//
// W_B and W_C are read as [H, (n, k)] too: their rows (h, n) are those of one h, one after another.
//   C:  Q_t[n, k] = sum_h dy_t[h] W_C[(h, n), k]     gives both that need it at once,
//         dL/ds_t[n] += sum_k x_t[k] Q_t[n, k]  and  dx_t[k] += sum_n s_t[n] Q_t[n, k];
//       dW_C[h, (n, k)] += sum_t dy_t[h] (s_t[n] x_t[k]).
//   A reverse scan turns dL/ds into g and dA, a block per segment of 256 steps of 16 states.
//   B:  its term sum_n g[n] x^T W_n x is a quadratic form, so that its gradient has W_n + W_n^T,
//         dx_t[k] += sum_{n, h} (g_t[n] x_t[h]) (W_B[(k, n), h] + W_B[(h, n), k]);
//       dW_B[h, (n, k)] += sum_t x_t[h] (g_t[n] x_t[k]).
// Per tile of tokens; the products in brackets are formed in memory as operands of the GEMMs. On
// Hopper and at H up to 256 they are formed in registers instead: s7_scan_sm90.cu for dL/ds and dx,
// s7_scan_backward_sm90.cu for the weights.
#include <algorithm>

#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/s7_scan.hpp"

#include "common/rows.cuh"
#include "common/s7_contract.cuh"
#include "common/s7_sm90.cuh"
#include "ops/dispatch.hpp"
#include "ops/s7_scan.hpp"

namespace lrnn::cuda {
namespace {

using s7::kScanSteps;
using s7::kThreads;
using s7::Raw;
using s7::Sequences;

struct ReverseArgs {
  const float* A;
  const float* s;
  const float* state_in;
  const float* dstate_out;
  float* g;  // the gradient of the states through y on entry
  float* dA;
  float* dstate_in;
};

// Writes g and dA, 0 at padding; of what a chunk hands to the one on its left, affine in what comes
// from its right by carry = a_t (ds_t + carry), kEnds writes that of the segment instead.
template <bool kEnds>
__global__ __launch_bounds__(s7::kScanThreads) void reverse_scan_kernel(Sequences z, ReverseArgs p,
                                                                        s7::Affine* segments) {
  __shared__ s7::Affine ends[s7::kScanChunks][s7::kScanStates];
  const s7::ScanSeat at(z);
  const std::int64_t first = at.first();
  const s7::Window window(at, z, first);
  float A[kScanSteps];
  float ds[kScanSteps];
  float before[kScanSteps];
  window.load(p.A, A);
  window.load(p.g, ds);
  if constexpr (!kEnds) {
    // The state before the first step of all is not in s.
    window.load(p.s - (first > 0 && window.valid > 0 ? z.dstate : 0), before);
    if (first == 0) {
#pragma unroll
      for (int k = kScanSteps - 1; k > 0; --k) before[k] = before[k - 1];
      before[0] = at.exists && p.state_in != nullptr ? p.state_in[at.row] : 0.0F;
    }
  }
  float carry = at.exists && p.dstate_out != nullptr ? p.dstate_out[at.row] : 0.0F;
  if constexpr (!kEnds)
    for (std::int64_t i = z.segments() - 1; i > at.segment; --i)
      carry = segments[z.segment_at(at, i)].apply(carry);
  s7::Affine end = {1.0F, 0.0F};
#pragma unroll
  for (int k = kScanSteps - 1; k >= 0; --k) {
    const float a = k < window.valid ? s7::multiplier(A[k]) : 1.0F;
    end.product *= a;
    end.sum = a * ((k < window.valid ? ds[k] : 0.0F) + end.sum);
  }
  ends[at.chunk][at.state] = end;
  __syncthreads();
  if constexpr (kEnds) {
    if (at.chunk != 0) return;
    for (int chunk = 1; chunk < s7::kScanChunks; ++chunk) end = end.after(ends[chunk][at.state]);
    segments[z.segment_at(at, at.segment)] = end;
  } else {
    for (int chunk = s7::kScanChunks - 1; chunk > at.chunk; --chunk)
      carry = ends[chunk][at.state].apply(carry);
    if (!at.exists) return;
#pragma unroll
    for (int k = kScanSteps - 1; k >= 0; --k) {
      if (first + k >= z.seqlen) continue;
      const std::int64_t i = at.origin + (first + k) * z.dstate;
      const bool valid = k < window.valid;
      const float damping = s7::damping(A[k]);
      const float gradient = ds[k] + carry;
      p.g[i] = valid ? gradient : 0.0F;
      p.dA[i] = valid ? gradient * before[k] * 2.0F * A[k] * damping * damping : 0.0F;
      if (valid) carry = (1.0F - damping) * gradient;
    }
    if (p.dstate_in != nullptr && first == 0) p.dstate_in[at.row] = carry;
  }
}

// rows[t, n] = sum_k Q[t, n, k] x[t, k];  dx[t, k] = pD[t, k] dy[t, k] + sum_n s[t, n] Q[t, n, k].
template <class T>
struct OutputGradients {
  const T* Q;
  const T* x;
  const T* dy;
  const T* pD;
  const float* s;
  float* rows;
  T* dx;
  std::int64_t tokens;
  int dim, dstate;
};

/// Elements of a row that a lane owns at most, and rows that a warp loads at once.
constexpr int kLaneColumns = 24;
constexpr int kPair = 2;

// Warps of a team take the rows n in turn; a lane owns kPer times kVec neighbouring columns, whose
// sums over the team's warps are added in order. Wider rows are done in several passes, by the same
// lanes.
template <class T, int kVec, int kPer>
__global__ __launch_bounds__(kThreads) void contract_output_kernel(OutputGradients<T> a,
                                                                   int team_warps) {
  constexpr int kPass = 32 * kVec * kPer;
  __shared__ float partial[s7::kWarps][kPass];
  const s7::Seat at(team_warps);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const bool exists = at.token < a.tokens;
  for (int first = 0; first < a.dim; first += kPass) {
    const auto column = [&](int p) { return first + (p * 32 + at.lane) * kVec; };
    float x[kPer][kVec] = {};
    float sum[kPer][kVec] = {};
    if (exists) {
#pragma unroll
      for (int p = 0; p < kPer; ++p)
        if (column(p) < a.dim) load_vec<T, kVec>(a.x + at.token * a.dim + column(p), x[p]);
      for (int n = at.member; n < a.dstate; n += kPair * team_warps) {
        Raw<T, kVec> q[kPair][kPer];
        float state[kPair] = {};
        float dot[kPair] = {};
#pragma unroll
        for (int r = 0; r < kPair; ++r) {
          if (n + r * team_warps >= a.dstate) continue;
          const std::int64_t i = at.token * a.dstate + n + r * team_warps;
          state[r] = a.s[i];
#pragma unroll
          for (int p = 0; p < kPer; ++p)
            if (column(p) < a.dim) q[r][p].load(a.Q + i * a.dim + column(p));
        }
#pragma unroll
        for (int r = 0; r < kPair; ++r)
#pragma unroll
          for (int p = 0; p < kPer; ++p)
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
              dot[r] = fmaf(q[r][p][k], x[p][k], dot[r]);
              sum[p][k] = fmaf(q[r][p][k], state[r], sum[p][k]);
            }
#pragma unroll
        for (int r = 0; r < kPair; ++r) {
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2)
            dot[r] += __shfl_xor_sync(0xFFFFFFFFU, dot[r], offset);
          if (at.lane != 0 || n + r * team_warps >= a.dstate) continue;
          float& row = a.rows[at.token * a.dstate + n + r * team_warps];
          row = first == 0 ? dot[r] : row + dot[r];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPer; ++p)
#pragma unroll
      for (int k = 0; k < kVec; ++k) partial[warp][(p * kVec + k) * 32 + at.lane] = sum[p][k];
    __syncthreads();
    // Each warp of the team finishes every team_warps-th group of columns.
    for (int p = at.member; exists && p < kPer; p += team_warps) {
      if (column(p) >= a.dim) continue;
      const std::int64_t i = at.token * a.dim + column(p);
      float skip[kVec];
      float dy[kVec];
      float total[kVec];
      load_vec<T, kVec>(a.pD + i, skip);
      load_vec<T, kVec>(a.dy + i, dy);
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        total[k] = skip[k] * dy[k];
        for (int m = 0; m < team_warps; ++m)
          total[k] += partial[warp - at.member + m][(p * kVec + k) * 32 + at.lane];
      }
      store_vec<T, kVec>(a.dx + i, total);
    }
    __syncthreads();
  }
}

template <class T>
void contract_output(cudaStream_t stream, const OutputGradients<T>& a) {
  const auto launch = [&]<int kVec>() {
    const int per = (a.dim + 32 * kVec - 1) / (32 * kVec);
    int team = 1;
    while (team < s7::kWarps && team * 2 * 16 <= a.dstate * per) team *= 2;
    const std::int64_t per_block = s7::kWarps / team;
    const auto blocks = static_cast<unsigned>((a.tokens + per_block - 1) / per_block);
    const auto kernel = per == 1   ? contract_output_kernel<T, kVec, 1>
                        : per == 2 ? contract_output_kernel<T, kVec, 2>
                                   : contract_output_kernel<T, kVec, kLaneColumns / kVec>;
    kernel<<<blocks, kThreads, 0, stream>>>(a, team);
    LRNN_CUDA_CHECK_LAUNCH();
  };
  const auto allowed = [&](const T* p) { return allows_vectors(p, a.dim, a.dim, kWide<T>); };
  if (allowed(a.Q) && allowed(a.x) && allowed(a.dy) && allowed(a.pD) && allowed(a.dx))
    launch.template operator()<kWide<T>>();
  else
    launch.template operator()<1>();
}

/// out[t, n, k] = v[t, n] x[t, k]. One block per token.
template <class T, int kVec>
__global__ __launch_bounds__(kThreads) void outer_kernel(const T* __restrict__ x,
                                                         const float* __restrict__ v,
                                                         T* __restrict__ out, int dim, int dstate) {
  const auto token = static_cast<std::int64_t>(blockIdx.x);
  const auto per_row = static_cast<unsigned>(dim / kVec);
  const unsigned count = per_row * static_cast<unsigned>(dstate);
  T* const rows = out + token * dim * dstate;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const unsigned n = i / per_row;
    const float factor = v[token * dstate + n];
    float values[kVec];
    load_vec<T, kVec>(x + token * dim + static_cast<std::int64_t>(i - n * per_row) * kVec, values);
#pragma unroll
    for (float& value : values) value *= factor;
    store_vec<T, kVec>(rows + static_cast<std::int64_t>(i) * kVec, values);
  }
}

template <class T>
void outer(cudaStream_t stream, std::int64_t tokens, const T* x, const float* v, T* out, int dim,
           int dstate) {
  const bool wide =
      allows_vectors(x, dim, dim, kWide<T>) && allows_vectors(out, dim, dim, kWide<T>);
  const auto kernel = wide ? outer_kernel<T, kWide<T>> : outer_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(x, v, out, dim, dstate);
  LRNN_CUDA_CHECK_LAUNCH();
}

constexpr int kTransposed = 32;  // rows and columns of a tile

/// out[k, (n, h)] = W[(k, n), h] + W[(h, n), k]; a block adds one tile of one n to the transpose of
/// that on the other side of the diagonal.
template <class T>
__global__ __launch_bounds__(kThreads) void add_transpose_kernel(const T* __restrict__ W,
                                                                 T* __restrict__ out, int dim,
                                                                 int dstate) {
  __shared__ float tile[kTransposed][kTransposed + 1];
  const int lane = static_cast<int>(threadIdx.x) % kTransposed;
  const int first = static_cast<int>(threadIdx.x) / kTransposed;
  constexpr int kStep = kThreads / kTransposed;
  const int h0 = static_cast<int>(blockIdx.x) * kTransposed;
  const int k0 = static_cast<int>(blockIdx.y) * kTransposed;
  for (int n = static_cast<int>(blockIdx.z); n < dstate; n += static_cast<int>(gridDim.z)) {
    const auto at = [&](int row, int column) {
      return (static_cast<std::int64_t>(row) * dstate + n) * dim + column;
    };
    for (int r = first; r < kTransposed; r += kStep)
      if (h0 + r < dim && k0 + lane < dim) tile[r][lane] = to_float(W[at(h0 + r, k0 + lane)]);
    __syncthreads();
    for (int r = first; r < kTransposed; r += kStep)
      if (k0 + r < dim && h0 + lane < dim) {
        const std::int64_t i = at(k0 + r, h0 + lane);
        out[i] = from_float<T>(to_float(W[i]) + tile[lane][r]);
      }
    __syncthreads();
  }
}

template <class T>
void add_transpose(cudaStream_t stream, const T* W, T* out, int dim, int dstate) {
  const auto tiles = static_cast<unsigned>((dim + kTransposed - 1) / kTransposed);
  const dim3 grid(tiles, tiles, static_cast<unsigned>(std::min(dstate, 4096)));
  add_transpose_kernel<T><<<grid, kThreads, 0, stream>>>(W, out, dim, dstate);
  LRNN_CUDA_CHECK_LAUNCH();
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

void reverse_scan(Context& ctx, const S7ScanBackward& a, const Sequences& z, float* g, float* dA) {
  const ReverseArgs args{.A = a.A.data<float>(),
                         .s = a.s.data<float>(),
                         .state_in = a.state_in ? a.state_in.data<float>() : nullptr,
                         .dstate_out = a.dstate_out ? a.dstate_out.data<float>() : nullptr,
                         .g = g,
                         .dA = dA,
                         .dstate_in = a.dstate_in ? a.dstate_in.data<float>() : nullptr};
  const cudaStream_t stream = ctx.stream().handle;
  Tensor scratch = ctx.empty({z.segment_count(), 2}, DType::float32);
  auto* const segments = reinterpret_cast<s7::Affine*>(scratch.view().data<float>());
  if (z.segments() > 1) {
    reverse_scan_kernel<true><<<z.blocks(), s7::kScanThreads, 0, stream>>>(z, args, segments);
    LRNN_CUDA_CHECK_LAUNCH();
  }
  reverse_scan_kernel<false><<<z.blocks(), s7::kScanThreads, 0, stream>>>(z, args, segments);
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
        dy_(a.dy.reshape({tokens_, dim_})),
        g_(ctx.empty({tokens_, dstate_}, DType::float32)) {}

  void run() {
    if (a_.lengths) {  // what stands at padding must not reach any sum
      dy_masked_ = masked(a_.dy);
      x_masked_ = masked(a_.x);
      dy_ = dy_masked_.view().reshape({tokens_, dim_});
      x_ = x_masked_.view().reshape({tokens_, dim_});
    }
#ifdef LRNN_WITH_SM90A
    if (s7::fits_sm90(ctx_, a_.x.dtype(), tokens_, dim_, dstate_,
                      {x_.raw(), dy_.raw(), a_.dx.raw()}))
      return run_sm90();
#endif
    P_ = ctx_.empty({tile_, dim_ * dstate_}, a_.x.dtype());
    output_gradients();
    const Tensor dA = reversed();
    small_projections(dA);
    Tensor both = ctx_.empty({dim_, dstate_ * dim_}, a_.x.dtype());
    add_transpose<T>(stream_, rows_.B(a_.weight).template data<T>(), both.view().template data<T>(),
                     H(), N());
    for_tiles([&](std::int64_t t, std::int64_t count) { tile_gradients(both, t, count); });
  }

 private:
#ifdef LRNN_WITH_SM90A
  void run_sm90() {
    const auto problem = s7::problem_of<T>(a_.x, a_.weight, dstate_, lengths());
    const T* const dy = dy_.template data<T>();
    const float* const s = a_.s.data<float>();
    const Tensor packed = s7::pack_backward_sm90<T>(ctx_, problem);
    s7::state_gradients_sm90<T>(ctx_, problem, packed, x_data(0), dy, g_data());
    const Tensor dA = reversed();
    s7::input_gradients_sm90<T>(ctx_, problem, packed, x_data(0), dy, s, g_data(),
                                dA.view().template data<float>(), a_.dx.data<T>());
    s7::weight_gradients_sm90<T>(ctx_, problem, x_data(0), dy, s, g_data(),
                                 dA.view().template data<float>(), a_.dweight.data<float>());
  }
#endif
  // Turns the gradient of the states through y into g; returns dA.
  Tensor reversed() {
    Tensor dA = ctx_.empty({tokens_, dstate_}, DType::float32);
    reverse_scan(ctx_, a_, {static_cast<int>(a_.x.dim(0)), N(), seqlen_, lengths()}, g_data(),
                 dA.view().template data<float>());
    lrnn::sum_columns(ctx_, {.a = dA, .out = a_.dbase});
    return dA;
  }
  [[nodiscard]] const std::int32_t* lengths() const {
    return a_.lengths ? a_.lengths.data<std::int32_t>() : nullptr;
  }
  Tensor masked(TensorView rows) {
    Tensor copy = ctx_.clone(rows);
    lrnn::mask_padding(ctx_, {.x = copy, .lengths = a_.lengths});
    return copy;
  }
  template <class F>
  void for_tiles(F&& f) {
    for (std::int64_t t = 0; t < tokens_; t += tile_) f(t, std::min(tile_, tokens_ - t));
  }
  T* P_data() { return P_.view().template data<T>(); }
  float* g_data() { return g_.view().template data<float>(); }
  [[nodiscard]] const T* x_data(std::int64_t t) const { return x_.template data<T>() + t * dim_; }
  [[nodiscard]] int H() const { return static_cast<int>(dim_); }
  [[nodiscard]] int N() const { return static_cast<int>(dstate_); }
  MutableTensorView dx_rows(std::int64_t t, std::int64_t count) {
    return a_.dx.reshape({tokens_, dim_}).slice(0, t, count);
  }
  /// Rows (h, n) of B or C as [H, (n, k)].
  template <class View>
  [[nodiscard]] View by_channel(View rows) const {
    return rows.reshape({dim_, dstate_ * dim_});
  }

  // Overwrites dx, and g by the gradient of the states through y.
  void output_gradients() {
    Tensor pD = ctx_.empty({tokens_, dim_}, a_.x.dtype());
    lrnn::linear_forward(ctx_,
                         {.x = x_, .weight = rows_.D_bias(a_.weight).slice(0, 0, dim_), .y = pD});
    for_tiles([&](std::int64_t t, std::int64_t count) {
      lrnn::linear_backward(ctx_, {.dy = dy_.slice(0, t, count),
                                   .weight = by_channel(rows_.C(a_.weight)),
                                   .dx = P_.view().slice(0, 0, count)});
      contract_output<T>(stream_, {.Q = P_data(),
                                   .x = x_data(t),
                                   .dy = dy_.template data<T>() + t * dim_,
                                   .pD = pD.view().template data<T>() + t * dim_,
                                   .s = a_.s.data<float>() + t * dstate_,
                                   .rows = g_data() + t * dstate_,
                                   .dx = a_.dx.data<T>() + t * dim_,
                                   .tokens = count,
                                   .dim = H(),
                                   .dstate = N()});
    });
  }

  // The rows of A, D and bias, accumulated into dx.
  void small_projections(const Tensor& dA) {
    Tensor dA_rows = ctx_.empty({tokens_, dstate_}, a_.x.dtype());
    Tensor dD_bias = ctx_.empty({tokens_, dim_ + dstate_}, a_.x.dtype());
    small_rows_kernel<T><<<static_cast<unsigned>(tokens_), kThreads, 0, stream_>>>(
        dy_.template data<T>(), x_data(0), g_data(), dA.view().template data<float>(),
        dA_rows.view().template data<T>(), dD_bias.view().template data<T>(), H(), N());
    LRNN_CUDA_CHECK_LAUNCH();
    lrnn::linear_backward(ctx_, {.dy = dA_rows,
                                 .x = x_,
                                 .weight = rows_.A(a_.weight),
                                 .dx = dx_rows(0, tokens_),
                                 .dweight = rows_.A(a_.dweight),
                                 .accumulate_dx = true});
    lrnn::linear_backward(ctx_, {.dy = dD_bias,
                                 .x = x_,
                                 .weight = rows_.D_bias(a_.weight),
                                 .dx = dx_rows(0, tokens_),
                                 .dweight = rows_.D_bias(a_.dweight),
                                 .accumulate_dx = true});
  }

  // dW_C, then dW_B and dx through B. `both`: W_B and its transpose, added.
  void tile_gradients(const Tensor& both, std::int64_t t, std::int64_t count) {
    const MutableTensorView products = P_.view().slice(0, 0, count);
    const TensorView x = x_.slice(0, t, count);
    outer<T>(stream_, count, x_data(t), a_.s.data<float>() + t * dstate_, P_data(), H(), N());
    lrnn::linear_backward(
        ctx_,
        {.dy = dy_.slice(0, t, count), .x = products, .dweight = by_channel(rows_.C(a_.dweight))});
    outer<T>(stream_, count, x_data(t), g_data() + t * dstate_, P_data(), H(), N());
    lrnn::linear_backward(ctx_,
                          {.dy = x, .x = products, .dweight = by_channel(rows_.B(a_.dweight))});
    lrnn::linear_forward(
        ctx_, {.x = products, .weight = both, .y = dx_rows(t, count), .accumulate = true});
  }

  Context& ctx_;
  const S7ScanBackward& a_;
  cudaStream_t stream_;
  std::int64_t seqlen_, dim_, dstate_, tokens_;
  detail::S7Rows rows_;
  std::int64_t tile_;
  TensorView x_;   // [B L, H]
  TensorView dy_;  // [B L, H]
  Tensor P_;
  Tensor g_;
  Tensor dy_masked_;
  Tensor x_masked_;
};

}  // namespace

void s7_scan_backward(Context& ctx, const S7ScanBackward& a) {
  visit_float("s7_scan_backward", a.x.dtype(), [&]<class T>() { Backward<T>(ctx, a).run(); });
}

}  // namespace lrnn::cuda
