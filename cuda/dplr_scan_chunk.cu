// Both passes over whole chunks on tensor cores: common/dplr_scan_chunk.cuh.
//
// One block owns one head of kColumns sequences or segments and walks their chunks. A warp owns 16
// rows of the maps, in registers: two warps the outputs, the others eight states each. States and
// tokens lie in shared memory as operands, twice: of this chunk and of the next one. Two warps more
// do nothing but load tokens and store outputs, several chunks ahead and one behind. One barrier
// per chunk.
//
// Bound by the latency of a step: 182 us forward of B8 L2048 H768 N64 in float32 on an H200, with
// 216 mma and about 1400 other warp instructions for a chunk of a head. Tokens are moved to heads
// and back at 3.3 TB/s, bound by memory.
#include "common/check.cuh"
#include "common/dplr_scan_chunk.cuh"

namespace lrnn::cuda::dplr {
namespace {

constexpr int kTransferThreads = 64;
constexpr int kAhead = 4;  // chunks of tokens in flight
constexpr int kTokensPerThread = kChunk * kColumns / kTransferThreads;
constexpr int kGroups = kChunk / kTokensPerThread;  // threads that share a column
constexpr int kOutputPitch = kChunk + 4;
static_assert(kTokensPerThread == 4, "of an operand a thread holds four rows");

// In backward the tokens are dy, the outputs du, the states adjoints.
template <class T>
struct ChunkArgs {
  Sizes sizes;
  ChunkTable table;
  const T* tokens;  // [B, chunks, H, Q], as the outputs
  const std::int32_t* lengths;
  const float*
      starts;  // [B segments, 2, H, N]; of step 1 [B, 2, H, N], where a walk starts; null: 0
  T* outputs;
  float* chunk_states;  // null: not kept
  float* finals;        // step 1: [B segments, 2, H, N], else [B, 2, H, N] after all whole chunks
};

// A column of a block: a sequence or segment.
template <bool kReverse>
struct Column {
  bool exists;
  bool holds_start;  // of the walk along the sequence
  bool holds_final;
  int batch;
  int segment;
  int first;  // chunk
  int count;  // of whole chunks with valid tokens

  Column() = default;
  __device__ Column(const Sizes& s, const std::int32_t* lengths, std::int64_t index,
                    const SegmentRange& range) {
    exists = index < s.batch * range.count;
    if (!exists) index = 0;
    batch = static_cast<int>(index / range.count);
    segment = static_cast<int>(range.first + index % range.count);
    const std::int64_t length = lengths == nullptr ? s.seqlen : lengths[batch];
    const int whole = static_cast<int>(length / kChunk);
    first = segment * static_cast<int>(s.segment_chunks);
    count = max(0, min(whole - first, static_cast<int>(s.segment_chunks)));
    if (!exists) count = 0;
    const bool is_first = exists && segment == 0;
    const bool is_last = exists && segment == last_segment(s, length);
    holds_start = kReverse ? is_last : is_first;
    holds_final = kReverse ? is_first : is_last;
  }
  // The chunk of the sequence that is walked as number `step`.
  [[nodiscard]] __device__ __forceinline__ int chunk(int step) const {
    return first + (kReverse ? count - 1 - step : step);
  }
};

template <int kTiles, bool kEnds>
struct BlockShape {
  static constexpr int kFirstTile = kEnds ? kTokenTiles : 0;
  static constexpr int kWarps = kTiles - kFirstTile;  // that own rows
  static constexpr int kThreads = 32 * kWarps + kTransferThreads;
  // Roles of warps.
  static constexpr int kTransfer = 0;
  static constexpr int kStates = 1;
  static constexpr int kOutputs = 2;
  static constexpr int kRoles = kEnds ? 2 : 3;
};

template <bool kReverse, int kTiles>
struct Shared {
  MapOperand<kTiles> operands[2];
  float outputs[2][kColumns][kOutputPitch];
  alignas(8) float poison[2][kColumns];  // 0, or NaN if a token of the chunk is not finite
  Column<kReverse> columns[kColumns];
};

template <class T>
__device__ __forceinline__ void load_four(const T* from, float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    const auto w = *reinterpret_cast<const float4*>(from);
    v[0] = w.x;
    v[1] = w.y;
    v[2] = w.z;
    v[3] = w.w;
  } else {
    const auto w = *reinterpret_cast<const uint2*>(from);
    v[0] = __uint_as_float(w.x << 16);
    v[1] = __uint_as_float(w.x & 0xFFFF0000U);
    v[2] = __uint_as_float(w.y << 16);
    v[3] = __uint_as_float(w.y & 0xFFFF0000U);
  }
}
template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&v)[4]) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
  else
    *reinterpret_cast<uint2*>(to) = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
}

