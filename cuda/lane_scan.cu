// Forward, the carries of both passes, and one token. Steps and ownership: common/lane_scan.cuh.
//
// Bound by issue slots: per sub-state and group of four tokens ten FMA of the recurrence, eight of
// the read-out and, unless a thread walks all its sub-states at once, one wide read of the tokens.
// Step 1 repeats the recurrence.
#include "lrnn/ops/lane_scan.hpp"

#include "common/check.cuh"
#include "common/lane_scan.cuh"
#include "common/lane_walk.cuh"
#include "common/launch.cuh"

namespace lrnn::cuda {
namespace lane {
namespace {

constexpr int kMinParts = 2;  // at most 64 lanes in a block

enum Field { kPowers, kGap = kPowers + kGroup, kState, kReadOut };  // then U_0 to U_3 by channel

template <class T>
struct ForwardArgs {
  Sizes sizes;
  const float* a;
  const float* a_low;
  const float* W;
  const float* skip;
  const T* v;
  const std::int32_t* lengths;
  const float* starts;  // [B S, 2, N, M]; state_in if there is one segment; null: 0
  T* y;
  float* sums;  // outputs of several tiles, float32 [B, L, G]: y itself if it is float32
  float* state_out;
  float* chunk_states;
  float* ends;          // step 1
  float2* columns;      // null: in shared memory
  std::int64_t values;  // column_values
};

// Values that a thread keeps in its columns: fields of every sub-state, then K_0 to K_3 by channel.
__host__ __device__ constexpr int field_count(std::int64_t channels) {
  return kReadOut + kGroup * static_cast<int>(channels);
}
std::int64_t column_values(const Sizes& s) {
  return static_cast<std::int64_t>(field_count(s.channels)) * s.per_part + 2 * s.channels;
}

// One sub-state through a chunk. Tokens from `steps` on leave the state as it is.
template <bool kFull, bool kRead>
__device__ __forceinline__ float2 walk(const Powers& a, const float2 (&U)[kGroup], float2 x,
                                       const float* tokens, int steps, float (&w)[kChunk]) {
#pragma unroll
  for (int t = 0; t < kChunk; t += kGroup) {
    if (!kFull && t >= steps) continue;
    const float4 v = *reinterpret_cast<const float4*>(tokens + t);
    if constexpr (kRead) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) w[t + j] = real_part(U[j], x, w[t + j]);
    }
    if (kFull || t + kGroup <= steps) {
      x = advance_group(a, x, v);
    } else {
      x = advance(a.of[0], x, v.x);
      if (t + 1 < steps) x = advance(a.of[0], x, v.y);
      if (t + 2 < steps) x = advance(a.of[0], x, v.z);
    }
  }
  return x;
}

// The walk of one block through one tile of lanes.
template <class T, bool kEnds>
class Walk {
 public:
  __device__ Walk(const ForwardArgs<T>& args, const Segment& segment, std::int64_t group,
                  std::int64_t tile, float* memory)
      : args_(args),
        s_(args.sizes),
        segment_(segment),
        group_(group),
        tile_(tile),
        place_(args.sizes, group, tile),
        v_tile_(memory),
        y_tile_(memory + args.sizes.tile * kPitch),
        columns_{args.columns, args.sizes.per_part, field_count(args.sizes.channels)} {
    if (args.columns == nullptr)
      columns_.base = reinterpret_cast<float2*>(memory + 2 * args.sizes.tile * kPitch);
    else
      columns_.base += static_cast<std::int64_t>(blockIdx.x) * kThreads * args.values;
  }

  __device__ void run() {
    load_columns();
    for (std::int64_t chunk = segment_.first_chunk; chunk < segment_.last_chunk; ++chunk) {
      const int steps = segment_.steps(chunk);
      if (kEnds && steps == 0) break;
      if (!kEnds && args_.chunk_states != nullptr)
        store_states(args_.chunk_states + (segment_.batch * s_.chunks + chunk) * 2 * s_.plane);
      const std::int64_t token = segment_.batch * s_.seqlen + chunk * kChunk;
      fill_tile(v_tile_, args_.v + token * s_.inputs + place_.column, s_.inputs, 1, steps,
                place_.columns, s_);
      __syncthreads();
      walk_chunk(chunk, token, steps);
    }
    if constexpr (kEnds)
      store_states(args_.ends + segment_.row * 2 * s_.plane);
    else if (args_.state_out != nullptr && segment_.holds_last)
      store_states(args_.state_out + segment_.batch * 2 * s_.plane);
  }

