// Forward and what both passes need between segments. Steps and ownership: common/dplr_scan.cuh.
//
// Bound by issue slots: per state and token ten instructions of the recurrence, two of the inner
// product and two of the read-out; per head and token three shuffles of the inner product and one
// each for input and output. Step 1 needs no states between tokens and takes four of them at once.
#include "lrnn/ops/dplr_scan.hpp"

#include "common/dplr_scan.cuh"

namespace lrnn::cuda {
namespace dplr {
namespace {

constexpr int kThreads = 128;

template <class T>
struct ForwardArgs {
  Sizes sizes;
  Parameters parameters;
  const T* u;
  const std::int32_t* lengths;
  const float* starts;  // [B segments, 2, H, N]; state_in if there is one segment; null: 0
  T* y;
  float* state_out;
  float* chunk_states;
};

// Eight tokens. `left` tokens of this group are valid, `most` of some group of the warp.
template <bool kFull, int kLanes, int kPer>
__device__ __forceinline__ void walk_block(const Transition<kPer>& m, const Pairs<kPer>& b,
                                           const Pairs<kPer>& C, float own_u, int left, int most,
                                           Pairs<kPer>& x, float (&y)[kBlock]) {
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    if (!kFull && j >= most) continue;  // the whole warp
    const float u = token_value<kLanes>(own_u, j);
    advance<kLanes>(m, b, u, kFull || j < left, x);
    y[j] = partial_product(C, x);
  }
}

// Step 3.
template <class T, int kLanes, int kPer>
__global__ __launch_bounds__(kThreads, 4) void dplr_scan_forward_kernel(ForwardArgs<T> a) {
  const Sizes& s = a.sizes;
  const Place<kLanes> p(s, a.lengths, {0, s.segments});
  const Transition<kPer> m = load_transition<kLanes, kPer>(a.parameters, s, p);
  const auto b = load_planes<kLanes, kPer>(a.parameters.b, s, p);
  const auto C = conjugate(load_interleaved<kLanes, kPer>(a.parameters.C, s, p));
  const float D = a.parameters.D == nullptr ? 0.0F : a.parameters.D[p.head];
  auto x = load_planes<kLanes, kPer>(a.starts == nullptr ? nullptr : a.starts + p.row * 2 * s.plane,
                                     s, p);
  const std::int64_t column = p.column(s);
  const auto load_u = [&](int t) {
    return p.exists && t < p.end ? to_float(a.u[column + t * s.heads]) : 0.0F;
  };
  float next_u = load_u(p.begin + p.sub);
  for (int t0 = 0; t0 < p.longest; t0 += kBlock) {
    const int t = p.begin + t0;
    const float own_u = next_u;
    next_u = load_u(t + kBlock + p.sub);
    if (a.chunk_states != nullptr && t0 % kChunk == 0 && t < p.size_end)
      store_planes(a.chunk_states + (p.batch * s.chunks + t / kChunk) * 2 * s.plane, s, p, x);
    const int left = p.left(t, kBlock);
    float y[kBlock] = {};
    if (__all_sync(kAll, left == kBlock))
      walk_block<true, kLanes>(m, b, C, own_u, kBlock, kBlock, x, y);
    else
      walk_block<false, kLanes>(m, b, C, own_u, left, warp_max(left), x, y);
    const float sum = transposed_sum<kLanes>(y, p.sub);
    if (p.exists && p.lane < kBlock && t + p.sub < p.size_end)
      a.y[column + (t + p.sub) * s.heads] =
          from_float<T>(p.sub < left ? fmaf(D, own_u, 2.0F * sum) : 0.0F);
  }
  if (a.state_out != nullptr && p.holds_last)
    store_planes(a.state_out + p.batch * 2 * s.plane, s, p, x);
}

constexpr int kAhead = 4;  // tokens of step 1 at once

// kAhead tokens v at once. The products s_j = <k, x_{t+j}> follow from those of x_t alone,
//   s_j = <conj(d)^j k, x_t> - sum_{i<j} (alpha_{j-1-i} s_i - beta_{j-1-i} v_i),   d = 1 + e,
//   alpha_m = <k, d^m w>, beta_m = <k, d^m b>,
// so that a quarter of the reductions is waited for and d is applied once for all four:
//   x_{t+4} = d^4 x_t - sum_i d^{3-i} (w s_i - b v_i).
template <int kPer>
struct Ahead {
  Pairs<kPer> k[kAhead];  // 2 conj(d)^j k
  Pairs<kPer> w[kAhead];  // d^{3-i} w
  Pairs<kPer> b[kAhead];  // d^{3-i} b
  Pairs<kPer> e;          // d^4 - 1
  float alpha[kAhead - 1];
  float beta[kAhead - 1];
};

struct Wide {
  double x;
  double y;
};
__device__ __forceinline__ Wide wide(float2 v) {
  return {static_cast<double>(v.x), static_cast<double>(v.y)};
}
__device__ __forceinline__ Wide operator*(Wide a, Wide b) {
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}
__device__ __forceinline__ float2 narrow(Wide v) {
  return {static_cast<float>(v.x), static_cast<float>(v.y)};
}
template <int kLanes>
__device__ __forceinline__ float wide_group_sum(double v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return static_cast<float>(v);
}

// Transition and drive of step 1, state by state. Backward is the same walk in the other direction:
// with c = 2 conj(C), the adjoint z before the direct gradient moves as M^* (z + c g), and M^* has
// the factors conj(e), k, w for e, w, k.
template <bool kReverse, int kLanes>
class WalkOperands {
 public:
  struct State {
    float2 e;
    float2 w;
    float2 k;
    float2 b;
  };

