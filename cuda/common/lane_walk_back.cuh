/// Backward of lane_scan in the case of common/lane_walk.cuh: steps 1 and 3 of
/// lane_scan_backward.cu. A thread walks its kPerPart sub-states one after another, because the
/// states of a chunk fill the registers; what it keeps of each lies in shared memory, where every
/// thread reads and writes values of its own.
#pragma once

#include "common/lane_adjoint.cuh"
#include "common/lane_walk.cuh"

namespace lrnn::cuda::lane {

// What enters a segment from the right, and the gap of a chunk or of its first `steps` tokens.
template <class T, int kParts>
class SegmentEdge {
 public:
  __device__ SegmentEdge(const BackwardArgs<T>& args, const Segment& segment, const Place& place)
      : args_(args), segment_(segment), own_(args.sizes, place) {}

  [[nodiscard]] __device__ __forceinline__ const OwnSubstates<kParts>& own() const { return own_; }
  [[nodiscard]] __device__ __forceinline__ float2 multiplier(int i) const {
    return own_.load(args_.a, i);
  }
  [[nodiscard]] __device__ __forceinline__ float2 weight(int i) const {
    return own_.load_weight(args_.W, args_.sizes.real_weight, i);
  }
  [[nodiscard]] __device__ __forceinline__ float2 carry(int i) const {
    const std::int64_t planes = 2 * args_.sizes.plane;
    float2 carry{0.0F, 0.0F};
    if (args_.carries != nullptr) carry = own_.load(args_.carries + segment_.row * planes, i);
    if (args_.dstate_out != nullptr && segment_.holds_last)
      carry = carry + own_.load(args_.dstate_out + segment_.batch * planes, i);
    return carry;
  }
  [[nodiscard]] __device__ __forceinline__ float2 gap(int i, float2 a, int steps) const {
    return power_gap(exact_multiplier(a, own_.load(args_.a_low, i)), a, Powers(a).of[3], steps);
  }
  __device__ __forceinline__ std::int64_t first_token(std::int64_t chunk) const {
    return (segment_.batch * args_.sizes.seqlen + chunk * kChunk) * args_.sizes.inputs;
  }

 private:
  const BackwardArgs<T>& args_;
  const Segment& segment_;
  OwnSubstates<kParts> own_;
};

// Step 1, with everything in registers: what leaves a segment to the left when nothing but the
// gradient of the final state enters it. `args.carries` is null.
template <class T, int kParts>
class OwnCarry {
 public:
  static constexpr int kTile = kThreads / kParts * kPitch;
  using Mover = TileMover<T, kParts>;

  __device__ OwnCarry(const BackwardArgs<T>& args, const Segment& segment, std::int64_t tile)
      : args_(args),
        segment_(segment),
        place_(args.sizes, 0, tile),
        edge_(args, segment, place_),
        mover_(args.sizes, place_) {}

  __device__ __forceinline__ void run(float (&tiles)[2][kTile]) {
    load_states();
    const int row = place_.row * kPitch;
    int side = 0;
    std::int64_t chunk = segment_.valid_end() - 1;
    typename Mover::Values next;
    if (chunk >= segment_.first_chunk) load_gradients(chunk, next, tiles[side]);
    __syncthreads();
    if (chunk >= segment_.first_chunk && segment_.steps(chunk) < kChunk) {
      walk_short(tiles[side] + row, segment_.steps(chunk));
      side ^= 1;
      --chunk;
      if (chunk >= segment_.first_chunk) load_gradients(chunk, next, tiles[side]);
      __syncthreads();
    }
    for (; chunk >= segment_.first_chunk; --chunk) {
      const bool more = chunk > segment_.first_chunk;
      if (more) mover_.load(args_.dy + edge_.first_token(chunk - 1), kChunk, next);
      walk_chunk(tiles[side] + row);
      side ^= 1;
      if (more) mover_.put(next, tiles[side]);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPerPart; ++i)
      edge_.own().store(args_.ends + segment_.row * 2 * args_.sizes.plane, i, states_[i].carry);
  }

 private:
  struct State {
    float2 a;
    float2 fourth;
    float2 U[kGroup];
    float2 gap;
    float2 carry;
  };

