// Forward and what both passes need between segments. Steps and ownership: common/dplr_scan.cuh.
//
// Bound by issue slots: per state and token ten instructions of the recurrence, two of the inner
// product and two of the read-out; per head and token three shuffles of the inner product and one
// each for input and output. Step 1 repeats the recurrence.
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
  float* ends;  // step 1
};

// Eight tokens. `left` tokens of this group are valid, `most` of some group of the warp.
template <bool kFull, bool kReadOut, int kLanes, int kPer>
__device__ __forceinline__ void walk_block(const Transition<kPer>& m, const Pairs<kPer>& b,
                                           const Pairs<kPer>& C, float own_u, int left, int most,
                                           Pairs<kPer>& x, float (&y)[kBlock]) {
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    if (!kFull && j >= most) continue;  // the whole warp
    const float u = token_value<kLanes>(own_u, j);
    advance<kLanes>(m, b, u, kFull || j < left, x);
    if constexpr (kReadOut) {
      float re = C.v[0].x * x.v[0].x;
      float im = C.v[0].y * x.v[0].y;
#pragma unroll
      for (int i = 1; i < kPer; ++i) {
        re = fmaf(C.v[i].x, x.v[i].x, re);
        im = fmaf(C.v[i].y, x.v[i].y, im);
      }
      y[j] = re - im;
    }
  }
}

// kEnds: step 1, which writes nothing but the ends of segments. Else step 3.
template <class T, int kLanes, int kPer, bool kEnds>
__global__ __launch_bounds__(kThreads, 4) void dplr_scan_forward_kernel(ForwardArgs<T> a,
                                                                        SegmentRange range) {
  const Sizes& s = a.sizes;
  const Place<kLanes> p(s, a.lengths, range);
  const Transition<kPer> m = load_transition<kLanes, kPer>(a.parameters, s, p);
  const auto b = load_planes<kLanes, kPer>(a.parameters.b, s, p);
  Pairs<kPer> C{};
  float D = 0.0F;
  if constexpr (!kEnds) {
    C = load_interleaved<kLanes, kPer>(a.parameters.C, s, p);
    if (a.parameters.D != nullptr) D = a.parameters.D[p.head];
  }
  const float* start = nullptr;
  if (a.starts != nullptr && !kEnds) start = a.starts + p.row * 2 * s.plane;
  if (a.starts != nullptr && kEnds && p.first) start = a.starts + p.batch * 2 * s.plane;
  auto x = load_planes<kLanes, kPer>(start, s, p);

  const std::int64_t column = p.column(s);
  const T* const u = a.u + column;
  const auto load_u = [&](int t) {
    return p.exists && t < p.end ? to_float(u[t * s.heads]) : 0.0F;
  };
  float next_u = load_u(p.begin + p.sub);
  for (int t0 = 0; t0 < p.longest; t0 += kBlock) {
    const int t = p.begin + t0;
    const float own_u = next_u;
    next_u = load_u(t + kBlock + p.sub);
    if (!kEnds && a.chunk_states != nullptr && t0 % kChunk == 0 && t < p.size_end)
      store_planes(a.chunk_states + (p.batch * s.chunks + t / kChunk) * 2 * s.plane, s, p, x);
    const int left = p.left(t, kBlock);
    float y[kBlock] = {};
    if (__all_sync(kAll, left == kBlock))
      walk_block<true, !kEnds, kLanes>(m, b, C, own_u, kBlock, kBlock, x, y);
    else
      walk_block<false, !kEnds, kLanes>(m, b, C, own_u, left, warp_max(left), x, y);
    if constexpr (!kEnds) {
      const float sum = transposed_sum<kLanes>(y, p.sub);
      if (p.exists && p.lane < kBlock && t + p.sub < p.size_end)
        a.y[column + (t + p.sub) * s.heads] =
            from_float<T>(p.sub < left ? fmaf(D, own_u, 2.0F * sum) : 0.0F);
    }
  }
  if constexpr (kEnds)
    store_planes(a.ends + p.row * 2 * s.plane, s, p, x);
  else if (a.state_out != nullptr && p.holds_last)
    store_planes(a.state_out + p.batch * 2 * s.plane, s, p, x);
}

template <class T, bool kEnds>
void launch(Context& ctx, const ForwardArgs<T>& args, const SegmentRange& range) {
  visit_width(args.sizes.states, [&](auto lanes, auto per) {
    dplr_scan_forward_kernel<T, lanes(), per(), kEnds>
        <<<group_blocks(args.sizes, range, lanes(), kThreads), kThreads, 0, ctx.stream().handle>>>(
            args, range);
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void forward(Context& ctx, ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  Tensor carries;
  if (s.segments > 1) {
    carries =
        connect_segments(ctx, {s, false, args.lengths, nullptr, nullptr, args.starts, nullptr},
                         args.parameters, [&](const SegmentRange& range, float* ends) {
                           args.ends = ends;
                           launch<T, true>(ctx, args, range);
                         });
    args.starts = carries.view().template data<float>();
  }
  launch<T, false>(ctx, args, {0, s.segments});
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

void launch_powers(Context& ctx, const Sizes& s, const Parameters& parameters, int squarings,
                   bool transpose, float* out) {
  dplr_scan_power_kernel<<<static_cast<unsigned>(s.heads), kSide * kSide, 0, ctx.stream().handle>>>(
      s, parameters, squarings, transpose, out);
  LRNN_CUDA_CHECK_LAUNCH();
}

void launch_carry(Context& ctx, const CarryArgs& args) {
  dplr_scan_carry_kernel<<<static_cast<unsigned>(args.sizes.batch * args.sizes.heads), kMatrix, 0,
                           ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

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
                              data_or_null<float>(a.chunk_states),
                              nullptr};
    if (s.in_registers())
      forward(ctx, args);
    else
      forward_general(ctx, args);
  });
}

}  // namespace lrnn::cuda