 private:
  __device__ void load_columns() const {
    const float* const starts =
        kEnds || args_.starts == nullptr ? nullptr : args_.starts + segment_.row * 2 * s_.plane;
    for (int i = 0; i < s_.per_part; ++i) {
      const Slot slot(s_, place_, i);
      const Pair exact =
          exact_multiplier(load_pair(args_.a, s_, slot), load_pair(args_.a_low, s_, slot));
      const Powers a(exact);
      columns_.at(kGap, i) = power_gap(exact, a.of[0], a.of[3], kChunk);
      columns_.at(kState, i) = load_pair(starts, s_, slot);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) columns_.at(kPowers + j, i) = a.of[j];
      if constexpr (!kEnds) {
        for (int c = 0; c < s_.channels; ++c) {
          const float2 W = load_weight(args_.W, s_, slot, c);
#pragma unroll
          for (int j = 0; j < kGroup; ++j)
            columns_.at(kReadOut + kGroup * c + j, i) = multiply(W, a.of[j]);
        }
      }
    }
    if constexpr (!kEnds) {
      for (int c = 0; c < s_.channels; ++c) {
        const Taps taps = make_taps(s_, place_, args_.a, args_.W, args_.skip, c);
        columns_.single(2 * c) = {taps.of[0], taps.of[1]};
        columns_.single(2 * c + 1) = {taps.of[2], taps.of[3]};
      }
    }
  }
  __device__ void store_states(float* planes) const {
    for (int i = 0; i < s_.per_part; ++i)
      store_pair(planes, s_, Slot(s_, place_, i), columns_.at(kState, i));
  }

  // The barrier behind the walk of the last channel also frees the tile of tokens.
  __device__ __forceinline__ void walk_chunk(std::int64_t chunk, std::int64_t token,
                                             int steps) const {
    const int channels = kEnds ? 1 : static_cast<int>(s_.channels);
    for (int c = 0; c < channels; ++c) {
      float w[kChunk] = {};
      for (int i = 0; i < s_.per_part && steps > 0; ++i) walk_substate(i, c, channels, steps, w);
      if constexpr (kEnds) {
        __syncthreads();
      } else {
        if (c > 0) __syncthreads();  // behind the output of the channel before
        const int size =
            static_cast<int>(min(s_.seqlen - chunk * kChunk, static_cast<std::int64_t>(kChunk)));
        if (s_.groups > 1)
          write_sum(w, c, token, steps, size);
        else
          write_lanes(w, c, token, steps, size);
      }
    }
  }

  // A state moves on with the last channel.
  __device__ __forceinline__ void walk_substate(int i, int c, int channels, int steps,
                                                float (&w)[kChunk]) const {
    const float* const tokens = v_tile_ + place_.row * kPitch;
    const float2 before = columns_.at(kState, i);
    float2 gap = columns_.at(kGap, i);
    Powers a;
    float2 U[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      a.of[j] = columns_.at(kPowers + j, i);
      if constexpr (!kEnds) U[j] = columns_.at(kReadOut + kGroup * c + j, i);
    }
    float2 x;
    if (steps == kChunk) {
      x = walk<true, !kEnds>(a, U, before, tokens, steps, w);
    } else {
      x = walk<false, !kEnds>(a, U, before, tokens, steps, w);
      const Slot slot(s_, place_, i);
      gap = power_gap(
          exact_multiplier(load_pair(args_.a, s_, slot), load_pair(args_.a_low, s_, slot)), a.of[0],
          a.of[3], steps);
    }
    if (c + 1 == channels) columns_.at(kState, i) = x + multiply(gap, before);
  }

  // Sums w over the threads of a lane and adds what the tokens of a group add to each other.
  // Returns the first of the 32 / parts tokens that the thread is left with.
  __device__ __forceinline__ int finish_lanes(float (&w)[kChunk], int c) const {
    reduce_parts(w, place_.part, s_.parts);
    const int first = first_token(place_.part, s_.parts);
    const float* const tokens = v_tile_ + place_.row * kPitch;
    const float2 low = columns_.single(2 * c);
    const float2 high = columns_.single(2 * c + 1);
    const float K[kGroup] = {low.x, low.y, high.x, high.y};
    const int count = kChunk / s_.parts;
#pragma unroll
    for (int j = 0; j < kChunk / kMinParts; ++j) {
      if (j >= count) continue;
      const int t = first + j;
#pragma unroll
      for (int d = 0; d < kGroup; ++d)
        if (d <= t % kGroup) w[j] = fmaf(K[d], tokens[t - d], w[j]);
    }
    return first;
  }

