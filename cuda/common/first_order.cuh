/// Scans h_t = a_t h_{t-1} + b_t in every channel, a and b made by the kernel.
///
/// A thread owns two neighbouring channels of kSteps tokens. A block owns kChannels channels of one
/// sequence and walks them in tiles of kTile tokens that its warps share: lane 16 p + l of warp w
/// has channels 2 l, 2 l + 1 of slice 2 w + p of the tile. The slices are chained by composing
/// their maps h -> a h + b, in a warp by shuffles and among warps through shared memory. Operands
/// travel to shared memory asynchronously, a tile ahead.
///
/// Where sequences and channels give too few blocks, a cluster of kRanks blocks shares the time of
/// a sequence: rank r walks tiles r, r + kRanks, .... Each block sends the map of its tile to the
/// others, and all apply the kRanks maps in order. So no tile is read twice, and the bits are those
/// of one block that walks all tiles; devices without clusters do that.
///
/// A problem P, the first argument of a kernel, has channels, seqlen, batch and length(b).
#pragma once

#include "lrnn/core/context.hpp"

#include "common/capability.cuh"
#include "common/check.cuh"
#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"

namespace lrnn::cuda::first_order {

constexpr int kSteps = 8;

// ---- two channels ----

/// Two neighbouring elements as they come from memory.
template <class T>
struct PairOf;
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = unsigned;
};
template <class T>
using Pair = typename PairOf<T>::type;

__device__ __forceinline__ float2 unpack(float2 v) {
  return v;
}
__device__ __forceinline__ float2 unpack(unsigned v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000U)};
}
template <class T>
__device__ __forceinline__ Pair<T> pack(float2 v) {
  if constexpr (sizeof(T) == 2)
    return static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(v.x))) |
           static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(v.y))) << 16;
  else
    return v;
}

/// Without kVector the second channel may not exist, and addresses need not be aligned.
template <bool kVector, class T>
__device__ __forceinline__ Pair<T> load_pair(const T* p, bool second) {
  if constexpr (kVector) return *reinterpret_cast<const Pair<T>*>(p);
  return pack<T>({to_float(p[0]), second ? to_float(p[1]) : 0.0F});
}
template <bool kVector, class T>
__device__ __forceinline__ void store_pair(T* p, float2 v, bool second) {
  if constexpr (kVector) {
    *reinterpret_cast<Pair<T>*>(p) = pack<T>(v);
  } else {
    p[0] = from_float<T>(v.x);
    if (second) p[1] = from_float<T>(v.y);
  }
}

/// h -> a h + b in two channels.
struct Affine {
  float2 a{1.0F, 1.0F};
  float2 b{0.0F, 0.0F};

  __device__ __forceinline__ float2 operator()(float2 h) const {
    return {fmaf(a.x, h.x, b.x), fmaf(a.y, h.y, b.y)};
  }
  /// The map that does `first` and then this.
  __device__ __forceinline__ Affine after(const Affine& first) const {
    return {{a.x * first.a.x, a.y * first.a.y}, (*this)(first.b)};
  }
};

// ---- placement ----

/// Whether rows can be copied in pieces of 16 bytes.
template <class T>
bool allows_pieces(const DeviceRows<T>& rows, std::int64_t channels) {
  return allows_vectors(rows.data, channels, rows.stride, kWide<T>);
}
template <class T>
bool allows_pieces(const DeviceRows<const T>& rows, std::int64_t channels) {
  return allows_vectors(rows.data, channels, rows.stride, kWide<T>);
}
/// Whether dense rows of states can be walked by pairs.
inline bool allows_pairs(const float* states, std::int64_t channels) {
  return allows_vectors(states, channels, channels, 2);
}

constexpr int kLanes = 16;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlices = 2 * kWarps;
constexpr int kTile = kSlices * kSteps;
constexpr int kChannels = 2 * kLanes;

/// Where a thread works. Blocks count ranks fastest, then channel tiles, then sequences.
struct Place {
  int lane;           // of the warp
  int warp;           // of the block
  int part;           // half of the warp
  int first_channel;  // of the block
  int channel;        // the first of two
  bool exists;        // whether the first channel does
  bool second;        // whether the second channel does
  int offset;         // first token of the slice in its tile
  int rank;
  int b;
  std::int64_t first_row;  // of the sequence

  template <class P>
  __device__ Place(const P& p, int ranks) {
    lane = static_cast<int>(threadIdx.x) % 32;
    warp = static_cast<int>(threadIdx.x) / 32;
    part = lane / kLanes;
    offset = (2 * warp + part) * kSteps;
    rank = static_cast<int>(blockIdx.x) % ranks;
    const unsigned tiles = static_cast<unsigned>((p.channels + kChannels - 1) / kChannels);
    const unsigned group = blockIdx.x / static_cast<unsigned>(ranks);
    first_channel = static_cast<int>(group % tiles) * kChannels;
    channel = first_channel + 2 * (lane % kLanes);
    exists = channel < p.channels;
    second = channel + 1 < p.channels;
    b = static_cast<int>(group / tiles);
    first_row = static_cast<std::int64_t>(b) * p.seqlen;
  }
  /// Tokens of the slice in the tile at t0 that come before `limit`.
  __device__ int steps(int t0, int limit) const {
    return exists ? max(0, min(limit - (t0 + offset), kSteps)) : 0;
  }
  /// Whether this thread writes what the sequence has for the channel that chain() carries in it.
  __device__ bool writes(int channels) const {
    return rank == 0 && warp == 0 && first_channel + lane < channels;
  }
  __device__ std::int64_t at_sequence(int channels) const {
    return static_cast<std::int64_t>(b) * channels + first_channel + lane;
  }
};

