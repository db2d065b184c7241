// Backward: steps and ownership as in common/lane_scan.cuh, from right to left. Step 3 is fused:
// per chunk and sub-state the states before the groups are recomputed into registers, then the
// adjoint walks back over them. Where outputs sum over lanes, a block takes the groups of lanes one
// after another and adds up the gradient of its inputs.
//
// With c the adjoint of the state behind a group of tokens and g_j the gradients of its outputs:
//   c' = conj(a^4) c + sum_j conj(U_j) g_j            adjoint of the state before the group
//   dv_j += Re(conj(a^{3-j}) c),  dv_j += sum_d K_d g_{j+d}
//   d(a^4) += c conj(x),  d(a^k) += c v_{3-k},  dU_j += g_j conj(x),  dK_d += sum_j g_j v_{j-d}
// The gradients of the powers, of U and of K become those of a and W at the end of the segment.
//
// Bound by issue slots: per sub-state and group 10 FMA for the state, 12 for the adjoint, 7 for dv
// and 18 for the gradients, where single tokens would take 68. Sums of a chunk are made first and
// then added to those of the segment: two short sums round less than a long one.
#include "lrnn/ops/lane_scan.hpp"

#include "common/check.cuh"
#include "common/lane_adjoint.cuh"
#include "common/lane_scan.cuh"
#include "common/lane_walk_back.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace lane {
namespace {

// Then by channel W and dU_0 to dU_3. Step 1 keeps the powers in place of their gradients and U in
// place of its own.
enum Field { kMultiplier, kGap, kCarry, kDPowers, kWeights = kDPowers + kGroup };
constexpr int kPerChannel = 1 + kGroup;

// Values that a thread keeps in its columns: fields of every sub-state, then by channel K_0 to K_3
// and their gradients.
__host__ __device__ constexpr int field_count(std::int64_t channels) {
  return kWeights + kPerChannel * static_cast<int>(channels);
}
std::int64_t column_values(const Sizes& s) {
  return static_cast<std::int64_t>(field_count(s.channels)) * s.per_part + 4 * s.channels;
}

// Step 1: the carry alone.
template <bool kFull>
__device__ __forceinline__ float2 carry_back(float2 a, float2 fourth, const float2 (&U)[kGroup],
                                             float2 carry, const float* gradients, int steps) {
#pragma unroll
  for (int q = kChunk / kGroup - 1; q >= 0; --q) {
    if (!kFull && kGroup * q >= steps) continue;
    const float4 g = *reinterpret_cast<const float4*>(gradients + kGroup * q);
    const float2 pulled = pull_back(U, g);
    if (kFull || kGroup * (q + 1) <= steps) {
      carry = multiply_conj_add(carry, fourth, pulled);
    } else {
      for (int j = kGroup * q; j < steps; ++j) carry = retreat(a, carry);
      carry = carry + pulled;
    }
  }
  return carry;
}

// The walk of one block back through one tile of lanes.
template <class T, bool kEnds>
class WalkBack {
 public:
  __device__ WalkBack(const BackwardArgs<T>& args, const Segment& segment, std::int64_t group,
                      std::int64_t tile, float* memory)
      : args_(args),
        s_(args.sizes),
        segment_(segment),
        group_(group),
        place_(args.sizes, group, tile),
        v_tile_(memory),
        g_tile_(memory + args.sizes.tile * kPitch),
        columns_{args.columns, args.sizes.per_part, field_count(args.sizes.channels)} {
    if (args.columns == nullptr)
      columns_.base = reinterpret_cast<float2*>(memory + 2 * args.sizes.tile * kPitch);
    else
      columns_.base += static_cast<std::int64_t>(blockIdx.x) * kThreads * args.values;
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
      store_carries(args_.ends + segment_.row * 2 * s_.plane);
    } else {
      store_gradients();
    }
  }

 private:
  static constexpr int kOwn =
      kChunk / kMinAdjointParts;  // most tokens that reduce_parts leaves here