  // Outputs of their own, through shared memory into whole rows.
  __device__ __forceinline__ void write_lanes(float (&w)[kChunk], int c, std::int64_t token,
                                              int steps, int size) const {
    const int at = place_.row * kPitch + finish_lanes(w, c);
    const int count = kChunk / s_.parts;
#pragma unroll
    for (int j = 0; j < kChunk / kMinParts; ++j)
      if (j < count) y_tile_[at + j] = w[j];
    __syncthreads();
    T* const y = args_.y + token * s_.outputs + c * s_.inputs + place_.column;
    for (int i = static_cast<int>(threadIdx.x); i < size << s_.tile_log2; i += kThreads) {
      const int t = i >> s_.tile_log2;
      const int lane = i & (s_.tile - 1);
      if (lane < place_.columns)
        y[t * s_.outputs + lane] = from_float<T>(t < steps ? y_tile_[lane * kPitch + t] : 0.0F);
    }
  }

  // The sum over the lanes of the block, added to what the tiles before left.
  __device__ __forceinline__ void write_sum(float (&w)[kChunk], int c, std::int64_t token,
                                            int steps, int size) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    finish_lanes(w, c);
    reduce_warp(w, lane, s_.parts);
    y_tile_[warp * 32 + first_token(lane, 32)] = w[0];
    __syncthreads();
    const int t = static_cast<int>(threadIdx.x);
    if (t >= size) return;
    float sum = 0.0F;
    if (t < steps)
      for (int i = 0; i < kWarps; ++i) sum += y_tile_[i * 32 + t];
    const std::int64_t at = (token + t) * s_.outputs + group_;
    if (tile_ > 0) sum += args_.sums[at];
    if (tile_ + 1 < s_.tiles)
      args_.sums[at] = sum;
    else
      args_.y[at] = from_float<T>(sum);
  }

  const ForwardArgs<T>& args_;
  const Sizes& s_;
  const Segment& segment_;
  std::int64_t group_;
  std::int64_t tile_;
  Place place_;
  float* v_tile_;
  float* y_tile_;
  Columns columns_;
};

// kEnds: step 1, which writes nothing but the ends of segments. Else step 3. One block per segment
// and tile; where outputs sum over lanes, per segment and group in step 3.
template <class T, bool kEnds>
__global__ __launch_bounds__(kThreads) void lane_scan_forward_kernel(ForwardArgs<T> args) {
  extern __shared__ __align__(16) float memory[];
  const Sizes& s = args.sizes;
  const std::int64_t per_segment = s.groups > 1 ? s.groups : s.tiles;
  const Segment segment(s, args.lengths, blockIdx.x / per_segment);
  if (kEnds && segment.index == s.segments - 1) return;  // nothing follows it
  const std::int64_t index = blockIdx.x % per_segment;
  if (s.groups == 1) {
    Walk<T, kEnds>(args, segment, 0, index, memory).run();
  } else {
    for (std::int64_t tile = 0; tile < s.tiles; ++tile)
      Walk<T, kEnds>(args, segment, index, tile, memory).run();
  }
}