  __device__ __forceinline__ void load_states() {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      State& state = states_[i];
      state.a = edge_.multiplier(i);
      state.gap = edge_.gap(i, state.a, kChunk);
      state.carry = edge_.carry(i);
      const Powers powers(state.a);
      state.fourth = powers.of[kGroup - 1];
      const float2 W = edge_.weight(i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) state.U[j] = multiply(W, powers.of[j]);
    }
  }
  __device__ __forceinline__ void load_gradients(std::int64_t chunk, typename Mover::Values& values,
                                                 float* tile) const {
    mover_.load(args_.dy + edge_.first_token(chunk), segment_.steps(chunk), values);
    mover_.put(values, tile);
  }

  __device__ __forceinline__ void walk_chunk(const float* gradients) {
    float2 entering[kPerPart];
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) entering[i] = states_[i].carry;
#pragma unroll
    for (int t = kChunk - kGroup; t >= 0; t -= kGroup) {
      const float4 g = *reinterpret_cast<const float4*>(gradients + t);
#pragma unroll
      for (int i = 0; i < kPerPart; ++i) {
        State& state = states_[i];
        state.carry = multiply_conj_add(state.carry, state.fourth, pull_back(state.U, g));
      }
    }
#pragma unroll
    for (int i = 0; i < kPerPart; ++i)
      states_[i].carry = multiply_conj_add(entering[i], states_[i].gap, states_[i].carry);
  }

  // The last tokens of a sequence, fewer than a chunk.
  __device__ __forceinline__ void walk_short(const float* gradients, int steps) {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      State& state = states_[i];
      float2 carry = state.carry;
#pragma unroll 1
      for (int t = (steps - 1) / kGroup * kGroup; t >= 0; t -= kGroup) {
        const float2 pulled = pull_back(state.U, *reinterpret_cast<const float4*>(gradients + t));
        if (t + kGroup <= steps) {
          carry = multiply_conj_add(carry, state.fourth, pulled);
        } else {
          for (int j = t; j < steps; ++j) carry = retreat(state.a, carry);
          carry = carry + pulled;
        }
      }
      state.carry = multiply_conj_add(state.carry, edge_.gap(i, state.a, steps), carry);
    }
  }

  const BackwardArgs<T>& args_;
  const Segment& segment_;
  Place place_;
  SegmentEdge<T, kParts> edge_;
  Mover mover_;
  State states_[kPerPart];
};

// Step 3. Tokens and gradients of the next chunk are on their way while one is walked.
template <class T, int kParts>
class OwnWalkBack {
 public:
  static constexpr int kTile = kThreads / kParts * kPitch;
  using Mover = TileMover<T, kParts>;
  static constexpr int kOwn = Mover::kOwn;

  // What a thread keeps of a sub-state: a and W; the gap of a chunk and the adjoint; the gradients
  // of a to a^4; those of U_0 to U_3.
  enum Column { kConstants, kAdjoint, kDPowers, kDU = kDPowers + 2, kColumns = kDU + 2 };
  static constexpr std::size_t kShared =
      3 * kTile * sizeof(float) + kPerPart * kColumns * kThreads * sizeof(float4);

  __device__ OwnWalkBack(const BackwardArgs<T>& args, const Segment& segment, std::int64_t tile,
                         float* memory)
      : args_(args),
        s_(args.sizes),
        segment_(segment),
        place_(args.sizes, 0, tile),
        edge_(args, segment, place_),
        mover_(args.sizes, place_),
        v_tile_(memory),
        g_tile_(memory + kTile),
        dv_tile_(memory + 2 * kTile),
        columns_(reinterpret_cast<float4*>(memory + 3 * kTile) + threadIdx.x) {}

  __device__ __forceinline__ void run() {
    load_columns();
    const std::int64_t end = segment_.valid_end();
    for (std::int64_t chunk = end; chunk < segment_.last_chunk; ++chunk)
      mover_.store(dv_tile_, args_.dv + edge_.first_token(chunk), 0, chunk_size(s_, chunk));
    float2 next{0.0F, 0.0F};
    if (segment_.first_chunk < end) {
      typename Mover::Values v, g;
      load_tokens(end - 1, v, g);
      mover_.put(v, v_tile_);
      mover_.put(g, g_tile_);
      next = edge_.own().load(states_before(end - 1), 0);
    }
    __syncthreads();
    for (std::int64_t chunk = end - 1; chunk >= segment_.first_chunk; --chunk)
      walk_chunk(chunk, next);
    store_gradients();
  }

