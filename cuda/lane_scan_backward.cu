// Backward: steps and ownership as in common/lane_scan.cuh, from right to left. Step 3 is fused:
// per chunk and sub-state the states are recomputed into registers, then the adjoint walks back
// over them. Where outputs sum over lanes, a block takes the groups one after another and adds up
// the gradient of its inputs.
//
// Bound by issue slots: per sub-state and token four FMA for the state, six for the adjoint, four
// for da, two for dW and one for dv. Sums of a chunk are made first and then added to those of the
// segment: two short sums round less than a long one.
#include "lrnn/ops/lane_scan.hpp"

#include "common/check.cuh"
#include "common/lane_scan.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace lane {
namespace {

enum Field { kMultiplier, kGap, kCarry, kDMultiplier, kWeights };  // then W and dW by channel

template <class T>
struct BackwardArgs {
  Sizes sizes;
  const float* a;
  const float* a_low;
  const float* W;
  const float* skip;
  const T* v;
  const std::int32_t* lengths;
  const T* dy;
  const float* chunk_states;
  const float* dstate_out;
  T* dv;
  float* dv_sums;        // dv over several groups, float32 [B, L, I]: dv itself if it is float32
  float* dstate_in;      // may be null
  float* partial;        // [B S, 1 + C, 2, N, M]: da, then dW of every channel
  float* partial_skip;   // [B S, C, N]; may be null
  float* ends;           // step 1
  const float* carries;  // step 3; null with one segment
  float2* columns;       // null: in shared memory
};

// float2 values that a thread keeps in its columns.
std::int64_t column_values(const Sizes& s) {
  return (kWeights + 2 * s.channels) * s.per_part + s.channels;
}

struct Substate {
  float2 a;
  float2 W;
  float2 carry;
  float2 da{0.0F, 0.0F};
  float2 dW{0.0F, 0.0F};

  // The adjoint of one token: `after` is the state that it left, `before` the one that it found.
  __device__ __forceinline__ void retreat(float g, float2 before, float2 after, float& dv) {
    const float2 p{fmaf(g, W.x, carry.x), fmaf(-g, W.y, carry.y)};
    dW.x = fmaf(g, after.x, dW.x);
    dW.y = fmaf(-g, after.y, dW.y);
    dv += p.x;
    da = multiply_conj_add(p, before, da);
    carry = multiply_conj_add(p, a, {0.0F, 0.0F});
  }
};

// One sub-state through a chunk and back. Tokens from `steps` on do not exist.
template <bool kFull>
__device__ __forceinline__ void walk_back(Substate& sub, float2 x, const float* tokens,
                                          const float* gradients, int steps, float (&dv)[kChunk]) {
  float2 before[kChunk];
#pragma unroll
  for (int q = 0; q < kChunk / 4; ++q) {
    const float4 four = *reinterpret_cast<const float4*>(tokens + 4 * q);
    const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      before[4 * q + j] = x;
      if (kFull || 4 * q + j < steps) x = advance(sub.a, x, v[j]);
    }
  }
#pragma unroll
  for (int q = kChunk / 4 - 1; q >= 0; --q) {
    const float4 four = *reinterpret_cast<const float4*>(gradients + 4 * q);
    const float g[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      if (kFull || 4 * q + j < steps) sub.retreat(g[j], before[4 * q + j], x, dv[4 * q + j]);
      x = before[4 * q + j];
    }
  }
}

// Step 1: the adjoint alone.
template <bool kFull>
__device__ __forceinline__ float2 carry_back(float2 a, float2 W, float2 carry,
                                             const float* gradients, int steps) {
#pragma unroll
  for (int q = kChunk / 4 - 1; q >= 0; --q) {
    const float4 four = *reinterpret_cast<const float4*>(gradients + 4 * q);
    const float g[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 3; j >= 0; --j)
      if (kFull || 4 * q + j < steps)
        carry = multiply_conj_add({fmaf(g[j], W.x, carry.x), fmaf(-g[j], W.y, carry.y)}, a,
                                  {0.0F, 0.0F});
  }
  return carry;
}