template <class T, bool kEnds>
void launch(Context& ctx, const ForwardArgs<T>& args, std::int64_t blocks, std::size_t shared) {
  allow_shared(lane_scan_forward_kernel<T, kEnds>, shared);
  lane_scan_forward_kernel<T, kEnds>
      <<<static_cast<unsigned>(blocks), kThreads, shared, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

// One sub-state of a thread that keeps it in registers.
struct OwnState {
  Powers a;
  float2 U[kGroup];
  float2 x;
};

// Behind the last tokens of a sequence, fewer than a chunk.
__device__ __forceinline__ float2 walk_short(const OwnState& state, Pair exact, float2 x,
                                             const float* tokens, int steps) {
  const float2 before = x;
  int t = 0;
#pragma unroll 1
  for (; t + kGroup <= steps; t += kGroup)
    x = advance_group(state.a, x, *reinterpret_cast<const float4*>(tokens + t));
#pragma unroll 1
  for (; t < steps; ++t) x = advance(state.a.of[0], x, tokens[t]);
  return x + multiply(power_gap(exact, state.a.of[0], state.a.of[3], steps), before);
}

// The walk of one block with everything in registers: common/lane_walk.cuh. Two tiles of each kind
// alternate, so that a chunk needs one barrier.
template <class T, int kParts, bool kEnds>
class OwnWalk {
 public:
  static constexpr int kTile = kThreads / kParts * kPitch;
  using Mover = TileMover<T, kParts>;

  __device__ OwnWalk(const ForwardArgs<T>& args, const Segment& segment, std::int64_t tile,
                     float2* gaps)
      : args_(args),
        s_(args.sizes),
        segment_(segment),
        place_(args.sizes, 0, tile),
        own_(args.sizes, place_),
        mover_(args.sizes, place_),
        gaps_(gaps + threadIdx.x) {}

  __device__ __forceinline__ void run(float (&v_tiles)[2][kTile], float* y_tiles) {
    load_states();
    const std::int64_t end = segment_.valid_end();
    const int row = place_.row * kPitch;
    int side = 0;
    typename Mover::Values next;
    if (segment_.first_chunk < end) {
      load_tokens(segment_.first_chunk, next);
      mover_.put(next, v_tiles[0]);
    }
    __syncthreads();
    for (std::int64_t chunk = segment_.first_chunk; chunk < end; ++chunk) {
      const int steps = segment_.steps(chunk);
      const bool more = chunk + 1 < end;
      if (more) load_tokens(chunk + 1, next);
      if constexpr (!kEnds) keep_states(chunk);
      float* const y_tile = y_tiles + side * kTile;
      walk_chunk(v_tiles[side] + row, steps, y_tile + row);
      if (more) {
        side ^= 1;
        mover_.put(next, v_tiles[side]);
      }
      __syncthreads();
      if constexpr (!kEnds) mover_.store(y_tile, outputs_of(chunk), steps, chunk_size(s_, chunk));
    }
    if (segment_.first_chunk < end && segment_.steps(end - 1) < kChunk)
      walk_last(v_tiles[side] + row, segment_.steps(end - 1));
    if constexpr (kEnds) {
      store_states(args_.ends + segment_.row * 2 * s_.plane);
    } else {
      for (std::int64_t chunk = end; chunk < segment_.last_chunk; ++chunk) {
        keep_states(chunk);
        mover_.store(y_tiles, outputs_of(chunk), 0, chunk_size(s_, chunk));
      }
      if (args_.state_out != nullptr && segment_.holds_last)
        store_states(args_.state_out + segment_.batch * 2 * s_.plane);
    }
  }

 private:
  [[nodiscard]] __device__ __forceinline__ std::int64_t first_token_of(std::int64_t chunk) const {
    return segment_.batch * s_.seqlen + chunk * kChunk;
  }
  __device__ __forceinline__ void load_tokens(std::int64_t chunk,
                                              typename Mover::Values& values) const {
    mover_.load(args_.v + first_token_of(chunk) * s_.inputs, segment_.steps(chunk), values);
  }
  [[nodiscard]] __device__ __forceinline__ T* outputs_of(std::int64_t chunk) const {
    return args_.y + first_token_of(chunk) * s_.inputs;
  }
  [[nodiscard]] __device__ __forceinline__ float2& gap(int i) const { return gaps_[i * kThreads]; }
  [[nodiscard]] __device__ __forceinline__ Pair exact(int i) const {
    return exact_multiplier(own_.load(args_.a, i), own_.load(args_.a_low, i));
  }

  __device__ __forceinline__ void load_states() {
    const float* const starts =
        kEnds || args_.starts == nullptr ? nullptr : args_.starts + segment_.row * 2 * s_.plane;
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      OwnState& state = states_[i];
      const Pair a = exact(i);
      state.a = Powers(a);
      gap(i) = power_gap(a, state.a.of[0], state.a.of[3], kChunk);
      state.x = own_.load(starts, i);
      if constexpr (!kEnds) {
        const float2 W = own_.load_weight(args_.W, s_.real_weight, i);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) state.U[j] = multiply(W, state.a.of[j]);
      }
    }
    if constexpr (!kEnds) taps_ = make_taps(s_, place_, args_.a, args_.W, args_.skip, 0);
  }
  __device__ __forceinline__ void store_states(float* planes) const {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) own_.store(planes, i, states_[i].x);
  }

  __device__ __forceinline__ void keep_states(std::int64_t chunk) const {
    if (args_.chunk_states != nullptr)
      store_states(args_.chunk_states + (segment_.batch * s_.chunks + chunk) * 2 * s_.plane);
  }

  // A chunk that is not full, always the last one, leaves the states to walk_last.
  __device__ __forceinline__ void walk_chunk(const float* tokens, int steps, float* outputs) {
    float2 before[kPerPart];
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) before[i] = states_[i].x;
    float w[kChunk] = {};