  __device__ WalkOperands(const Parameters& parameters, const Sizes& sizes,
                          const Place<kLanes>& place)
      : a_(parameters), s_(sizes), p_(place) {
    if constexpr (!kReverse) return;
    float sum = 0.0F;
    for (int n = p_.lane; n < s_.states; n += kLanes) {
      const float2 w = pair(a_.w, n);
      const float2 c = direct(n);
      sum = fmaf(w.x, c.x, fmaf(w.y, c.y, sum));
    }
    product_ = 2.0F * group_sum<kLanes>(sum);
  }

  // State n of the head.
  __device__ __forceinline__ State at(int n) const {
    if (n >= s_.states) return {};
    const float2 e = pair(a_.e, n);
    const float2 w = pair(a_.w, n);
    const float2 k = pair(a_.k, n);
    if constexpr (!kReverse) return {e, w, k, pair(a_.b, n)};
    const float2 c = direct(n);
    const float re = fmaf(e.x, c.x, fmaf(e.y, c.y, -k.x * product_));
    const float im = fmaf(e.x, c.y, fmaf(-e.y, c.x, -k.y * product_));
    return {{e.x, -e.y}, k, w, {c.x + re, c.y + im}};
  }

 private:
  [[nodiscard]] __device__ __forceinline__ float2 pair(const float* planes, int n) const {
    const float* const at = planes + p_.head * s_.states + n;
    return {at[0], at[s_.plane]};
  }
  [[nodiscard]] __device__ __forceinline__ float2 direct(int n) const {
    const float* const at = a_.C + 2 * (p_.head * s_.states + n);
    return {2.0F * at[0], -2.0F * at[1]};
  }