// The walk of one block back through one tile of lanes.
template <class T, bool kEnds>
class WalkBack {
 public:
  __device__ WalkBack(const BackwardArgs<T>& args, const Segment& segment, std::int64_t group,
                      std::int64_t tile, float* memory, std::int64_t values)
      : args_(args),
        s_(args.sizes),
        segment_(segment),
        group_(group),
        place_(args.sizes, group, tile),
        v_tile_(memory),
        g_tile_(memory + args.sizes.tile * kPitch),
        columns_{args.columns, args.sizes.per_part} {
    if (args.columns == nullptr)
      columns_.base = reinterpret_cast<float2*>(memory + 2 * args.sizes.tile * kPitch);
    else
      columns_.base += static_cast<std::int64_t>(blockIdx.x) * kThreads * values;
  }

  __device__ void run() {
    load_columns();
    for (std::int64_t chunk = segment_.last_chunk - 1; chunk >= segment_.first_chunk; --chunk) {
      const int steps = segment_.steps(chunk);
      const std::int64_t token = segment_.batch * s_.seqlen + chunk * kChunk;
      if constexpr (kEnds) {
        if (steps > 0) ends_chunk(token, steps);
      } else {
        walk_chunk(chunk, token, steps);
      }
    }
    if constexpr (kEnds) {
      store_column(kCarry, args_.ends + segment_.row * 2 * s_.plane);
    } else {
      store_gradients();
    }
  }

 private:
  [[nodiscard]] __device__ int weight(int c) const { return kWeights + 2 * c; }
  [[nodiscard]] __device__ int dweight(int c) const { return kWeights + 2 * c + 1; }
  [[nodiscard]] __device__ float2& dskip(int c) const {
    return columns_.at(kWeights + 2 * static_cast<int>(s_.channels), 0 + c);
  }

  // What enters a segment from the right: nothing in step 1, the carry in step 3, and the gradient
  // of the final state behind the last valid token.
  __device__ void load_columns() const {
    const bool last = args_.dstate_out != nullptr && segment_.holds_last;
    for (int i = 0; i < s_.per_part; ++i) {
      const Slot slot(s_, place_, i);
      const float2 a = load_pair(args_.a, s_, slot);
      columns_.at(kMultiplier, i) = a;
      columns_.at(kGap, i) = power_gap(a, load_pair(args_.a_low, s_, slot), kChunk);
      float2 carry{0.0F, 0.0F};
      if (!kEnds && args_.carries != nullptr)
        carry = load_pair(args_.carries + segment_.row * 2 * s_.plane, s_, slot);
      if (last)
        carry = carry + load_pair(args_.dstate_out + segment_.batch * 2 * s_.plane, s_, slot);
      columns_.at(kCarry, i) = carry;
      columns_.at(kDMultiplier, i) = {0.0F, 0.0F};
      for (int c = 0; c < s_.channels; ++c) {
        columns_.at(weight(c), i) = load_weight(args_.W, s_, slot, c);
        columns_.at(dweight(c), i) = {0.0F, 0.0F};
      }
    }
    for (int c = 0; c < s_.channels; ++c) dskip(c) = {0.0F, 0.0F};
  }
  __device__ void store_column(int field, float* planes) const {
    for (int i = 0; i < s_.per_part; ++i)
      store_pair(planes, s_, Slot(s_, place_, i), columns_.at(field, i));
  }
  __device__ void store_gradients() const {
    float* const partial = args_.partial + segment_.row * (1 + s_.channels) * 2 * s_.plane;
    store_column(kDMultiplier, partial);
    for (int c = 0; c < s_.channels; ++c)
      store_column(dweight(c), partial + (1 + c) * 2 * s_.plane);
    if (args_.dstate_in != nullptr && segment_.index == 0)
      store_column(kCarry, args_.dstate_in + segment_.batch * 2 * s_.plane);
    if (args_.partial_skip == nullptr || !place_.exists || place_.part != 0) return;
    for (int c = 0; c < s_.channels; ++c)
      args_.partial_skip[(segment_.row * s_.channels + c) * s_.lanes + place_.lane] = dskip(c).x;
  }

  // Gradients of one channel; every lane of a group has the gradient of the group's output.
  __device__ void fill_gradients(std::int64_t token, int c, int steps) const {
    const bool sums = s_.groups > 1;
    const std::int64_t first = sums ? group_ : c * s_.inputs + place_.column;
    fill_tile(g_tile_, args_.dy + token * s_.outputs + first, s_.outputs, sums ? 0 : 1, steps,
              place_.columns, s_);
  }
  [[nodiscard]] __device__ float2 gap(int i, float2 a, int steps) const {
    if (steps == kChunk) return columns_.at(kGap, i);
    return power_gap(a, load_pair(args_.a_low, s_, Slot(s_, place_, i)), steps);
  }