#pragma unroll
    for (int t = 0; t < kChunk; t += kGroup) {
      const float4 v = *reinterpret_cast<const float4*>(tokens + t);
#pragma unroll
      for (int i = 0; i < kPerPart; ++i) {
        OwnState& state = states_[i];
        if constexpr (!kEnds) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) w[t + j] = real_part(state.U[j], state.x, w[t + j]);
        }
        state.x = advance_group(state.a, state.x, v);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerPart; ++i) {
      OwnState& state = states_[i];
      state.x = steps == kChunk ? state.x + multiply(gap(i), before[i]) : before[i];
    }
    if constexpr (!kEnds) write_lane(w, tokens, outputs);
  }

  __device__ __forceinline__ void walk_last(const float* tokens, int steps) {
#pragma unroll
    for (int i = 0; i < kPerPart; ++i)
      states_[i].x = walk_short(states_[i], exact(i), states_[i].x, tokens, steps);
  }

  // The sum over the threads of a lane and what the tokens of a group add to each other.
  __device__ __forceinline__ void write_lane(float (&w)[kChunk], const float* tokens,
                                             float* outputs) const {
    reduce_parts(w, place_.part, kParts);
    const int first = first_token(place_.part, kParts);
#pragma unroll
    for (int j = 0; j < Mover::kOwn; ++j) {
      const int in_group = Mover::kOwn >= kGroup ? j % kGroup : (first + j) % kGroup;
#pragma unroll
      for (int d = 0; d < kGroup; ++d)
        if (d <= in_group) w[j] = fmaf(taps_.of[d], tokens[first + j - d], w[j]);
      outputs[first + j] = w[j];
    }
  }

  const ForwardArgs<T>& args_;
  const Sizes& s_;
  const Segment& segment_;
  Place place_;
  OwnSubstates<kParts> own_;
  Mover mover_;
  float2* gaps_;  // in shared memory: read once per chunk
  OwnState states_[kPerPart];
  Taps taps_;
};

template <class T, int kParts, bool kEnds>
__global__ __launch_bounds__(kThreads, 3) void lane_walk_kernel(ForwardArgs<T> args) {
  using Walk = OwnWalk<T, kParts, kEnds>;
  __shared__ __align__(16) float v_tiles[2][Walk::kTile];
  __shared__ __align__(16) float y_tiles[kEnds ? 1 : 2 * Walk::kTile];
  __shared__ float2 gaps[kPerPart * kThreads];
  const Sizes& s = args.sizes;
  const Segment segment(s, args.lengths, blockIdx.x / s.tiles);
  if (kEnds && segment.index == s.segments - 1) return;  // nothing follows it
  Walk(args, segment, blockIdx.x % s.tiles, gaps).run(v_tiles, y_tiles);
}