 private:
  [[nodiscard]] __device__ __forceinline__ float4& column(int field, int i) const {
    return columns_[(i * kColumns + field) * kThreads];
  }
  [[nodiscard]] __device__ __forceinline__ const float* states_before(std::int64_t chunk) const {
    return args_.chunk_states + (segment_.batch * s_.chunks + chunk) * 2 * s_.plane;
  }
  __device__ __forceinline__ void load_tokens(std::int64_t chunk, typename Mover::Values& v,
                                              typename Mover::Values& g) const {
    const int steps = segment_.steps(chunk);
    mover_.load(args_.v + edge_.first_token(chunk), steps, v);
    mover_.load(args_.dy + edge_.first_token(chunk), steps, g);
  }

  __device__ __forceinline__ void load_columns() {
#pragma unroll 1
    for (int i = 0; i < kPerPart; ++i) {
      const float2 a = edge_.multiplier(i);
      const float2 W = edge_.weight(i);
      const float2 gap = edge_.gap(i, a, kChunk);
      const float2 carry = edge_.carry(i);
      column(kConstants, i) = {a.x, a.y, W.x, W.y};
      column(kAdjoint, i) = {gap.x, gap.y, carry.x, carry.y};
#pragma unroll
      for (int k = kDPowers; k < kColumns; ++k) column(k, i) = {0.0F, 0.0F, 0.0F, 0.0F};
    }
    taps_ = make_taps(s_, place_, args_.a, args_.W, args_.skip, 0);
  }

  // `next` is the state of the first sub-state before the chunk, then before the one to its left.
  __device__ __forceinline__ void walk_chunk(std::int64_t chunk, float2& next) {
    const int steps = segment_.steps(chunk);
    const bool more = chunk > segment_.first_chunk;
    typename Mover::Values v, g;
    if (more) load_tokens(chunk - 1, v, g);
    float dv[kChunk] = {};
    if (steps == kChunk)
      walk_substates<true>(chunk, more, steps, dv, next);
    else
      walk_substates<false>(chunk, more, steps, dv, next);
    const int first = first_token(place_.part, kParts);
    float own[kOwn] = {};  // tokens first + j: what the lane adds, not its sub-states
    walk_taps(first, own);
    reduce_parts(dv, place_.part, kParts);
    const int at = place_.row * kPitch + first;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) dv_tile_[at + j] = dv[j] + own[j];
    __syncthreads();
    if (more) {
      mover_.put(v, v_tile_);
      mover_.put(g, g_tile_);
    }
    mover_.store(dv_tile_, args_.dv + edge_.first_token(chunk), steps, chunk_size(s_, chunk));
    __syncthreads();
  }

  template <bool kFull>
  __device__ __forceinline__ void walk_substates(std::int64_t chunk, bool more, int steps,
                                                 float (&dv)[kChunk], float2& next) const {
    const float* const states = states_before(chunk);
#pragma unroll 1
    for (int i = 0; i < kPerPart; ++i) {
      const float2 before = next;
      if (i + 1 < kPerPart)
        next = edge_.own().load(states, i + 1);
      else if (more)
        next = edge_.own().load(states - 2 * s_.plane, 0);
      walk_substate<kFull>(i, before, steps, dv);
    }
  }

  template <bool kFull>
  __device__ __forceinline__ void walk_substate(int i, float2 x, int steps,
                                                float (&dv)[kChunk]) const {
    const int row = place_.row * kPitch;
    const float4 constants = column(kConstants, i);
    const float4 edge = column(kAdjoint, i);
    const Powers a(float2{constants.x, constants.y});
    float2 U[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) U[j] = multiply({constants.z, constants.w}, a.of[j]);
    const float2 entering{edge.z, edge.w};
    Adjoint adjoint{entering};
    walk_back<kFull>(adjoint, a, U, x, v_tile_ + row, g_tile_ + row, steps, dv);
    const float2 gap = kFull ? float2{edge.x, edge.y} : edge_.gap(i, a.of[0], steps);
    const float2 carry = multiply_conj_add(entering, gap, adjoint.carry);
    column(kAdjoint, i) = {edge.x, edge.y, carry.x, carry.y};
#pragma unroll
    for (int k = 0; k < kGroup; k += 2) {
      add_pairs(column(kDPowers + k / 2, i), adjoint.dpowers[k], adjoint.dpowers[k + 1]);
      add_pairs(column(kDU + k / 2, i), adjoint.dU[k], adjoint.dU[k + 1]);
    }
  }
  static __device__ __forceinline__ void add_pairs(float4& sum, float2 low, float2 high) {
    sum = {sum.x + low.x, sum.y + low.y, sum.z + high.x, sum.w + high.y};
  }

  // What tokens of one group do to each other, for the tokens that reduce_parts leaves here.
  __device__ __forceinline__ void walk_taps(int first, float (&own)[kOwn]) {
    const float* const tokens = v_tile_ + place_.row * kPitch + first;
    const float* const gradients = g_tile_ + place_.row * kPitch + first;
    float dK[kGroup] = {};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int in_group = kOwn >= kGroup ? j % kGroup : (first + j) % kGroup;
      const float g = gradients[j];
#pragma unroll
      for (int d = 0; d < kGroup; ++d) {
        if (in_group + d < kGroup) own[j] = fmaf(taps_.of[d], gradients[j + d], own[j]);
        if (d <= in_group) dK[d] = fmaf(g, tokens[j - d], dK[d]);
      }
    }
