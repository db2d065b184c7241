// Forward and what both passes need between segments. Steps and ownership: common/dplr_scan.cuh.
//
// Token by token, bound by issue slots: per state and token 11 instructions (9.5 of them with four
// tokens at once), per head and token about four shuffles. Without tokens at once it would be 14
// instructions, and a reduction to wait for at every token, which bounds small numbers of heads.
#include "lrnn/ops/dplr_scan.hpp"

#include "common/dplr_ahead.cuh"
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

// The tokens of a block one by one, of which `left` are valid.
template <int kLanes, int kPer>
__device__ __forceinline__ float walk_block(const Transition<kPer>& m, const Pairs<kPer>& b,
                                            const Pairs<kPer>& C, float own_u, int left, int sub,
                                            Pairs<kPer>& x) {
  const int most = warp_max(left);
  float y[kBlock] = {};
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    if (j >= most) continue;  // the whole warp
    advance<kLanes>(m, b, token_value<kLanes>(own_u, j), j < left, x);
    y[j] = partial_product(C, x);
  }
  return 2.0F * transposed_sum<kLanes>(y, sub);
}

// Step 3 at once: as many tokens as registers allow.
template <int kPer>
constexpr int kAheadOf = kPer <= 2 ? 4 : 2;

// One read-out of kAhead tokens. Returns that of the token of this lane.
template <int kLanes, int kAhead, int kPer>
__device__ __forceinline__ float walk_ahead(const Ahead<kAhead, kPer>& m,
                                            const AheadReadOut<kAhead, kPer>& out,
                                            const float (&v)[kAhead], int lane, Pairs<kPer>& x) {
  float part[2 * kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    part[j] = partial_product(m.k[j], x);
    part[kAhead + j] = partial_product(out.C[j], x);
  }
  float own = 0.0F;
  if constexpr (kAhead == 4)
    own = transposed_sum<kLanes>(part, lane % kBlock);
  else
    own = transposed_sum_of_four<kLanes>(part, lane);
  float s[kAhead];
  solve_products<kLanes>(m, v, own, s);
  advance_ahead(m, v, s, x);
  return read_ahead(out, v, s, own);
}

// Step 3. Without a table all tokens are taken one by one. kTail: what follows the whole chunks.
template <class T, int kLanes, int kPer, bool kTail>
__global__ __launch_bounds__(kThreads, 3) void dplr_scan_forward_kernel(ForwardArgs<T> a,
                                                                        AheadTable table) {
  constexpr int kAhead = kAheadOf<kPer>;
  const Sizes& s = a.sizes;
  Place<kLanes> p(s, a.lengths, {0, s.segments});
  if constexpr (kTail) p.skip_whole_chunks();
  auto x = load_planes<kLanes, kPer>(a.starts == nullptr ? nullptr : a.starts + p.row * 2 * s.plane,
                                     s, p);
  T* const y = a.y + p.column(s);
  const auto keep = [&](int block) {
    const int t = p.begin + block * kBlock;
    if (a.chunk_states != nullptr && t % kChunk == 0 && t < p.size_end)
      store_planes(a.chunk_states + (p.batch * s.chunks + t / kChunk) * 2 * s.plane, s, p, x);
  };
  const TokenBlocks<T, false, kLanes> tokens(a.u, s, p);
  const int blocks = (p.longest + kBlock - 1) / kBlock;
  const int full = kTail || table.rows == nullptr ? 0 : full_blocks(p);
  if (full > 0) {
    const auto m = load_ahead<kAhead, kPer>(table, s, p);
    const auto out = load_read_out<kAhead, kPer>(table, s, p, p.lane % (2 * kAhead) - kAhead);
    const bool writes = p.exists && p.lane < 2 * kAhead && out.token >= 0;
    tokens.walk(0, full, [&](int block, float own) {
      keep(block);
#pragma unroll
      for (int j = 0; j < kBlock; j += kAhead) {
        float v[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) v[i] = token_value<kLanes>(own, j + i);
        const float value = walk_ahead<kLanes>(m, out, v, p.lane, x);
        if (writes) y[(p.begin + block * kBlock + j + out.token) * s.heads] = from_float<T>(value);
      }
    });
  }
  if (full < blocks) {
    const Transition<kPer> m = load_transition<kLanes, kPer>(a.parameters, s, p);
    const auto b = load_planes<kLanes, kPer>(a.parameters.b, s, p);
    const auto C = conjugate(load_interleaved<kLanes, kPer>(a.parameters.C, s, p));
    const float D = a.parameters.D == nullptr ? 0.0F : a.parameters.D[p.head];
    tokens.walk(full, blocks, [&](int block, float own) {
      keep(block);
      const int t = p.begin + block * kBlock;
      const int left = p.left(t, kBlock);
      const float sum = walk_block<kLanes>(m, b, C, own, left, p.sub, x);
      if (p.exists && p.lane < kBlock && t + p.sub < p.size_end)
        y[(t + p.sub) * s.heads] = from_float<T>(p.sub < left ? fmaf(D, own, sum) : 0.0F);
    });
  }
  if (a.state_out != nullptr && p.holds_last)
    store_planes(a.state_out + p.batch * 2 * s.plane, s, p, x);
}