  __device__ void ends_chunk(std::int64_t token, int steps) const {
    const float* const gradients = g_tile_ + place_.row * kPitch;
    for (int c = 0; c < s_.channels; ++c) {
      fill_gradients(token, c, steps);
      __syncthreads();
      for (int i = 0; i < s_.per_part; ++i) {
        const float2 a = columns_.at(kMultiplier, i);
        const float2 W = columns_.at(weight(c), i);
        const float2 entering = columns_.at(kCarry, i);
        // The recurrence is linear: channels add up.
        const float2 begin = c == 0 ? entering : float2{0.0F, 0.0F};
        float2 carry = steps == kChunk ? carry_back<true>(a, W, begin, gradients, steps)
                                       : carry_back<false>(a, W, begin, gradients, steps);
        if (c == 0)
          carry = multiply_conj_add(entering, gap(i, a, steps), carry);
        else
          carry = carry + entering;
        columns_.at(kCarry, i) = carry;
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void walk_chunk(std::int64_t chunk, std::int64_t token,
                                             int steps) const {
    float dv[kChunk] = {};
    for (int c = 0; c < s_.channels && steps > 0; ++c) {
      if (c == 0)
        fill_tile(v_tile_, args_.v + token * s_.inputs + place_.column, s_.inputs, 1, steps,
                  place_.columns, s_);
      fill_gradients(token, c, steps);
      __syncthreads();
      const float* const states =
          args_.chunk_states + (segment_.batch * s_.chunks + chunk) * 2 * s_.plane;
      float2 next = load_pair(states, s_, Slot(s_, place_, 0));
      for (int i = 0; i < s_.per_part; ++i) {
        const float2 before = next;
        if (i + 1 < s_.per_part) next = load_pair(states, s_, Slot(s_, place_, i + 1));
        walk_substate(i, c, before, steps, dv);
      }
      if (args_.partial_skip != nullptr || args_.skip != nullptr) walk_skip(c, dv);
      __syncthreads();
    }
    reduce_parts(dv, place_.part, s_.parts);
    const int at = place_.row * kPitch + first_token(place_.part, s_.parts);
    const int count = kChunk / s_.parts;
#pragma unroll
    for (int j = 0; j < kChunk / kMinParts; ++j)
      if (j < count) v_tile_[at + j] = dv[j];
    __syncthreads();
    store_dv(token, steps,
             static_cast<int>(min(s_.seqlen - chunk * kChunk, static_cast<std::int64_t>(kChunk))));
    __syncthreads();
  }

  __device__ __forceinline__ void walk_substate(int i, int c, float2 x, int steps,
                                                float (&dv)[kChunk]) const {
    const float* const tokens = v_tile_ + place_.row * kPitch;
    const float* const gradients = g_tile_ + place_.row * kPitch;
    const float2 entering = columns_.at(kCarry, i);
    Substate sub{columns_.at(kMultiplier, i), columns_.at(weight(c), i),
                 c == 0 ? entering : float2{0.0F, 0.0F}};
    if (steps == kChunk)
      walk_back<true>(sub, x, tokens, gradients, steps, dv);
    else
      walk_back<false>(sub, x, tokens, gradients, steps, dv);
    if (c == 0)
      sub.carry = multiply_conj_add(entering, gap(i, sub.a, steps), sub.carry);
    else
      sub.carry = sub.carry + entering;
    columns_.at(kCarry, i) = sub.carry;
    columns_.at(kDMultiplier, i) = columns_.at(kDMultiplier, i) + sub.da;
    columns_.at(dweight(c), i) = columns_.at(dweight(c), i) + sub.dW;
  }

  // dskip in every thread of the lane, of which one writes it; dv in one, because threads add up.
  // Tokens past the last valid one are zeros in both tiles.
  __device__ __forceinline__ void walk_skip(int c, float (&dv)[kChunk]) const {
    const float* const tokens = v_tile_ + place_.row * kPitch;
    const float* const gradients = g_tile_ + place_.row * kPitch;
    float skip = 0.0F;
    if (args_.skip != nullptr && place_.exists && place_.part == 0)
      skip = args_.skip[c * s_.lanes + place_.lane];
    float sum = 0.0F;
#pragma unroll
    for (int q = 0; q < kChunk / 4; ++q) {
      const float4 v = *reinterpret_cast<const float4*>(tokens + 4 * q);
      const float4 g = *reinterpret_cast<const float4*>(gradients + 4 * q);
      sum += fmaf(g.x, v.x, g.y * v.y) + fmaf(g.z, v.z, g.w * v.w);
      dv[4 * q] = fmaf(skip, g.x, dv[4 * q]);
      dv[4 * q + 1] = fmaf(skip, g.y, dv[4 * q + 1]);
      dv[4 * q + 2] = fmaf(skip, g.z, dv[4 * q + 2]);
      dv[4 * q + 3] = fmaf(skip, g.w, dv[4 * q + 3]);
    }
    dskip(c).x += sum;
  }

  // A token of a lane is stored by the same thread in every group.
  __device__ void store_dv(std::int64_t token, int steps, int size) const {
    const std::int64_t first = token * s_.inputs + place_.column;
    for (int i = static_cast<int>(threadIdx.x); i < size << s_.tile_log2; i += kThreads) {
      const int t = i >> s_.tile_log2;
      const int lane = i & (s_.tile - 1);
      if (lane >= place_.columns) continue;
      const std::int64_t at = first + t * s_.inputs + lane;
      float sum = t < steps ? v_tile_[lane * kPitch + t] : 0.0F;
      if (group_ > 0) sum += args_.dv_sums[at];
      if (group_ + 1 < s_.groups)
        args_.dv_sums[at] = sum;
      else
        args_.dv[at] = from_float<T>(sum);
    }
  }

  const BackwardArgs<T>& args_;
  const Sizes& s_;
  const Segment& segment_;
  std::int64_t group_;
  Place place_;
  float* v_tile_;
  float* g_tile_;
  Columns columns_;
};

// One block per segment and tile of inputs. kEnds: step 1, which writes nothing but what leaves a
// segment to the left. Else step 3.
template <class T, bool kEnds>
__global__ __launch_bounds__(kThreads) void lane_scan_backward_kernel(BackwardArgs<T> args,
                                                                      std::int64_t values) {
  extern __shared__ __align__(16) float memory[];
  const Sizes& s = args.sizes;
  const Segment segment(s, args.lengths, blockIdx.x / s.tiles);
  if (kEnds && segment.index == 0) return;  // nothing precedes it
  for (std::int64_t group = 0; group < s.groups; ++group)
    WalkBack<T, kEnds>(args, segment, group, blockIdx.x % s.tiles, memory, values).run();
}

constexpr int kSumColumns = 32;
constexpr int kSumRows = 16;

struct SumArgs {
  Sizes sizes;
  const float* a;
  const float* a_low;
  const float* partial;
  float* da;
  float* dlog_a;
  float* dW;
};

__device__ void add_pair(float* planes, std::int64_t plane, std::int64_t offset, double re,
                         double im) {
  if (planes == nullptr) return;
  planes[offset] += static_cast<float>(re);
  planes[plane + offset] += static_cast<float>(im);
}

// A block owns kSumColumns sub-states of the gradient of a (blockIdx.y = 0) or of one channel of W;
// thread (column, row) sums rows row, row + kSumRows, ... dlog_a is conj(a) da, because a is the
// same at every token.
__global__ __launch_bounds__(kSumColumns* kSumRows) void lane_scan_sum_kernel(SumArgs args) {
  __shared__ double sums[2][kSumRows][kSumColumns];
  const Sizes& s = args.sizes;
  const int column = static_cast<int>(threadIdx.x) % kSumColumns;
  const int first = static_cast<int>(threadIdx.x) / kSumColumns;
  const std::int64_t offset = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + column;
  const std::int64_t field = blockIdx.y;
  const bool exists = offset < s.plane;
  double re = 0.0;
  double im = 0.0;
  for (std::int64_t row = first; exists && row < s.batch * s.segments; row += kSumRows) {
    const float* const planes =
        args.partial + (row * (1 + s.channels) + field) * 2 * s.plane + offset;
    re += static_cast<double>(planes[0]);
    im += static_cast<double>(planes[s.plane]);
  }
  sums[0][first][column] = re;
  sums[1][first][column] = im;
  __syncthreads();
  if (first != 0 || !exists) return;
  for (int i = 1; i < kSumRows; ++i) {
    re += sums[0][i][column];
    im += sums[1][i][column];
  }
  if (field > 0) {
    if (args.dW == nullptr) return;
    if (s.real_weight)
      args.dW[(field - 1) * s.plane + offset] += static_cast<float>(re);
    else
      add_pair(args.dW + (field - 1) * 2 * s.plane, s.plane, offset, re, im);
    return;
  }
  add_pair(args.da, s.plane, offset, re, im);
  if (args.dlog_a == nullptr) return;
  double a_re = static_cast<double>(args.a[offset]);
  double a_im = static_cast<double>(args.a[s.plane + offset]);
  if (args.a_low != nullptr) {
    a_re += static_cast<double>(args.a_low[offset]);
    a_im += static_cast<double>(args.a_low[s.plane + offset]);
  }
  add_pair(args.dlog_a, s.plane, offset, re * a_re + im * a_im, im * a_re - re * a_im);
}

void sum_rows(Context& ctx, const SumArgs& args) {
  const dim3 blocks(static_cast<unsigned>((args.sizes.plane + kSumColumns - 1) / kSumColumns),
                    static_cast<unsigned>(1 + args.sizes.channels));
  lane_scan_sum_kernel<<<blocks, kSumColumns * kSumRows, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, bool kEnds>
void launch(Context& ctx, const BackwardArgs<T>& args, std::size_t shared, std::int64_t values) {
  const auto blocks = static_cast<unsigned>(args.sizes.rows() * args.sizes.tiles);
  lane_scan_backward_kernel<T, kEnds>
      <<<blocks, kThreads, shared, ctx.stream().handle>>>(args, values);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T>
void backward(Context& ctx, BackwardArgs<T> args) {
  const Sizes& s = args.sizes;
  const std::int64_t values = column_values(s);
  std::size_t shared =
      2 * s.tile_bytes() + static_cast<std::size_t>(values * kThreads) * sizeof(float2);
  Tensor columns, sums, ends, carries;
  if (shared > kSharedLimit) {
    shared = 2 * s.tile_bytes();
    columns = ctx.empty({s.rows() * s.tiles, values, kThreads, 2}, DType::float32);
    args.columns = reinterpret_cast<float2*>(columns.view().data<float>());
  }
  if (s.groups > 1) {
    if constexpr (std::is_same_v<T, float>) {
      args.dv_sums = args.dv;
    } else {
      sums = ctx.empty({s.batch, s.seqlen, s.inputs}, DType::float32);
      args.dv_sums = sums.view().data<float>();
    }
  }
  if (s.segments > 1) {
    ends = ctx.empty(s.segment_states(), DType::float32);
    carries = ctx.empty(s.segment_states(), DType::float32);
    args.ends = ends.view().data<float>();
    launch<T, true>(ctx, args, shared, values);
    launch_carry(ctx,
                 {s, true, args.a, args.a_low, args.ends, nullptr, carries.view().data<float>()});
    args.carries = carries.view().data<float>();
  }
  launch<T, false>(ctx, args, shared, values);
}

}  // namespace
}  // namespace lane

void lane_scan_backward(Context& ctx, const LaneScanBackward& a) {
  using namespace lane;  // NOLINT(google-build-using-namespace)
  const Sizes s(detail::LaneScanSizes(a.a, a.W, a.v), false);
  Tensor partial = ctx.empty({s.rows(), 1 + s.channels, 2, s.lanes, s.substates}, DType::float32);
  Tensor partial_skip;
  if (a.dskip) partial_skip = ctx.empty({s.rows(), s.channels, s.lanes}, DType::float32);
  visit_float("lane_scan_backward", a.v.dtype(), [&]<class T>() {
    backward<T>(
        ctx,
        {s, a.a.data<float>(), data_or_null<float>(a.a_low), a.W.data<float>(),
         data_or_null<float>(a.skip), a.v.data<T>(), data_or_null<std::int32_t>(a.lengths),
         a.dy.data<T>(), a.chunk_states.data<float>(), data_or_null<float>(a.dstate_out),
         a.dv.data<T>(), nullptr, data_or_null<float>(a.dstate_in), partial.view().data<float>(),
         data_or_null<float>(partial_skip.view()), nullptr, nullptr, nullptr});
  });
  if (a.da || a.dlog_a || a.dW)
    sum_rows(ctx,
             {s, a.a.data<float>(), data_or_null<float>(a.a_low), partial.view().data<float>(),
              data_or_null<float>(a.da), data_or_null<float>(a.dlog_a), data_or_null<float>(a.dW)});
  if (a.dskip)
    fold_partials(ctx.stream().handle, partial_skip.view().data<float>(),
                  static_cast<int>(s.rows()), s.channels * s.lanes, a.dskip.data<float>());
}

}  // namespace lrnn::cuda