#pragma unroll
    for (int d = 0; d < kGroup; ++d) dtaps_.of[d] += dK[d];
  }

  __device__ __forceinline__ void store_gradients() {
    const OwnSubstates<kParts>& own = edge_.own();
#pragma unroll
    for (int d = 0; d < kGroup; ++d) dtaps_.of[d] = sum_parts(dtaps_.of[d], kParts);
    float* const partial = args_.partial + segment_.row * 4 * s_.plane;
#pragma unroll 1
    for (int i = 0; i < kPerPart; ++i) {
      const float4 constants = column(kConstants, i);
      const Powers a(float2{constants.x, constants.y});
      float2 dpowers[kGroup];
      float2 dU[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; k += 2) {
        split(column(kDPowers + k / 2, i), dpowers[k], dpowers[k + 1]);
        split(column(kDU + k / 2, i), dU[k], dU[k + 1]);
      }
      float2 da = fold_powers(a, dpowers);
      const float2 dW = fold_weight(a, {constants.z, constants.w}, dU, dtaps_.of, da);
      own.store(partial, i, da);
      own.store(partial + 2 * s_.plane, i, dW);
      if (args_.dstate_in != nullptr && segment_.index == 0) {
        const float4 edge = column(kAdjoint, i);
        own.store(args_.dstate_in + segment_.batch * 2 * s_.plane, i, {edge.z, edge.w});
      }
    }
    if (args_.partial_skip != nullptr && place_.exists && place_.part == 0)
      args_.partial_skip[segment_.row * s_.lanes + place_.lane] = dtaps_.of[0];
  }
  static __device__ __forceinline__ void split(float4 pair, float2& low, float2& high) {
    low = {pair.x, pair.y};
    high = {pair.z, pair.w};
  }

  const BackwardArgs<T>& args_;
  const Sizes& s_;
  const Segment& segment_;
  Place place_;
  SegmentEdge<T, kParts> edge_;
  Mover mover_;
  float* v_tile_;
  float* g_tile_;
  float* dv_tile_;
  float4* columns_;
  Taps taps_;
  Taps dtaps_{};
};

template <class T, int kParts>
__global__ __launch_bounds__(kThreads, 3) void lane_carry_back_kernel(BackwardArgs<T> args) {
  using Carry = OwnCarry<T, kParts>;
  __shared__ __align__(16) float tiles[2][Carry::kTile];
  const Segment segment(args.sizes, args.lengths, blockIdx.x / args.sizes.tiles);
  if (segment.index == 0) return;  // nothing precedes it
  Carry(args, segment, blockIdx.x % args.sizes.tiles).run(tiles);
}

template <class T, int kParts>
__global__ __launch_bounds__(kThreads, 3) void lane_walk_back_kernel(BackwardArgs<T> args) {
  extern __shared__ __align__(16) float memory[];
  const Segment segment(args.sizes, args.lengths, blockIdx.x / args.sizes.tiles);
  OwnWalkBack<T, kParts>(args, segment, blockIdx.x % args.sizes.tiles, memory).run();
}

}  // namespace lrnn::cuda::lane