  [[nodiscard]] __device__ int weight(int c) const { return kWeights + kPerChannel * c; }
  [[nodiscard]] __device__ int dU(int c, int j) const { return weight(c) + 1 + j; }
  // K_0 to K_3 and their gradients, two by two.
  [[nodiscard]] __device__ float2& taps(int c, int k) const { return columns_.single(4 * c + k); }
  [[nodiscard]] __device__ float2& dtaps(int c, int k) const { return taps(c, 2 + k); }

  // What enters a segment from the right: nothing in step 1, the carry in step 3, and the gradient
  // of the final state behind the last valid token.
  __device__ void load_columns() const {
    const bool last = args_.dstate_out != nullptr && segment_.holds_last;
    for (int i = 0; i < s_.per_part; ++i) {
      const Slot slot(s_, place_, i);
      const float2 a = load_pair(args_.a, s_, slot);
      columns_.at(kMultiplier, i) = a;
      columns_.at(kGap, i) = chunk_gap(slot, a, kChunk);
      float2 carry{0.0F, 0.0F};
      if (!kEnds && args_.carries != nullptr)
        carry = load_pair(args_.carries + segment_.row * 2 * s_.plane, s_, slot);
      if (last)
        carry = carry + load_pair(args_.dstate_out + segment_.batch * 2 * s_.plane, s_, slot);
      columns_.at(kCarry, i) = carry;
      const Powers powers(a);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        columns_.at(kDPowers + j, i) = kEnds ? powers.of[j] : float2{0.0F, 0.0F};
      for (int c = 0; c < s_.channels; ++c) {
        const float2 W = load_weight(args_.W, s_, slot, c);
        columns_.at(weight(c), i) = W;
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          columns_.at(dU(c, j), i) = kEnds ? multiply(W, powers.of[j]) : float2{0.0F, 0.0F};
      }
    }
    if constexpr (!kEnds) {
      for (int c = 0; c < s_.channels; ++c) {
        const Taps K = make_taps(s_, place_, args_.a, args_.W, args_.skip, c);
        taps(c, 0) = {K.of[0], K.of[1]};
        taps(c, 1) = {K.of[2], K.of[3]};
        dtaps(c, 0) = {0.0F, 0.0F};
        dtaps(c, 1) = {0.0F, 0.0F};
      }
    }
  }
  __device__ void store_carries(float* planes) const {
    for (int i = 0; i < s_.per_part; ++i)
      store_pair(planes, s_, Slot(s_, place_, i), columns_.at(kCarry, i));
  }

  __device__ void store_gradients() const {
    for (int c = 0; c < s_.channels; ++c) sum_taps(c);
    float* const partial = args_.partial + segment_.row * (1 + s_.channels) * 2 * s_.plane;
    for (int i = 0; i < s_.per_part; ++i) {
      const Slot slot(s_, place_, i);
      const Powers a(columns_.at(kMultiplier, i));
      float2 dpowers[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) dpowers[k] = columns_.at(kDPowers + k, i);
      float2 da = fold_powers(a, dpowers);
      for (int c = 0; c < s_.channels; ++c) {
        const float2 dW = weight_gradient(i, c, a, da);
        store_pair(partial + (1 + c) * 2 * s_.plane, s_, slot, dW);
      }
      store_pair(partial, s_, slot, da);
    }
    if (args_.dstate_in != nullptr && segment_.index == 0)
      store_carries(args_.dstate_in + segment_.batch * 2 * s_.plane);
    if (args_.partial_skip == nullptr || !place_.exists || place_.part != 0) return;
    for (int c = 0; c < s_.channels; ++c)
      args_.partial_skip[(segment_.row * s_.channels + c) * s_.lanes + place_.lane] = dtaps(c, 0).x;
  }
  // The gradients of K over all threads of the lane, in every thread.
  __device__ void sum_taps(int c) const {
    for (int k = 0; k < 2; ++k) {
      const float2 own = dtaps(c, k);
      dtaps(c, k) = {sum_parts(own.x, s_.parts), sum_parts(own.y, s_.parts)};
    }
  }
  // dW of one channel; adds to da.
  __device__ float2 weight_gradient(int i, int c, const Powers& a, float2& da) const {
    const float2 low = dtaps(c, 0);
    const float2 high = dtaps(c, 1);
    const float dK[kGroup] = {low.x, low.y, high.x, high.y};
    float2 gradients[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) gradients[k] = columns_.at(dU(c, k), i);
    return fold_weight(a, columns_.at(weight(c), i), gradients, dK, da);
  }