  const Parameters& a_;
  const Sizes& s_;
  const Place<kLanes>& p_;
  float product_ = 0.0F;  // <w, c>
};

constexpr int kRows = 3 * kAhead + 1;  // of a table of Ahead: k, w, b, e
constexpr int kScalars = 2 * kAhead;   // alpha, beta, with one unused place each

// Tables of step 1, one group per head: rows [H, kRows, N] of pairs and scalars [H, kScalars]. In
// double, because errors of d would be raised to its power. A kernel of its own: beside the walk it
// would take too many registers.
template <bool kReverse, int kLanes>
__global__ __launch_bounds__(kThreads) void dplr_scan_ahead_kernel(Sizes s, Parameters parameters,
                                                                   float2* rows, float* scalars) {
  const Place<kLanes> p(s, nullptr, {0, 1});
  const WalkOperands<kReverse, kLanes> operands(parameters, s, p);
  double alpha[kAhead] = {};
  double beta[kAhead] = {};
  for (int n = p.lane; n < s.states; n += kLanes) {
    const auto m = operands.at(n);
    const Wide e = wide(m.e);
    const Wide d{1.0 + e.x, e.y};
    const Wide k = wide(m.k);
    Wide kj{2.0 * k.x, 2.0 * k.y};
    Wide wj = wide(m.w);
    Wide bj = wide(m.b);
    float2* const row = rows + static_cast<std::int64_t>(p.head) * kRows * s.states + n;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (p.exists) {
        row[j * s.states] = narrow(kj);
        row[(2 * kAhead - 1 - j) * s.states] = narrow(wj);
        row[(3 * kAhead - 1 - j) * s.states] = narrow(bj);
      }
      alpha[j] += 2.0 * (k.x * wj.x + k.y * wj.y);
      beta[j] += 2.0 * (k.x * bj.x + k.y * bj.y);
      kj = kj * Wide{d.x, -d.y};
      wj = wj * d;
      bj = bj * d;
    }
    const Wide ee = e * e;
    const Wide e2{2.0 * e.x + ee.x, 2.0 * e.y + ee.y};  // d^2 - 1
    const Wide e4 = e2 * e2;
    if (p.exists) row[3 * kAhead * s.states] = narrow({2.0 * e2.x + e4.x, 2.0 * e2.y + e4.y});
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const float a = wide_group_sum<kLanes>(alpha[j]);
    const float b = wide_group_sum<kLanes>(beta[j]);
    if (!p.exists || p.lane != 0) continue;
    scalars[p.head * kScalars + j] = a;
    scalars[p.head * kScalars + kAhead + j] = b;
  }
}

template <int kLanes, int kPer>
__device__ __forceinline__ Ahead<kPer> load_ahead(const float2* rows, const float* scalars,
                                                  const Sizes& s, const Place<kLanes>& p) {
  Ahead<kPer> out;
  const float2* const row = rows + static_cast<std::int64_t>(p.head) * kRows * s.states;
  const auto load = [&](int r) {
    Pairs<kPer> pairs;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int n = i * kLanes + p.lane;
      pairs.v[i] = n < s.states ? row[r * s.states + n] : float2{0.0F, 0.0F};
    }
    return pairs;
  };
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    out.k[j] = load(j);
    out.w[j] = load(kAhead + j);
    out.b[j] = load(2 * kAhead + j);
  }
  out.e = load(3 * kAhead);
#pragma unroll
  for (int j = 0; j < kAhead - 1; ++j) {
    out.alpha[j] = scalars[p.head * kScalars + j];
    out.beta[j] = scalars[p.head * kScalars + kAhead + j];
  }
  return out;
}

template <int kLanes, int kPer>
__device__ __forceinline__ void walk_ahead(const Ahead<kPer>& m, const float (&v)[kAhead], int lane,
                                           Pairs<kPer>& x) {
  float part[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) part[j] = partial_product(m.k[j], x);
  const float own = transposed_sum_of_four<kLanes>(part, lane);
  float s[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    s[j] = token_value<kLanes>(own, j);
#pragma unroll
    for (int i = 0; i < j; ++i)
      s[j] = fmaf(-m.alpha[j - 1 - i], s[i], fmaf(m.beta[j - 1 - i], v[i], s[j]));
  }
#pragma unroll
  for (int n = 0; n < kPer; ++n) {
    const float2 x0 = x.v[n];
    float re = 0.0F;
    float im = 0.0F;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      re = fmaf(-m.w[i].v[n].x, s[i], fmaf(m.b[i].v[n].x, v[i], re));
      im = fmaf(-m.w[i].v[n].y, s[i], fmaf(m.b[i].v[n].y, v[i], im));
    }
    re = fmaf(m.e.v[n].x, x0.x, fmaf(-m.e.v[n].y, x0.y, re));
    im = fmaf(m.e.v[n].x, x0.y, fmaf(m.e.v[n].y, x0.x, im));
    x.v[n] = {x0.x + re, x0.y + im};
  }
}