// Loads tokens and stores outputs. Thread (column, group) owns four tokens.
//
// A map would spread a token that is not finite to outputs before it, as 0 * inf. So it is taken as
// 0, and what follows it on the walk is set to NaN.
template <class T, bool kReverse, bool kEnds, int kTiles>
class Transfer {
 public:
  __device__ Transfer(const ChunkArgs<T>& a, Shared<kReverse, kTiles>& shared, int thread,
                      std::int64_t head)
      : shared_(shared),
        column_(thread / kGroups),
        group_(thread % kGroups),
        count_(shared.columns[column_].count) {
    const Column<kReverse>& column = shared.columns[column_];
    const std::int64_t chunk = column.batch * a.sizes.chunks + column.chunk(0);
    const std::int64_t at = (chunk * a.sizes.heads + head) * kChunk + group_ * kTokensPerThread;
    stride_ = (kReverse ? -1 : 1) * a.sizes.heads * kChunk;
    tokens_ = a.tokens + at;
    if constexpr (!kEnds) outputs_ = a.outputs + at;
  }

  __device__ __forceinline__ void run(int longest) {
    load<0>(0);
    load<1>(1);
    load<2>(2);
    load<3>(3);
    hand_over<0>();
    meet<Shape::kThreads, Shape::kTransfer, Shape::kRoles>(0);
    for (int chunk = 0; chunk < longest; chunk += kAhead) {
      step<0>(chunk);
      if (chunk + 1 < longest) step<1>(chunk + 1);
      if (chunk + 2 < longest) step<2>(chunk + 2);
      if (chunk + 3 < longest) step<3>(chunk + 3);
    }
    if (longest % 2 != 0)
      store<0>(longest - 1);
    else if (longest > 0)
      store<1>(longest - 1);
  }

 private:
  // kSlot is chunk % kAhead.
  template <int kSlot>
  __device__ __forceinline__ void step(int chunk) {
    load<kSlot>(chunk + kAhead);
    if (chunk > 0) store<(kSlot + 1) % 2>(chunk - 1);
    hand_over<(kSlot + 1) % kAhead>();
    meet<Shape::kThreads, Shape::kTransfer, Shape::kRoles>(kSlot + 1);
  }
  template <int kSlot>
  __device__ __forceinline__ void load(int chunk) {
    float (&u)[kTokensPerThread] = u_[kSlot];
    u[0] = u[1] = u[2] = u[3] = 0.0F;
    if (chunk >= count_) return;
    load_four(tokens_, u);
    tokens_ += stride_;
  }
  // Makes the chunk an operand.
  template <int kSlot>
  __device__ __forceinline__ void hand_over() {
    float (&u)[kTokensPerThread] = u_[kSlot];
    int bad = kChunk;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      if (isfinite(u[j])) continue;
      bad = min(bad, order(j));
      u[j] = 0.0F;
    }
#pragma unroll
    for (int i = 1; i < kGroups; i *= 2) bad = min(bad, __shfl_xor_sync(kAll, bad, i));
    bad_[kSlot % 2] = bad;
    if (group_ == 0) shared_.poison[kSlot % 2][column_] = bad < kChunk ? kNan : 0.0F;
    shared_.operands[kSlot % 2].store(group_ / 4, column_, group_ % 4, u);
  }
  template <int kParity>
  __device__ __forceinline__ void store(int chunk) {
    if constexpr (kEnds) return;
    if (chunk >= count_) return;
    const auto v = *reinterpret_cast<const float4*>(
        &shared_.outputs[kParity][column_][group_ * kTokensPerThread]);
    float y[kTokensPerThread] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      if (order(j) >= bad_[kParity]) y[j] = kNan;
    store_four(outputs_, y);
    outputs_ += stride_;
  }
  // Which of the chunk's tokens an own one is on the walk.
  [[nodiscard]] __device__ __forceinline__ int order(int j) const {
    const int token = group_ * kTokensPerThread + j;
    return kReverse ? kChunk - 1 - token : token;
  }

  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  using Shape = BlockShape<kTiles, kEnds>;

  Shared<kReverse, kTiles>& shared_;
  int column_;
  int group_;
  int count_;
  std::int64_t stride_;  // from chunk to chunk
  const T* tokens_;      // of the next chunk to load
  T* outputs_ = nullptr;
  float u_[kAhead][kTokensPerThread];
  int bad_[2] = {};  // first token of the column that is not finite
};