  // Gradients of one channel; every lane of a group has the gradient of the group's output.
  __device__ void fill_gradients(std::int64_t token, int c, int steps) const {
    const bool sums = s_.groups > 1;
    const std::int64_t first = sums ? group_ : c * s_.inputs + place_.column;
    fill_tile(g_tile_, args_.dy + token * s_.outputs + first, s_.outputs, sums ? 0 : 1, steps,
              place_.columns, s_);
  }
  [[nodiscard]] __device__ float2 chunk_gap(const Slot& slot, float2 a, int steps) const {
    return power_gap(exact_multiplier(a, load_pair(args_.a_low, s_, slot)), a, Powers(a).of[3],
                     steps);
  }
  [[nodiscard]] __device__ float2 gap(int i, float2 a, int steps) const {
    if (steps == kChunk) return columns_.at(kGap, i);
    return chunk_gap(Slot(s_, place_, i), a, steps);
  }

  __device__ void ends_chunk(std::int64_t token, int steps) const {
    const float* const gradients = g_tile_ + place_.row * kPitch;
    for (int c = 0; c < s_.channels; ++c) {
      fill_gradients(token, c, steps);
      __syncthreads();
      for (int i = 0; i < s_.per_part; ++i) {
        const float2 a = columns_.at(kMultiplier, i);
        const float2 fourth = columns_.at(kDPowers + kGroup - 1, i);
        float2 U[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) U[j] = columns_.at(dU(c, j), i);
        const float2 entering = columns_.at(kCarry, i);
        // The recurrence is linear: channels add up.
        const float2 begin = c == 0 ? entering : float2{0.0F, 0.0F};
        float2 carry = steps == kChunk ? carry_back<true>(a, fourth, U, begin, gradients, steps)
                                       : carry_back<false>(a, fourth, U, begin, gradients, steps);
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
    const int first = first_token(place_.part, s_.parts);
    float dv[kChunk] = {};
    float own[kOwn] = {};  // tokens first + j: what the lane adds, not its sub-states
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
      walk_taps(c, first, own);
      __syncthreads();
    }
    reduce_parts(dv, place_.part, s_.parts);
    const int at = place_.row * kPitch + first;
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (j < kChunk / s_.parts) v_tile_[at + j] = dv[j] + own[j];
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
    const Powers a(columns_.at(kMultiplier, i));
    const float2 W = columns_.at(weight(c), i);
    float2 U[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) U[j] = multiply(W, a.of[j]);
    Adjoint adjoint{c == 0 ? entering : float2{0.0F, 0.0F}};
    if (steps == kChunk)
      walk_back<true>(adjoint, a, U, x, tokens, gradients, steps, dv);
    else
      walk_back<false>(adjoint, a, U, x, tokens, gradients, steps, dv);
    if (c == 0)
      adjoint.carry = multiply_conj_add(entering, gap(i, a.of[0], steps), adjoint.carry);
    else
      adjoint.carry = adjoint.carry + entering;
    columns_.at(kCarry, i) = adjoint.carry;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      columns_.at(kDPowers + j, i) = columns_.at(kDPowers + j, i) + adjoint.dpowers[j];
      columns_.at(dU(c, j), i) = columns_.at(dU(c, j), i) + adjoint.dU[j];
    }
  }