constexpr int kEndsAhead = 4;  // tokens of step 1 at once

// Step 1.
template <class T, bool kReverse, int kLanes, int kPer>
__global__ __launch_bounds__(kThreads, 3) void dplr_scan_ends_kernel(EndsArgs<T> a,
                                                                     SegmentRange range,
                                                                     AheadTable table) {
  const Sizes& s = a.sizes;
  const Place<kLanes> p(s, a.lengths, range);
  const bool holds_start = a.start != nullptr && (kReverse ? p.holds_last : p.first);
  auto x = load_planes<kLanes, kPer>(holds_start ? a.start + p.batch * 2 * s.plane : nullptr, s, p);
  const TokenBlocks<T, kReverse, kLanes> tokens(a.tokens, s, p);
  const int blocks = (p.longest + kBlock - 1) / kBlock;
  const int full = full_blocks(p);
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
    const auto m = load_ahead<kEndsAhead, kPer>(table, s, p);
    tokens.walk(0, full, [&](int, float own) {
#pragma unroll 1
      for (int j = 0; j < kBlock; j += kEndsAhead) {
        float v[kEndsAhead];
        float part[kEndsAhead];
        float products[kEndsAhead];
#pragma unroll
        for (int i = 0; i < kEndsAhead; ++i) {
          v[i] = token_value<kLanes>(own, tokens.place(j + i));
          part[i] = partial_product(m.k[i], x);
        }
        solve_products<kLanes>(m, v, transposed_sum_of_four<kLanes>(part, p.lane), products);
        advance_ahead(m, v, products, x);
      }
    });
  }
  if (!kReverse) walk_one_by_one();
  store_planes(a.ends + p.row * 2 * s.plane, s, p, x);
}

// Owns the memory of a table.
struct AheadMemory {
  Tensor rows;
  Tensor scalars;

  AheadTable table() {
    return {reinterpret_cast<float2*>(rows.view().data<float>()), scalars.view().data<float>()};
  }
};
template <int kAhead, bool kReverse, int kLanes>
AheadMemory make_ahead(Context& ctx, Sizes s, const Parameters& parameters) {
  AheadMemory memory{ctx.empty({s.heads, kAheadRows<kAhead>, s.states, 2}, DType::float32),
                     ctx.empty({s.heads, 4, kAhead}, DType::float32)};
  s.batch = 1;  // one group per head
  s.segments = 1;
  dplr_scan_ahead_kernel<kAhead, kReverse, kLanes, kThreads>
      <<<group_blocks(s, {0, 1}, kLanes, kThreads), kThreads, 0, ctx.stream().handle>>>(
          s, parameters, memory.table());
  LRNN_CUDA_CHECK_LAUNCH();
  return memory;
}