// Eight states of one head in all columns: as C tiles lie, lane (g, q) holds state g in columns
// 2 q and 2 q + 1.
template <class T, bool kReverse, bool kEnds, int kTiles>
class States {
 public:
  __device__ States(const ChunkArgs<T>& a, Shared<kReverse, kTiles>& shared, std::int64_t head,
                    int tile, int lane)
      : a_(a),
        shared_(shared),
        tile_(tile),
        row_(lane / 4),
        column_(lane % 4 * 2),
        at_(head * a.sizes.states + tile * kTileStates + row_) {
    const std::int64_t padded = (kTiles - kTokenTiles) * kTileStates;
    const bool exists = tile * kTileStates + row_ < a.sizes.states;
    diagonal_ = a.table.diagonal[head * padded + tile * kTileStates + row_];
    stride_ = (kReverse ? -2 : 2) * a.sizes.plane;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Column<kReverse>& column = shared_.columns[column_ + c];
      re_[c] = im_[c] = 0.0F;
      left_[c] = exists && column.exists ? column.count : -1;
      if (a.chunk_states != nullptr)
        to_[c] = row(a.chunk_states, column.batch * a.sizes.chunks + column.chunk(0));
      if (left_[c] < 0 || a.starts == nullptr || (kEnds && !column.holds_start)) continue;
      const float* const start = row(a.starts, kEnds ? column.batch : segment_of(column));
      re_[c] = start[0];
      im_[c] = start[a.sizes.plane];
    }
  }

  // Before each chunk and after the last one: keeps the states, if they are wanted.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (left_[c] > 0 && a_.chunk_states != nullptr) {
        to_[c][0] = re_[c];
        to_[c][a_.sizes.plane] = im_[c];
        to_[c] += stride_;
      }
      if (left_[c] == 0) keep_final(c);
      --left_[c];
    }
  }
  // From chunk to chunk, given R X + E u.
  template <int kParity>
  __device__ __forceinline__ void advance(const float (&sum)[4]) {
    const auto poison = *reinterpret_cast<const float2*>(&shared_.poison[kParity][column_]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float bad = c == 0 ? poison.x : poison.y;
      const float re = re_[c];
      const float im = im_[c];
      float dre = fmaf(diagonal_.z, re, fmaf(-diagonal_.w, im, sum[c] + bad));
      float dim = fmaf(diagonal_.z, im, fmaf(diagonal_.w, re, sum[2 + c] + bad));
      dre = fmaf(diagonal_.x, re, fmaf(-diagonal_.y, im, dre));
      dim = fmaf(diagonal_.x, im, fmaf(diagonal_.y, re, dim));
      re_[c] = re + dre;
      im_[c] = im + dim;
    }
  }
  // Makes the states an operand. Neighbouring rows lie in lanes of one warp: even rows gather the
  // first column, odd ones the second.
  template <int kParity>
  __device__ __forceinline__ void hand_over() const {
    const bool odd = row_ % 2 != 0;
    const float other_re = __shfl_xor_sync(kAll, odd ? re_[0] : re_[1], 4);
    const float other_im = __shfl_xor_sync(kAll, odd ? im_[0] : im_[1], 4);
    auto& operand = shared_.operands[kParity];
    const int column = column_ + (odd ? 1 : 0);
    const int row = row_ - (odd ? 1 : 0);
    operand.store(kTokenTiles + tile_, column, row, odd ? other_re : re_[0],
                  odd ? re_[1] : other_re);
    operand.store(kTokenTiles + tile_, column, kTileStates + row, odd ? other_im : im_[0],
                  odd ? im_[1] : other_im);
  }

 private:
  [[nodiscard]] __device__ __forceinline__ std::int64_t segment_of(
      const Column<kReverse>& column) const {
    return column.batch * a_.sizes.segments + column.segment;
  }
  // The own state in row r of [R, 2, H, N].
  template <class P>
  [[nodiscard]] __device__ __forceinline__ P* row(P* planes, std::int64_t r) const {
    return planes + r * 2 * a_.sizes.plane + at_;
  }
  __device__ void keep_final(int c) const {
    const Column<kReverse>& column = shared_.columns[column_ + c];
    if (a_.finals == nullptr || (!kEnds && !column.holds_final)) return;
    float* const to = row(a_.finals, kEnds ? segment_of(column) : column.batch);
    to[0] = re_[c];
    to[a_.sizes.plane] = im_[c];
  }

  const ChunkArgs<T>& a_;
  Shared<kReverse, kTiles>& shared_;
  int tile_;
  int row_;
  int column_;
  std::int64_t at_;  // of a plane
  std::int64_t stride_;
  float4 diagonal_;
  int left_[2];   // chunks of both columns
  float* to_[2];  // where the states are kept
  float re_[2];
  float im_[2];
};