template <class T, bool kEnds>
void launch_walk(Context& ctx, const ForwardArgs<T>& args) {
  const auto blocks = static_cast<unsigned>(args.sizes.rows() * args.sizes.tiles);
  visit_parts<kMinParts>(args.sizes.parts, [&]<int kParts>() {
    lane_walk_kernel<T, kParts, kEnds><<<blocks, kThreads, 0, ctx.stream().handle>>>(args);
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

// Steps 1 and 2.
template <class T, class LaunchEnds>
void make_starts(Context& ctx, ForwardArgs<T>& args, Tensor& carries, LaunchEnds&& launch_ends) {
  const Sizes& s = args.sizes;
  if (s.segments == 1) return;
  Tensor ends = ctx.empty(s.segment_states(), DType::float32);
  carries = ctx.empty(s.segment_states(), DType::float32);
  args.ends = ends.view().data<float>();
  launch_ends();
  launch_carry(
      ctx, {s, false, args.a, args.a_low, args.ends, args.starts, carries.view().data<float>()});
  args.starts = carries.view().data<float>();
}

template <class T>
void forward_in_registers(Context& ctx, ForwardArgs<T> args) {
  Tensor carries;
  make_starts(ctx, args, carries, [&] { launch_walk<T, true>(ctx, args); });
  launch_walk<T, false>(ctx, args);
}

template <class T>
void forward(Context& ctx, ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  const std::int64_t blocks = s.rows() * (s.groups > 1 ? s.groups : s.tiles);
  args.values = column_values(s);
  std::size_t shared =
      2 * s.tile_bytes() + static_cast<std::size_t>(args.values * kThreads) * sizeof(float2);
  Tensor columns, sums, carries;
  if (shared > kSharedLimit) {
    shared = 2 * s.tile_bytes();
    columns = ctx.empty(Shape{blocks, args.values, kThreads, 2}, DType::float32);
    args.columns = reinterpret_cast<float2*>(columns.view().data<float>());
  }
  if (s.groups > 1 && s.tiles > 1) {
    if constexpr (std::is_same_v<T, float>) {
      args.sums = args.y;
    } else {
      sums = ctx.empty({s.batch, s.seqlen, s.outputs}, DType::float32);
      args.sums = sums.view().data<float>();
    }
  }
  make_starts(ctx, args, carries, [&] { launch<T, true>(ctx, args, blocks, shared); });
  launch<T, false>(ctx, args, blocks, shared);
}

constexpr int kCarryThreads = 128;
constexpr int kAhead = 8;  // ends that are loaded before the chain needs them

// One thread per sub-state of a sequence walks its segments. In double, because this is the only
// place where rounding would travel along the whole sequence. Bound by latency.
__global__ __launch_bounds__(kCarryThreads) void lane_scan_carry_kernel(CarryArgs args) {
  const Sizes& s = args.sizes;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kCarryThreads + threadIdx.x;
  if (i >= s.batch * s.plane) return;
  const std::int64_t batch = i / s.plane;
  const std::int64_t offset = i % s.plane;
  float2 low{0.0F, 0.0F};
  if (args.a_low != nullptr) low = {args.a_low[offset], args.a_low[s.plane + offset]};
  const Pair a = exact_multiplier({args.a[offset], args.a[s.plane + offset]}, low);
  Pair multiplier = power(a, s.segment_chunks * kChunk);
  if (args.reverse) multiplier.im = -multiplier.im;
  Pair state{0.0, 0.0};
  if (args.start != nullptr) {
    const float* const start = args.start + batch * 2 * s.plane + offset;
    state = {static_cast<double>(start[0]), static_cast<double>(start[s.plane])};
  }
  const auto place = [&](std::int64_t k) {
    const std::int64_t segment = args.reverse ? s.segments - 1 - k : k;
    return (batch * s.segments + segment) * 2 * s.plane + offset;
  };
  for (std::int64_t k0 = 0; k0 < s.segments; k0 += kAhead) {
    float2 end[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (k0 + k + 1 < s.segments)  // nothing follows the last one, which has no end
        end[k] = {args.ends[place(k0 + k)], args.ends[place(k0 + k) + s.plane]};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k0 + k >= s.segments) continue;
      args.carries[place(k0 + k)] = static_cast<float>(state.re);
      args.carries[place(k0 + k) + s.plane] = static_cast<float>(state.im);
      if (k0 + k + 1 >= s.segments) continue;
      state = multiplier * state;
      state.re += static_cast<double>(end[k].x);
      state.im += static_cast<double>(end[k].y);
    }
  }
}

constexpr int kStepThreads = 128;

// One token. `threads` neighbours share an output: they walk the sub-states of its lane or, where
// outputs sum over lanes, of all its lanes, which are neighbours in memory. state_out may be
// state_in: every element is read and written by one thread, with the last channel. Bound by the
// bytes of the state and of the parameters.
template <class T>
__global__ __launch_bounds__(kStepThreads) void lane_scan_step_kernel(ForwardArgs<T> args,
                                                                      int threads) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Sizes& s = args.sizes;
  const std::int64_t index =
      (static_cast<std::int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) / threads;
  const std::int64_t units = s.groups > 1 ? s.groups : s.lanes;
  const std::int64_t per_unit = s.plane / units;
  const bool exists = index < s.batch * units;
  const std::int64_t batch = exists ? index / units : 0;
  const std::int64_t unit = exists ? index % units : 0;
  const int part = static_cast<int>(threadIdx.x) % threads;
  const bool valid = args.lengths == nullptr || args.lengths[batch] > 0;
  const T* const v = args.v + batch * s.inputs;
  const std::int64_t states = batch * 2 * s.plane;
  for (std::int64_t c = 0; c < s.channels; ++c) {
    const bool last = c + 1 == s.channels;
    const float* const W = args.W + c * (s.real_weight ? 1 : 2) * s.plane;
    float sum = 0.0F;
    for (std::int64_t k = part; exists && k < per_unit; k += threads) {
      const std::int64_t at = unit * per_unit + k;
      float2 x{0.0F, 0.0F};
      if (args.starts != nullptr)
        x = {args.starts[states + at], args.starts[states + s.plane + at]};
      const float2 before = x;
      if (valid) {
        float drive = to_float(v[s.groups > 1 ? k / s.substates : unit]);
        float2 rest{0.0F, 0.0F};
        if (args.a_low != nullptr) rest = multiply({args.a_low[at], args.a_low[s.plane + at]}, x);
        x = advance({args.a[at], args.a[s.plane + at]}, x, drive + rest.x);
        x.y += rest.y;
        sum = fmaf(W[at], x.x, sum);
        if (!s.real_weight) sum = fmaf(-W[s.plane + at], x.y, sum);
      }
      if (last && args.chunk_states != nullptr) {
        args.chunk_states[states + at] = before.x;
        args.chunk_states[states + s.plane + at] = before.y;
      }
      if (last && args.state_out != nullptr) {
        args.state_out[states + at] = x.x;
        args.state_out[states + s.plane + at] = x.y;
      }
    }
    for (int offset = threads / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
    if (!exists || part != 0) continue;
    if (valid && args.skip != nullptr)
      sum = fmaf(args.skip[c * s.lanes + unit], to_float(v[unit]), sum);
    args.y[batch * s.outputs + c * s.inputs + unit] = from_float<T>(sum);
  }
}

template <class T>
void step(Context& ctx, const ForwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  const std::int64_t units = s.groups > 1 ? s.groups : s.lanes;
  int threads = 1;
  while (threads < 32 && threads * 2 <= s.plane / units) threads *= 2;
  const std::int64_t count = s.batch * units * threads;
  launch_overlapped(lane_scan_step_kernel<T>,
                    static_cast<unsigned>((count + kStepThreads - 1) / kStepThreads), kStepThreads,
                    0, ctx.stream().handle, args, threads);
}

}  // namespace

void launch_carry(Context& ctx, const CarryArgs& args) {
  const std::int64_t count = args.sizes.batch * args.sizes.plane;
  lane_scan_carry_kernel<<<static_cast<unsigned>((count + kCarryThreads - 1) / kCarryThreads),
                           kCarryThreads, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lane

void lane_scan_forward(Context& ctx, const LaneScanForward& a) {
  using namespace lane;  // NOLINT(google-build-using-namespace)
  const detail::LaneScanSizes sizes(a.a, a.W, a.v);
  visit_float("lane_scan_forward", a.v.dtype(), [&]<class T>() {
    const ForwardArgs<T> args{Sizes(sizes, kMinParts, sizes.groups > 1),
                              a.a.data<float>(),
                              data_or_null<float>(a.a_low),
                              a.W.data<float>(),
                              data_or_null<float>(a.skip),
                              a.v.data<T>(),
                              data_or_null<std::int32_t>(a.lengths),
                              data_or_null<float>(a.state_in),
                              a.y.data<T>(),
                              nullptr,
                              data_or_null<float>(a.state_out),
                              data_or_null<float>(a.chunk_states),
                              nullptr,
                              nullptr,
                              0};
    if (sizes.seqlen == 1)
      step<T>(ctx, args);
    else if (args.sizes.in_registers)
      forward_in_registers<T>(ctx, args);
    else
      forward<T>(ctx, args);
  });
}

}  // namespace lrnn::cuda