template <class T, bool kReverse>
void launch_ends(Context& ctx, const EndsArgs<T>& args) {
  const Sizes& s = args.sizes;
  const SegmentRange range = ends_range(s, kReverse);
  visit_width(s.states, [&](auto lanes, auto per) {
    AheadMemory memory = make_ahead<kEndsAhead, kReverse, lanes()>(ctx, s, args.parameters);
    dplr_scan_ends_kernel<T, kReverse, lanes(), per()>
        <<<group_blocks(s, range, lanes(), kThreads), kThreads, 0, ctx.stream().handle>>>(
            args, range, memory.table());
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, int kLanes, int kPer, bool kTail>
void launch_forward(Context& ctx, const ForwardArgs<T>& args, const AheadTable& table) {
  const Sizes& s = args.sizes;
  dplr_scan_forward_kernel<T, kLanes, kPer, kTail>
      <<<group_blocks(s, {0, s.segments}, kLanes, kThreads), kThreads, 0, ctx.stream().handle>>>(
          args, table);
}

// By whole chunks, and what is left of every sequence token by token.
template <class T>
void forward_by_chunks(Context& ctx, ForwardArgs<T> args) {
  Sizes& s = args.sizes;
  Tensor tokens = by_head(ctx, s, args.lengths, args.u);
  Tensor outputs = empty_by_head<T>(ctx, s);
  const T* const u = tokens.view().template data<T>();
  const bool all_whole = args.lengths == nullptr && s.seqlen % kChunk == 0;
  Tensor finals;
  if (!all_whole) finals = ctx.empty({s.batch, 2, s.heads, s.states}, DType::float32);
  float* const states = all_whole ? args.state_out : finals.view().data<float>();
  walk_chunks<T>(ctx,
                 {s, args.parameters, u, args.lengths, args.starts,
                  outputs.view().template data<T>(), args.chunk_states, states},
                 false);
  by_token(ctx, s, args.lengths, outputs, args.y);
  if (all_whole) return;
  s.segments = 1;
  s.segment_chunks = s.chunks;
  args.starts = states;
  visit_width(s.states, [&](auto lanes, auto per) {
    launch_forward<T, lanes(), per(), true>(ctx, args, {});
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void forward(Context& ctx, ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  if (s.by_chunks) return forward_by_chunks(ctx, args);
  Tensor carries;
  if (s.segments > 1) {
    carries =
        connect_segments<T>(ctx, {s, args.parameters, args.u, args.lengths, args.starts}, false);
    args.starts = carries.view().template data<float>();
  }
  visit_width(s.states, [&](auto lanes, auto per) {
    AheadMemory memory;
    AheadTable table{};
    if (s.seqlen >= kBlock) {
      memory = make_ahead<kAheadOf<per()>, false, lanes()>(ctx, s, args.parameters);
      table = memory.table();
    }
    launch_forward<T, lanes(), per(), false>(ctx, args, table);
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

__device__ double increment(const Parameters& a, const Sizes& s, std::int64_t h, int i) {
  return element(a.e, s, h, i) + (a.e_low == nullptr ? 0.0 : element(a.e_low, s, h, i));
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
        v += increment(parameters, s, h, n);
      else
        v += (row > column ? 1.0 : -1.0) * increment(parameters, s, h, n + states);
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
  const std::int64_t origin = !a.reverse    ? 0
                              : s.by_chunks ? last_segment(s, length)
                                            : (length - 1) / (s.segment_chunks * kChunk);
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

void launch_carry(Context& ctx, const CarryArgs& args) {
  const auto blocks = static_cast<unsigned>(args.sizes.batch * args.sizes.heads);
  dplr_scan_carry_kernel<<<blocks, kMatrix, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

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
  if (reverse)
    launch_ends<T, true>(ctx, args);
  else
    launch_ends<T, false>(ctx, args);
  launch_carry(ctx, {s, reverse, args.lengths, powers.view().data<float>(), args.ends, args.start,
                     carries.view().data<float>()});
  return carries;
}
template Tensor connect_segments(Context&, EndsArgs<float>, bool);
template Tensor connect_segments(Context&, EndsArgs<__nv_bfloat16>, bool);

}  // namespace dplr

void dplr_scan_forward(Context& ctx, const DplrScanForward& a) {
  using namespace dplr;  // NOLINT(google-build-using-namespace)
  const Sizes s(detail::DplrScanSizes(a.w, a.C, a.u), true);
  visit_float("dplr_scan_forward", a.u.dtype(), [&]<class T>() {
    Parameters parameters = parameters_of(a);
    parameters.e_low = data_or_null<const float>(a.e_low);
    const ForwardArgs<T> args{s,
                              parameters,
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