// Calls step<chunk % 2>() for all chunks, with a barrier before and after each.
template <class Shape, int kRole, class F>
__device__ __forceinline__ void for_each_chunk(int longest, F&& step) {
  constexpr auto meet_others = meet<Shape::kThreads, kRole, Shape::kRoles>;
  meet_others(0);
  for (int chunk = 0; chunk < longest; chunk += 2) {
    step.template operator()<0>();
    meet_others(1);
    if (chunk + 1 == longest) break;
    step.template operator()<1>();
    meet_others(0);
  }
}

// kEnds: step 1, which writes nothing but the last states of segments. Else step 3.
template <class T, int kStates, bool kReverse, bool kEnds>
__global__ __launch_bounds__(BlockShape<kMapTiles<kStates>, kEnds>::kThreads,
                             2) void dplr_scan_chunk_kernel(ChunkArgs<T> a, SegmentRange range) {
  constexpr int kTiles = kMapTiles<kStates>;
  using Shape = BlockShape<kTiles, kEnds>;
  constexpr int kExact = sizeof(T) == 2 ? kTokenTiles : 0;
  constexpr int kRows = kMapRows<kStates>;
  __shared__ Shared<kReverse, kTiles> shared;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t head = blockIdx.x % a.sizes.heads;
  if (thread < kColumns)
    shared.columns[thread] =
        Column<kReverse>(a.sizes, a.lengths, blockIdx.x / a.sizes.heads * kColumns + thread, range);
  __syncthreads();
  int longest = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) longest = max(longest, shared.columns[c].count);

  const int warp = thread / 32;
  const int lane = thread % 32;
  if (warp >= Shape::kWarps) {
    Transfer<T, kReverse, kEnds, kTiles>(a, shared, thread - 32 * Shape::kWarps, head).run(longest);
    return;
  }
  const int tile = warp + Shape::kFirstTile;
  const MapTile<kTiles> map(a.table.maps + (head * kRows + tile * 16) * kRows, lane);
  float sum[4];
  if (tile < kTokenTiles) {
    float* const output = &shared.outputs[0][lane % 4 * 2][tile * 16 + lane / 4];
    for_each_chunk<Shape, Shape::kOutputs>(longest, [&]<int kParity>() {
      apply_map<kTiles, kExact>(sum, map, shared.operands[kParity], lane);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        output[(kParity * kColumns + i % 2) * kOutputPitch + i / 2 * 8] = sum[i];
    });
    return;
  }
  States<T, kReverse, kEnds, kTiles> states(a, shared, head, tile - kTokenTiles, lane);
  states.keep();
  states.template hand_over<0>();
  for_each_chunk<Shape, Shape::kStates>(longest, [&]<int kParity>() {
    apply_map<kTiles, kExact>(sum, map, shared.operands[kParity], lane);
    states.template advance<kParity>(sum);
    states.template hand_over<1 - kParity>();
    states.keep();
  });
}