/// The tokens of a slice in one operand. Only the first address is a product: a chain of additions
/// takes two instructions per token, the products that the compiler prefers take six.
template <class T>
struct Column {
  T* p;
  std::int64_t stride;

  /// From the first token of the slice, or with `backward` from the last.
  __device__ __forceinline__ Column(const DeviceRows<T>& rows, const Place& at, int t0,
                                    bool backward = false)
      : p(rows.data + (at.first_row + t0 + at.offset + (backward ? kSteps - 1 : 0)) * rows.stride +
          at.channel),
        stride(backward ? -rows.stride : rows.stride) {}
  /// The address of the token, then moves on.
  __device__ __forceinline__ T* next() {
    T* const here = p;
    p += stride;
    asm("" : "+l"(p));
    return here;
  }
};

// ---- operands in shared memory ----

/// A tile of one operand. Slices of bfloat16 are 64 bytes apart modulo 128, so that the two halves
/// of a warp meet different banks.
template <class T>
struct alignas(16) TileOf {
  static constexpr int kSlice = kSteps * kChannels + (sizeof(T) == 2 ? 32 : 0);
  T data[kSlices * kSlice];

  __device__ __forceinline__ T* row(int t) {
    return data + t / kSteps * kSlice + t % kSteps * kChannels;
  }
  /// The two channels of the thread in token j of its slice.
  __device__ __forceinline__ Pair<T>& pair(const Place& at, int j) {
    return *reinterpret_cast<Pair<T>*>(row(at.offset) + j * kChannels + 2 * (at.lane % kLanes));
  }
};

/// Brings tiles of one operand to shared memory. With kVector a thread copies pieces of 16 bytes,
/// else the elements that it will read itself.
template <class T, bool kVector>
class Stream {
 public:
  __device__ __forceinline__ Stream(const DeviceRows<const T>& rows, const Place& at)
      : stride_(rows.stride),
        next_(rows.data + (at.first_row + token(at)) * rows.stride + at.first_channel +
              column(at)) {}
  /// Moves `tokens` forward, or back.
  __device__ __forceinline__ void move(int tokens) { next_ += tokens * stride_; }
  /// The tile at t0, where the stream must be. Tokens from `limit` on and channels that do not
  /// exist, which are not read, are `missing`.
  __device__ __forceinline__ void fetch(TileOf<T>& tile, const Place& at, int channels, int t0,
                                        int limit, float missing) const {
    const T* from = next_;
    const bool exists = at.first_channel + column(at) < channels;
    if constexpr (kVector) {
#pragma unroll
      for (int t = 0; t < kTile; t += kRows) {
        T* const to = tile.row(token(at) + t) + column(at);
        if (exists && t0 + token(at) + t < limit) {
          copy(to, from);
        } else {
#pragma unroll
          for (int i = 0; i < kWide<T>; ++i) to[i] = from_float<T>(missing);
        }
        from += kRows * stride_;
      }
    } else {
      const Pair<T> none = pack<T>({missing, missing});
#pragma unroll
      for (int j = 0; j < kSteps; ++j, from += stride_)
        tile.pair(at, j) =
            exists && t0 + at.offset + j < limit ? load_pair<false>(from, at.second) : none;
    }
  }

 private:
  static constexpr int kPieces = kChannels / kWide<T>;  // of a row
  static constexpr int kRows = kThreads / kPieces;      // that a block copies at once

  static __device__ __forceinline__ int token(const Place& at) {
    return kVector ? static_cast<int>(threadIdx.x) / kPieces : at.offset;
  }
  static __device__ __forceinline__ int column(const Place& at) {
    return kVector ? static_cast<int>(threadIdx.x) % kPieces * kWide<T> : 2 * (at.lane % kLanes);
  }
  static __device__ __forceinline__ void copy(T* to, const T* from) {
#if __CUDA_ARCH__ >= 800
    copy_async_16(to, from, true);
#else
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
  }

  std::int64_t stride_;
  const T* next_;
};

// ---- chains ----

/// Maps of one channel each: h -> x h + y.
using Maps = float2[kChannels];
/// What chain() needs of shared memory in every other round. All ranks send to `of_tiles`.
template <int kRanks>
struct alignas(16) ChainSlots {
  Maps of_warps[kWarps];
  Maps of_tiles[kRanks];
  Mailbox mailbox;
};