// The tokens of a group in the order of step 1, one block ahead.
template <class T, bool kReverse, int kLanes>
class TokenBlocks {
 public:
  __device__ TokenBlocks(const EndsArgs<T>& args, const Place<kLanes>& place)
      : tokens_(args.tokens + place.column(args.sizes)), heads_(args.sizes.heads), p_(place) {}

  // Calls f(block, own token) for blocks [first, last) in order.
  template <class F>
  __device__ __forceinline__ void walk(int first, int last, F&& f) const {
    float next = load(kReverse ? last - 1 : first, first, last);
    for (int i = 0; i < last - first; ++i) {
      const int block = kReverse ? last - 1 - i : first + i;
      const float own = next;
      next = load(kReverse ? block - 1 : block + 1, first, last);
      f(block, own);
    }
  }
  // Of a block, the token that comes j-th.
  static __device__ __forceinline__ int place(int j) { return kReverse ? kBlock - 1 - j : j; }

 private:
  __device__ __forceinline__ float load(int block, int first, int last) const {
    const int t = p_.begin + block * kBlock + p_.sub;
    const bool valid = p_.exists && block >= first && block < last && t < p_.end;
    return valid ? to_float(tokens_[t * heads_]) : 0.0F;
  }

  const T* tokens_;
  std::int64_t heads_;
  const Place<kLanes>& p_;
};

// Step 1. Blocks that are full in every group of the warp come before all others in time.
template <class T, bool kReverse, int kLanes, int kPer>
__global__ __launch_bounds__(kThreads, 3) void dplr_scan_ends_kernel(EndsArgs<T> a,
                                                                     SegmentRange range,
                                                                     const float2* rows,
                                                                     const float* scalars) {
  const Sizes& s = a.sizes;
  const Place<kLanes> p(s, a.lengths, range);
  const bool holds_start = a.start != nullptr && (kReverse ? p.holds_last : p.first);
  auto x = load_planes<kLanes, kPer>(holds_start ? a.start + p.batch * 2 * s.plane : nullptr, s, p);
  const TokenBlocks<T, kReverse, kLanes> tokens(a, p);
  const int blocks = (p.longest + kBlock - 1) / kBlock;
  const int full = -warp_max(-p.left(p.begin, p.longest)) / kBlock;
  const auto walk_one_by_one = [&] {
    if (full == blocks) return;
    const WalkOperands<kReverse, kLanes> operands(a.parameters, s, p);
    Transition<kPer> m;
    Pairs<kPer> b;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const auto state = operands.at(i * kLanes + p.lane);
      m.e.v[i] = state.e;
      m.w.v[i] = state.w;
      m.k.v[i] = state.k;
      b.v[i] = state.b;
    }
    tokens.walk(full, blocks, [&](int block, float own) {
      const int left = p.left(p.begin + block * kBlock, kBlock);
      for (int j = 0; j < kBlock; ++j) {
        const int at = tokens.place(j);
        advance<kLanes>(m, b, token_value<kLanes>(own, at), at < left, x);
      }
    });
  };
  if (kReverse) walk_one_by_one();
  if (full > 0) {
    const auto ahead = load_ahead<kLanes, kPer>(rows, scalars, s, p);
    tokens.walk(0, full, [&](int, float own) {
#pragma unroll 1
      for (int j = 0; j < kBlock; j += kAhead) {
        float v[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) v[i] = token_value<kLanes>(own, tokens.place(j + i));
        walk_ahead<kLanes>(ahead, v, p.lane, x);
      }
    });
  }
  if (!kReverse) walk_one_by_one();
  store_planes(a.ends + p.row * 2 * s.plane, s, p, x);
}