template <class T, bool kReverse, bool kEnds>
void launch(Context& ctx, const ChunkArgs<T>& args) {
  const Sizes& s = args.sizes;
  const SegmentRange range = kEnds ? ends_range(s, kReverse) : SegmentRange{0, s.segments};
  const std::int64_t blocks = s.heads * ((s.batch * range.count + kColumns - 1) / kColumns);
  visit_padded_states(s.states, [&](auto states) {
    dplr_scan_chunk_kernel<T, states(), kReverse, kEnds>
        <<<static_cast<unsigned>(blocks), BlockShape<kMapTiles<states()>, kEnds>::kThreads, 0,
           ctx.stream().handle>>>(args, range);
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, bool kReverse>
void walk(Context& ctx, const ChunkWalkArgs<T>& args) {
  const Sizes& s = args.sizes;
  ChunkMemory memory = make_chunk_table(ctx, s, args.parameters, kReverse);
  ChunkArgs<T> a{s,          memory.table(), args.tokens, args.lengths,
                 args.start, args.outputs,   args.states, args.finals};
  if (s.segments == 1) return launch<T, kReverse, false>(ctx, a);
  const Shape shape = {s.batch, s.segments, 2, s.heads, s.states};
  Tensor ends = ctx.empty(shape, DType::float32);
  Tensor carries = ctx.empty(shape, DType::float32);
  const Tensor powers = make_segment_powers(ctx, s, a.table);
  a.finals = ends.view().data<float>();
  launch<T, kReverse, true>(ctx, a);
  launch_carry(ctx, {s, kReverse, args.lengths, powers.view().data<float>(), a.finals, args.start,
                     carries.view().data<float>()});
  a.starts = carries.view().data<float>();
  a.finals = args.finals;
  launch<T, kReverse, false>(ctx, a);
}

constexpr int kMoveThreads = 256;
constexpr int kMoveHeads = 64;  // of a block

// Two neighbouring heads of [B, L, H].
template <class T>
struct HeadPair {
  bool one_word;
  bool second;  // exists

  __device__ __forceinline__ float2 load(const T* p) const {
    if (!one_word) return {to_float(p[0]), second ? to_float(p[1]) : 0.0F};
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const float2*>(p);
    } else {
      const auto v = *reinterpret_cast<const __nv_bfloat162*>(p);
      return {to_float(v.x), to_float(v.y)};
    }
  }
  __device__ __forceinline__ void store(T* p, float2 v) const {
    if (!one_word) {
      p[0] = from_float<T>(v.x);
      if (second) p[1] = from_float<T>(v.y);
    } else if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float2*>(p) = v;
    } else {
      *reinterpret_cast<__nv_bfloat162*>(p) = {from_float<T>(v.x), from_float<T>(v.y)};
    }
  }
};

// One chunk of kMoveHeads heads from [B, L, H] to [B, chunks, H, Q], or back. Chunks that are not
// whole are left out. Bound by memory.
template <class T, bool kBack>
__global__ __launch_bounds__(kMoveThreads) void dplr_scan_by_head_kernel(
    Sizes s, const std::int32_t* __restrict__ lengths, const T* __restrict__ from,
    T* __restrict__ to, bool one_word) {
  __shared__ float tile[kMoveHeads][kChunk + 1];
  const std::int64_t tiles = (s.heads + kMoveHeads - 1) / kMoveHeads;
  const std::int64_t chunk = blockIdx.x / tiles % s.chunks;
  const std::int64_t batch = blockIdx.x / tiles / s.chunks;
  const std::int64_t first = blockIdx.x % tiles * kMoveHeads;
  const int heads = static_cast<int>(min(s.heads - first, static_cast<std::int64_t>(kMoveHeads)));
  const std::int64_t length = lengths == nullptr ? s.seqlen : lengths[batch];
  if (chunk >= length / kChunk) return;  // the whole block
  const std::int64_t by_token = (batch * s.seqlen + chunk * kChunk) * s.heads + first;
  const std::int64_t by_head = ((batch * s.chunks + chunk) * s.heads + first) * kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const auto each_by_token = [&](auto&& f) {
    constexpr int kPairs = kMoveHeads / 2;
    const int head = thread % kPairs * 2;
    const HeadPair<T> pair{one_word, head + 1 < heads};
    if (head >= heads) return;
#pragma unroll
    for (int token = thread / kPairs; token < kChunk; token += kMoveThreads / kPairs)
      f(pair, by_token + token * s.heads + head, tile[head][token], tile[head + 1][token]);
  };
  const auto each_by_head = [&](auto&& f) {
    constexpr int kFours = kChunk / 4;
    const int token = thread % kFours * 4;
#pragma unroll
    for (int head = thread / kFours; head < kMoveHeads; head += kMoveThreads / kFours)
      if (head < heads) f(by_head + head * kChunk + token, &tile[head][token]);
  };
  if constexpr (kBack) {
    each_by_head([&](std::int64_t at, float* v) {
      float four[4];
      load_four(from + at, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = four[i];
    });
    __syncthreads();
    each_by_token([&](const HeadPair<T>& pair, std::int64_t at, float v0, float v1) {
      pair.store(to + at, {v0, v1});
    });
  } else {
    each_by_token([&](const HeadPair<T>& pair, std::int64_t at, float& v0, float& v1) {
      const float2 v = pair.load(from + at);
      v0 = v.x;
      v1 = v.y;
    });
    __syncthreads();
    each_by_head(
        [&](std::int64_t at, const float* v) { store_four(to + at, {v[0], v[1], v[2], v[3]}); });
  }
}

template <class T>
bool in_one_word(const T* pair) {
  return reinterpret_cast<std::uintptr_t>(pair) % (2 * sizeof(T)) == 0;
}

template <class T, bool kBack>
void move_tokens(Context& ctx, const Sizes& s, const std::int32_t* lengths, const T* from, T* to) {
  const std::int64_t blocks = s.batch * s.chunks * ((s.heads + kMoveHeads - 1) / kMoveHeads);
  dplr_scan_by_head_kernel<T, kBack>
      <<<static_cast<unsigned>(blocks), kMoveThreads, 0, ctx.stream().handle>>>(
          s, lengths, from, to, s.heads % 2 == 0 && in_one_word(kBack ? to : from));
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

template <class T>
Tensor by_head(Context& ctx, const Sizes& s, const std::int32_t* lengths, const T* tokens) {
  Tensor out = empty_by_head<T>(ctx, s);
  move_tokens<T, false>(ctx, s, lengths, tokens, out.view().template data<T>());
  return out;
}
template <class T>
void by_token(Context& ctx, const Sizes& s, const std::int32_t* lengths, const Tensor& by_head,
              T* tokens) {
  move_tokens<T, true>(ctx, s, lengths, by_head.view().template data<T>(), tokens);
}

template <class T>
void walk_chunks(Context& ctx, const ChunkWalkArgs<T>& args, bool reverse) {
  if (reverse)
    walk<T, true>(ctx, args);
  else
    walk<T, false>(ctx, args);
}
template void walk_chunks(Context&, const ChunkWalkArgs<float>&, bool);
template void walk_chunks(Context&, const ChunkWalkArgs<__nv_bfloat16>&, bool);
template Tensor by_head(Context&, const Sizes&, const std::int32_t*, const float*);
template Tensor by_head(Context&, const Sizes&, const std::int32_t*, const __nv_bfloat16*);
template void by_token(Context&, const Sizes&, const std::int32_t*, const Tensor&, float*);
template void by_token(Context&, const Sizes&, const std::int32_t*, const Tensor&, __nv_bfloat16*);

}  // namespace lrnn::cuda::dplr