/// Before the first chain(), by all threads.
template <int kRanks>
__device__ __forceinline__ void open_slots(ChainSlots<kRanks> (&slots)[2]) {
  if constexpr (kRanks > 1) {
    if (threadIdx.x == 0) {  // a thread for each, and synccheck ends the kernel as failed
      slots[0].mailbox.init();
      slots[1].mailbox.init();
    }
    cluster_sync();
  }
}

/// Chains the maps of all slices of the tiles of all ranks, in round `round`. `carry` is of channel
/// `lane` of the block, in every warp: what enters the tiles, then what leaves them. Returns what
/// enters the slice of this thread; kReverse walks from the last slice to the first. `between` runs
/// while the maps travel, after all threads of the block have called. Slots of the same parity
/// serve again two rounds later: a rank sends its map of round n + 2 after all maps of n + 1 have
/// come, and every rank sends that after its own threads have read those of n.
template <int kRanks, bool kReverse, class F>
__device__ __forceinline__ float2 chain(const Affine& own, float& carry,
                                        ChainSlots<kRanks> (&pair)[2], int round, const Place& at,
                                        F&& between) {
  ChainSlots<kRanks>& slots = pair[round % 2];
  constexpr unsigned kAll = 0xFFFFFFFFU;
  const auto other = [](float v) { return __shfl_xor_sync(kAll, v, kLanes); };
  Affine before{{other(own.a.x), other(own.a.y)}, {other(own.b.x), other(own.b.y)}};
  const bool later = kReverse ? at.part == 0 : at.part == 1;  // of the two slices of the warp
  if (later) {
    const Affine both = own.after(before);
    *reinterpret_cast<float4*>(&slots.of_warps[at.warp][2 * (at.lane % kLanes)]) =
        make_float4(both.a.x, both.b.x, both.a.y, both.b.y);
  } else {
    before = Affine();
  }
  __syncthreads();
  float2 tile{1.0F, 0.0F};  // of the warps of the block
  float2 earlier = tile;    // of those before this one
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const int w = kReverse ? kWarps - 1 - i : i;
    if (w == at.warp) earlier = tile;
    const float2 m = slots.of_warps[w][at.lane];
    tile = i == 0 ? m : float2{m.x * tile.x, fmaf(m.x, tile.y, m.y)};
  }
  float enters = carry;
  if constexpr (kRanks == 1) {
    between();
    carry = fmaf(tile.x, carry, tile.y);
  } else {
    if (threadIdx.x == 0) slots.mailbox.expect(kRanks * static_cast<int>(sizeof(Maps)));
    for (int r = at.warp; r < kRanks; r += kWarps)
      send(&slots.of_tiles[at.rank][at.lane], slots.mailbox, r, tile);
    between();
    slots.mailbox.wait(round / 2 % 2);
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int r = kReverse ? kRanks - 1 - i : i;
      if (r == at.rank) enters = carry;
      const float2 m = slots.of_tiles[r][at.lane];
      carry = fmaf(m.x, carry, m.y);
    }
  }
  enters = fmaf(earlier.x, enters, earlier.y);
  const int lane = 2 * (at.lane % kLanes);
  return before({__shfl_sync(kAll, enters, lane), __shfl_sync(kAll, enters, lane + 1)});
}

// ---- launch ----

/// Blocks of one rank.
template <class P>
std::int64_t blocks_of(const P& p) {
  return (p.channels + kChannels - 1) / kChannels * p.batch;
}
/// The ranks that suit `blocks` blocks of one rank, on 132 multiprocessors with room for `resident`
/// each. Measured at 24 to 640 blocks.
inline int ranks_for(std::int64_t blocks, int resident) {
  const std::int64_t room = std::int64_t{132} * resident;
  int ranks = 1;
  if (blocks > room) {  // shorter blocks, until the last wave is one of four
    while (ranks < 4 && ranks * blocks < 4 * room) ranks *= 2;
    return ranks;
  }
  // Two for each multiprocessor suffice. All clusters must fit at once; they cannot use all room.
  constexpr std::int64_t kEnough = 300;
  const std::int64_t usable = room - room / 14;
  while (ranks < 8 && ranks * blocks < kEnough && 2 * ranks * blocks <= usable) ranks *= 2;
  return ranks;
}

/// Calls f.operator()<kRanks>() with `ranks`, or with 1 where `clustered`, a kernel for clusters,
/// cannot run or time is too short to share.
template <class P, class Kernel, class F>
void visit_ranks(const P& p, int ranks, Kernel* clustered, F&& f) {
  if (ranks == 1 || p.seqlen <= kTile || !takes_clusters(clustered))
    return f.template operator()<1>();
  switch (ranks) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    default:
      return f.template operator()<8>();
  }
}

/// Launches a kernel of kRanks blocks per channel tile and sequence, with `shared` bytes.
template <int kRanks, class P, class... Operands>
void launch(Context& ctx, void (*kernel)(P, Operands...), std::size_t shared, const P& p,
            const Operands&... operands) {
  LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks_of(p) * kRanks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream().handle;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kRanks, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = kRanks > 1 ? 1 : 0;
  LRNN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p, operands...));
}

}  // namespace lrnn::cuda::first_order