template <class T, bool kReverse, int kLanes, int kPer>
void launch_ends(Context& ctx, const EndsArgs<T>& args, float2* rows, float* scalars) {
  const auto stream = ctx.stream().handle;
  Sizes one = args.sizes;  // one group per head
  one.batch = 1;
  one.segments = 1;
  dplr_scan_ahead_kernel<kReverse, kLanes>
      <<<group_blocks(one, {0, 1}, kLanes, kThreads), kThreads, 0, stream>>>(one, args.parameters,
                                                                             rows, scalars);
  LRNN_CUDA_CHECK_LAUNCH();
  const SegmentRange range{kReverse ? 1 : 0, args.sizes.segments - 1};
  dplr_scan_ends_kernel<T, kReverse, kLanes, kPer>
      <<<group_blocks(args.sizes, range, kLanes, kThreads), kThreads, 0, stream>>>(args, range,
                                                                                   rows, scalars);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void launch_ends(Context& ctx, const EndsArgs<T>& args, bool reverse) {
  const Sizes& s = args.sizes;
  Tensor rows = ctx.empty({s.heads, kRows, s.states, 2}, DType::float32);
  Tensor scalars = ctx.empty({s.heads, kScalars}, DType::float32);
  auto* const pairs = reinterpret_cast<float2*>(rows.view().data<float>());
  float* const values = scalars.view().data<float>();
  visit_width(s.states, [&](auto lanes, auto per) {
    if (reverse)
      launch_ends<T, true, lanes(), per()>(ctx, args, pairs, values);
    else
      launch_ends<T, false, lanes(), per()>(ctx, args, pairs, values);
  });
}

template <class T>
void forward(Context& ctx, ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  Tensor carries;
  if (s.segments > 1) {
    carries =
        connect_segments<T>(ctx, {s, args.parameters, args.u, args.lengths, args.starts}, false);
    args.starts = carries.view().template data<float>();
  }
  visit_width(s.states, [&](auto lanes, auto per) {
    dplr_scan_forward_kernel<T, lanes(), per()>
        <<<group_blocks(s, {0, s.segments}, lanes(), kThreads), kThreads, 0, ctx.stream().handle>>>(
            args);
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
__global__ __launch_bounds__(kGeneralThreads) void dplr_scan_forward_general_kernel(
    ForwardArgs<T> a, float2* states) {
  extern __shared__ float shared[];
  const Sizes& s = a.sizes;
  const GeneralPlace p(s);
  if (!p.exists) return;  // the whole warp
  float* const products = shared + threadIdx.x / 32 * s.rank;
  float2* const x = states + p.index * s.states;
  const std::int64_t size = 2 * s.plane;
  const std::int64_t length = a.lengths == nullptr ? s.seqlen : a.lengths[p.batch];
  general_load(a.starts == nullptr ? nullptr : a.starts + p.batch * size, s, p, x);
  for (std::int64_t t = 0; t < s.seqlen; ++t) {
    if (a.chunk_states != nullptr && t % kChunk == 0)
      general_store(a.chunk_states + (p.batch * s.chunks + t / kChunk) * size, s, p, x);
    const std::int64_t token = p.batch * s.seqlen + t;
    const bool valid = t < length;
    const float u = valid ? to_float(a.u[token * s.heads + p.head]) : 0.0F;
    if (valid) general_advance(a.parameters, s, p, u, x, x, products);
    for (std::int64_t c = 0; c < s.channels; ++c) {
      float sum = 0.0F;
      for (std::int64_t n = p.lane; n < s.states; n += 32) {
        const float2 C = general_read_out(a.parameters, s, p, c, n);
        sum = fmaf(C.x, x[n].x, fmaf(-C.y, x[n].y, sum));
      }
      sum = 2.0F * general_sum(sum);
      const float D = a.parameters.D == nullptr ? 0.0F : a.parameters.D[c * s.heads + p.head];
      if (p.lane == 0)
        a.y[(token * s.channels + c) * s.heads + p.head] =
            from_float<T>(valid ? fmaf(D, u, sum) : 0.0F);
    }
  }
  if (a.state_out != nullptr) general_store(a.state_out + p.batch * size, s, p, x);
}

template <class T>
void forward_general(Context& ctx, const ForwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  Tensor states = ctx.empty({s.batch, s.heads, s.states, 2}, DType::float32);
  const auto shared = static_cast<std::size_t>(kGeneralWarps * s.rank) * sizeof(float);
  dplr_scan_forward_general_kernel<T>
      <<<general_blocks(s), kGeneralThreads, shared, ctx.stream().handle>>>(
          args, reinterpret_cast<float2*>(states.view().data<float>()));
  LRNN_CUDA_CHECK_LAUNCH();
}

constexpr int kMatrix = 2 * static_cast<int>(kMaxSplitStates);
constexpr int kPitch = kMatrix + 1;
constexpr int kSide = 16;
constexpr int kTile = kMatrix / kSide;

// (Re, Im) of state n of planes [2, H, N] as one vector: element i of head h.
__device__ double element(const float* planes, const Sizes& s, std::int64_t h, int i) {
  const int states = static_cast<int>(s.states);
  return static_cast<double>(
      planes[(i >= states ? s.plane : 0) + h * s.states + (i >= states ? i - states : i)]);
}

// Powers M^(2^squarings) of the transitions on (Re x, Im x), [H, 2 N, 2 N], or their transposes.
// One block per head squares its matrix in shared memory, in double: rounding would double with
// every squaring. Thread (x, y) owns rows y + 16 r and columns x + 16 c of the product. Bound by
// double-precision FMA.
__global__ __launch_bounds__(kSide* kSide) void dplr_scan_power_kernel(Sizes s,
                                                                       Parameters parameters,
                                                                       int squarings,
                                                                       bool transpose, float* out) {
  __shared__ double matrix[kMatrix * kPitch];
  const std::int64_t h = blockIdx.x;
  const int states = static_cast<int>(s.states);
  const int size = 2 * states;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kMatrix * kPitch; i += kSide * kSide) matrix[i] = 0.0;
  __syncthreads();
  for (int i = thread; i < size * size; i += kSide * kSide) {
    const int row = i / size;
    const int column = i % size;
    double v = -2.0 * element(parameters.w, s, h, row) * element(parameters.k, s, h, column);
    if (row == column) v += 1.0;
    if (row % states == column % states) {
      const int n = row % states;
      if (row == column)
        v += element(parameters.e, s, h, n);
      else
        v += (row > column ? 1.0 : -1.0) * element(parameters.e, s, h, n + states);
    }
    matrix[row * kPitch + column] = v;
  }
  const int x = thread % kSide;
  const int y = thread / kSide;
  for (int step = 0; step < squarings; ++step) {
    double sum[kTile][kTile] = {};
    __syncthreads();
    for (int j = 0; j < size; ++j) {
      double left[kTile];
      double right[kTile];
#pragma unroll
      for (int r = 0; r < kTile; ++r) left[r] = matrix[(y + kSide * r) * kPitch + j];
#pragma unroll
      for (int c = 0; c < kTile; ++c) right[c] = matrix[j * kPitch + x + kSide * c];
#pragma unroll
      for (int r = 0; r < kTile; ++r)
#pragma unroll
        for (int c = 0; c < kTile; ++c) sum[r][c] = fma(left[r], right[c], sum[r][c]);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) matrix[(y + kSide * r) * kPitch + x + kSide * c] = sum[r][c];
  }
  __syncthreads();
  for (int i = thread; i < size * size; i += kSide * kSide) {
    const int row = i / size;
    const int column = i % size;
    out[h * size * size + i] =
        static_cast<float>(matrix[transpose ? column * kPitch + row : row * kPitch + column]);
  }
}

struct CarryArgs {
  Sizes sizes;
  bool reverse;
  const std::int32_t* lengths;
  const float* powers;  // of M, transposed in forward, so that a product reads columns
  const float* ends;    // [B, segments, 2, H, N]
  const float* start;   // [B, 2, H, N] or null
  float* carries;       // [B, segments, 2, H, N]
};

// One block per head of a sequence walks its segments; thread i owns element i of (Re x, Im x). The
// chain begins at the segment of the start, whose end already holds it. Bound by latency.
__global__ __launch_bounds__(kMatrix) void dplr_scan_carry_kernel(CarryArgs a) {
  __shared__ float state[kMatrix];
  const Sizes& s = a.sizes;
  const std::int64_t batch = blockIdx.x / s.heads;
  const std::int64_t h = blockIdx.x % s.heads;
  const int size = 2 * static_cast<int>(s.states);
  const int i = static_cast<int>(threadIdx.x);
  const bool exists = i < size;
  const std::int64_t at = !exists        ? 0
                          : i < s.states ? h * s.states + i
                                         : s.plane + h * s.states + (i - s.states);
  const float* const power = a.powers + h * size * size + (exists ? i : 0);
  const std::int64_t length = a.lengths == nullptr ? s.seqlen : a.lengths[batch];
  const std::int64_t origin = a.reverse ? (length - 1) / (s.segment_chunks * kChunk) : 0;
  float carry = 0.0F;
  for (std::int64_t count = 0; count < s.segments; ++count) {
    const std::int64_t segment = a.reverse ? s.segments - 1 - count : count;
    const std::int64_t row = (batch * s.segments + segment) * 2 * s.plane;
    if (segment == origin && exists)
      carry = a.start == nullptr ? 0.0F : a.start[batch * 2 * s.plane + at];
    if (exists) a.carries[row + at] = carry;
    if (count + 1 == s.segments) break;
    state[i] = carry;
    __syncthreads();
    float sum = 0.0F;
    if (exists && segment != origin) {
#pragma unroll 8
      for (int j = 0; j < size; ++j) sum = fmaf(power[j * size], state[j], sum);
    }
    if (exists) carry = sum + a.ends[row + at];
    __syncthreads();
  }
}

}  // namespace

template <class T>
Tensor connect_segments(Context& ctx, EndsArgs<T> args, bool reverse) {
  const Sizes& s = args.sizes;
  const auto stream = ctx.stream().handle;
  const Shape states = {s.batch, s.segments, 2, s.heads, s.states};
  Tensor ends = ctx.empty(states, DType::float32);
  Tensor carries = ctx.empty(states, DType::float32);
  Tensor powers = ctx.empty({s.heads, 2 * s.states, 2 * s.states}, DType::float32);
  int squarings = 0;
  while ((std::int64_t{1} << squarings) < s.segment_chunks * kChunk) ++squarings;
  dplr_scan_power_kernel<<<static_cast<unsigned>(s.heads), kSide * kSide, 0, stream>>>(
      s, args.parameters, squarings, !reverse, powers.view().data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
  args.ends = ends.view().data<float>();
  launch_ends(ctx, args, reverse);
  dplr_scan_carry_kernel<<<static_cast<unsigned>(s.batch * s.heads), kMatrix, 0, stream>>>(
      {s, reverse, args.lengths, powers.view().data<float>(), args.ends, args.start,
       carries.view().data<float>()});
  LRNN_CUDA_CHECK_LAUNCH();
  return carries;
}
template Tensor connect_segments(Context&, EndsArgs<float>, bool);
template Tensor connect_segments(Context&, EndsArgs<__nv_bfloat16>, bool);

}  // namespace dplr

void dplr_scan_forward(Context& ctx, const DplrScanForward& a) {
  using namespace dplr;  // NOLINT(google-build-using-namespace)
  const Sizes s{detail::DplrScanSizes(a.w, a.C, a.u)};
  visit_float("dplr_scan_forward", a.u.dtype(), [&]<class T>() {
    const ForwardArgs<T> args{s,
                              parameters_of(a),
                              a.u.data<T>(),
                              data_or_null<const std::int32_t>(a.lengths),
                              data_or_null<const float>(a.state_in),
                              a.y.data<T>(),
                              data_or_null<float>(a.state_out),
                              data_or_null<float>(a.chunk_states)};
    if (s.in_registers())
      forward(ctx, args);
    else
      forward_general(ctx, args);
  });
}

}  // namespace lrnn::cuda