  // What tokens of one group do to each other, for the tokens that reduce_parts leaves here.
  __device__ __forceinline__ void walk_taps(int c, int first, float (&own)[kOwn]) const {
    const float* const tokens = v_tile_ + place_.row * kPitch;
    const float* const gradients = g_tile_ + place_.row * kPitch;
    const float2 low = taps(c, 0);
    const float2 high = taps(c, 1);
    const float K[kGroup] = {low.x, low.y, high.x, high.y};
    float dK[kGroup] = {};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (j >= kChunk / s_.parts) continue;
      const int t = first + j;
      const float g = gradients[t];
#pragma unroll
      for (int d = 0; d < kGroup; ++d) {
        if (t % kGroup + d < kGroup) own[j] = fmaf(K[d], gradients[t + d], own[j]);
        if (d <= t % kGroup) dK[d] = fmaf(g, tokens[t - d], dK[d]);
      }
    }
    dtaps(c, 0) = dtaps(c, 0) + float2{dK[0], dK[1]};
    dtaps(c, 1) = dtaps(c, 1) + float2{dK[2], dK[3]};
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
__global__ __launch_bounds__(kThreads, 3) void lane_scan_backward_kernel(BackwardArgs<T> args) {
  extern __shared__ __align__(16) float memory[];
  const Sizes& s = args.sizes;
  const Segment segment(s, args.lengths, blockIdx.x / s.tiles);
  if (kEnds && segment.index == 0) return;  // nothing precedes it
  for (std::int64_t group = 0; group < s.groups; ++group)
    WalkBack<T, kEnds>(args, segment, group, blockIdx.x % s.tiles, memory).run();
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
void launch(Context& ctx, const BackwardArgs<T>& args, std::size_t shared) {
  const auto blocks = static_cast<unsigned>(args.sizes.rows() * args.sizes.tiles);
  allow_shared(lane_scan_backward_kernel<T, kEnds>, shared);
  lane_scan_backward_kernel<T, kEnds><<<blocks, kThreads, shared, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

// Steps 1 and 2.
template <class T, class LaunchEnds>
void make_carries(Context& ctx, BackwardArgs<T>& args, Tensor& carries, LaunchEnds&& launch_ends) {
  const Sizes& s = args.sizes;
  if (s.segments == 1) return;
  Tensor ends = ctx.empty(s.segment_states(), DType::float32);
  carries = ctx.empty(s.segment_states(), DType::float32);
  args.ends = ends.view().data<float>();
  launch_ends();
  launch_carry(ctx,
               {s, true, args.a, args.a_low, args.ends, nullptr, carries.view().data<float>()});
  args.carries = carries.view().data<float>();
}

template <class T>
void backward_in_registers(Context& ctx, BackwardArgs<T> args) {
  const auto blocks = static_cast<unsigned>(args.sizes.rows() * args.sizes.tiles);
  const cudaStream_t stream = ctx.stream().handle;
  visit_parts<kMinAdjointParts>(args.sizes.parts, [&]<int kParts>() {
    Tensor carries;
    make_carries(ctx, args, carries, [&] {
      lane_carry_back_kernel<T, kParts><<<blocks, kThreads, 0, stream>>>(args);
      LRNN_CUDA_CHECK_LAUNCH();
    });
    constexpr std::size_t kShared = OwnWalkBack<T, kParts>::kShared;
    allow_shared(lane_walk_back_kernel<T, kParts>, kShared);
    lane_walk_back_kernel<T, kParts><<<blocks, kThreads, kShared, stream>>>(args);
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

template <class T>
void backward(Context& ctx, BackwardArgs<T> args) {
  const Sizes& s = args.sizes;
  if (s.in_registers) return backward_in_registers(ctx, args);
  args.values = column_values(s);
  std::size_t shared =
      2 * s.tile_bytes() + static_cast<std::size_t>(args.values * kThreads) * sizeof(float2);
  Tensor columns, sums, carries;
  if (shared > kSharedLimit) {
    shared = 2 * s.tile_bytes();
    columns = ctx.empty(Shape{s.rows() * s.tiles, args.values, kThreads, 2}, DType::float32);
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
  make_carries(ctx, args, carries, [&] { launch<T, true>(ctx, args, shared); });
  launch<T, false>(ctx, args, shared);
}

}  // namespace
}  // namespace lane

void lane_scan_backward(Context& ctx, const LaneScanBackward& a) {
  using namespace lane;  // NOLINT(google-build-using-namespace)
  const Sizes s(detail::LaneScanSizes(a.a, a.W, a.v), kMinAdjointParts, false);
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
         data_or_null<float>(partial_skip.view()), nullptr, nullptr, nullptr, 0});
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
