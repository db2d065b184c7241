/// What the forward and backward kernels of rglru_scan share.
///
/// A thread owns two neighbouring channels of kSteps tokens. A block owns 2 kLanes channels of one
/// sequence, or of a segment of it, and walks them in tiles of time that its warps share: lane
/// p kLanes + l of warp w has channels 2 l, 2 l + 1 of slice w kParts + p of the tile. The slices
/// are chained by composing their maps h -> a h + b, in a warp by shuffles and among warps through
/// shared memory.
///
/// Where sequences and channels give too few blocks, time is cut into segments: a first pass leaves
/// the map of every segment, a small kernel chains them, the main pass starts from its results. The
/// cut depends on sizes alone, so results do not depend on the device.
#pragma once

#include <algorithm>

#include "lrnn/ops/rglru_scan.hpp"

#include "common/check.cuh"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda::rglru {

constexpr int kSteps = 8;
constexpr int kChunk = static_cast<int>(kRglruScanChunk);
static_assert(kChunk % kSteps == 0, "chunks begin with a slice");
constexpr float kLog2e = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;
constexpr int kCarryThreads = 128;

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

// ---- gates ----

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float square_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// e^-v. bfloat16 kernels have no time for more than the hardware's exponential; its error here,
/// 6e-8 |v|, is far below the rounding of v.
template <class T>
__device__ __forceinline__ float exp_minus(float v) {
  if constexpr (sizeof(T) == 2) return ex2(-kLog2e * v);
  return expf(-v);
}
template <class T>
__device__ __forceinline__ float sigmoid(float v) {
  return reciprocal(1.0F + exp_minus<T>(v));
}
/// The larger number, or NaN if one is.
__device__ __forceinline__ float larger(float x, float y) {
#if __CUDA_ARCH__ >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y ? y : x;
#endif
}
/// sig(v), and in `rest` 1 - sig(v) without cancellation.
template <class T>
__device__ __forceinline__ float sigmoid(float v, float& rest) {
  const float e = exp_minus<T>(larger(v, -80.0F));  // finite; sig(-80) is 0 beside anything
  const float s = reciprocal(1.0F + e);
  rest = e * s;
  return s;
}

/// a = 2^t and u = 1 - a, both to a few units of their own last place, for t <= 0. A multiplier
/// near 1 must not lose its distance from 1: sqrt(1 - a^2) = sqrt(u (2 - u)), and the rounding of
/// the hardware's exponential is not centred there.
__device__ __forceinline__ void decay(float t, float& a, float& u) {
  t = larger(t, -126.0F);
  const float shifted = t + 12582912.0F;  // 1.5 * 2^23: the last bits of the sum are rint(t)
  const float f = t - (shifted - 12582912.0F);
  // 2^f - 1 on [-1/2, 1/2], interpolated at Chebyshev nodes: 4e-8 of it in the mean.
  float p = fmaf(1.54531634e-4F, f, 1.33908633e-3F);
  p = fmaf(p, f, 9.61808302e-3F);
  p = fmaf(p, f, 5.55035695e-2F);
  p = fmaf(p, f, 2.40226507e-1F);
  p = fmaf(p, f, 6.93147182e-1F);
  p *= f;
  const float scale = __int_as_float((__float_as_int(shifted) << 23) + 0x3F800000);  // 2^rint(t)
  a = fmaf(scale, p, scale);
  u = fmaf(-scale, p, 1.0F - scale);
}

// ---- operands ----

template <class T>
struct Inputs {
  DeviceRows<const T> v, pre_r, pre_i;
  const float* a_log;
  const std::int32_t* lengths;
  float c;
  int channels;
  int seqlen;
  int chunks;  // of a sequence
  std::int64_t batch;

  __device__ int length(std::int64_t b) const {
    return lengths != nullptr ? min(lengths[b], seqlen) : seqlen;
  }
  /// log2 a at r = 1.
  __device__ float rate(int channel) const {
    const float x = a_log[channel];
    return -kLog2e * c * (fmaxf(-x, 0.0F) + log1pf(expf(-fabsf(x))));
  }
};

/// h = a h + b of one token and one channel.
template <class T>
__device__ __forceinline__ void token(float rate, float v, float pre_r, float pre_i, float& a,
                                      float& b) {
  float u;
  decay(rate * sigmoid<T>(pre_r), a, u);
  b = square_root(u * (2.0F - u)) * (sigmoid<T>(pre_i) * v);
}

template <class T>
Inputs<T> make_inputs(const RglruScanInputs& in) {
  const auto rows = [](TensorView t) {
    return DeviceRows<const T>{t.data<T>(), detail::row_stride(t)};
  };
  return {rows(in.v),
          rows(in.pre_r),
          rows(in.pre_i),
          in.a_log.data<float>(),
          in.lengths ? in.lengths.data<std::int32_t>() : nullptr,
          static_cast<float>(in.c),
          static_cast<int>(in.v.dim(2)),
          static_cast<int>(in.v.dim(1)),
          static_cast<int>(rglru_scan_chunks(in.v.dim(1))),
          in.v.dim(0)};
}

template <class T>
bool allows_pairs(const DeviceRows<T>& rows, std::int64_t channels) {
  return allows_vectors(rows.data, channels, rows.stride, 2);
}
/// Dense rows of states, float32.
inline bool allows_pairs(const float* states, std::int64_t channels) {
  return allows_vectors(states, channels, channels, 2);
}

// ---- placement ----

/// kParts slices of a warp, kSlices of a block, kTile tokens of a tile.
template <int kLanesOfRow, int kWarpsOfBlock>
struct Layout {
  static constexpr int kLanes = kLanesOfRow;
  static constexpr int kWarps = kWarpsOfBlock;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kParts = 32 / kLanes;
  static constexpr int kSlices = kParts * kWarps;
  static constexpr int kTile = kSlices * kSteps;
  static constexpr int kChannels = 2 * kLanes;
};

/// Parts of a sequence that run in parallel.
struct Segments {
  int count;
  int tokens;  // a multiple of the tile, and of the chunk
};

/// Enough segments for `wanted` blocks, of at least four tiles each: less is not worth a pass.
inline Segments make_segments(std::int64_t blocks, std::int64_t wanted, int seqlen, int tile) {
  const int tiles = (seqlen + tile - 1) / tile;
  const std::int64_t most = std::max(1, tiles / 4);
  const auto count =
      static_cast<int>(std::clamp<std::int64_t>((wanted + blocks - 1) / blocks, 1, most));
  const int per_segment = (tiles + count - 1) / count;
  return {(tiles + per_segment - 1) / per_segment, per_segment * tile};
}

template <class L>
std::int64_t channel_tiles(std::int64_t channels) {
  return (channels + L::kChannels - 1) / L::kChannels;
}

/// Where a thread works. Blocks count channel tiles fastest, then segments, then sequences.
template <class L>
struct Place {
  int warp, part, lane;
  int channel;  // the first of two
  bool exists;  // whether the first channel does, and the thread has a slice
  bool second;  // whether the second channel does
  int offset;   // first token of the slice in its tile
  int segment;
  int begin, end;  // tokens of the segment
  int b;
  std::int64_t first_row;  // of the sequence

  template <class T>
  __device__ Place(const Inputs<T>& p, const Segments& segments) {
    const int in_warp = static_cast<int>(threadIdx.x) % 32;
    warp = static_cast<int>(threadIdx.x) / 32;
    part = in_warp / L::kLanes;
    lane = in_warp % L::kLanes;
    offset = (warp * L::kParts + part) * kSteps;
    const unsigned tiles = static_cast<unsigned>((p.channels + L::kChannels - 1) / L::kChannels);
    channel = static_cast<int>(blockIdx.x % tiles) * L::kChannels + 2 * lane;
    exists = channel < p.channels && part < L::kParts;
    second = channel + 1 < p.channels;
    b = static_cast<int>(blockIdx.x / tiles) / segments.count;
    segment = static_cast<int>(blockIdx.x / tiles) % segments.count;
    begin = segment * segments.tokens;
    end = static_cast<int>(min(static_cast<std::int64_t>(p.seqlen),
                               static_cast<std::int64_t>(begin) + segments.tokens));
    first_row = static_cast<std::int64_t>(b) * p.seqlen;
  }
  /// Row of the block in [B, segments].
  __device__ std::int64_t row(const Segments& segments) const {
    return static_cast<std::int64_t>(b) * segments.count + segment;
  }
  /// Whether this is the thread that writes what a block has for a channel.
  __device__ bool writes() const { return exists && warp == 0 && part == 0; }
  /// Tokens of the slice in the tile at t0 that come before `limit`.
  __device__ int steps(int t0, int limit) const {
    return exists ? max(0, min(limit - (t0 + offset), kSteps)) : 0;
  }
  template <bool kVector>
  __device__ float2 load(const float* states, std::int64_t state_row, int channels) const {
    if (!exists) return {0.0F, 0.0F};
    return unpack(load_pair<kVector>(states + state_row * channels + channel, second));
  }
  template <bool kVector>
  __device__ void store(float* states, std::int64_t state_row, int channels, float2 v) const {
    store_pair<kVector>(states + state_row * channels + channel, v, second);
  }
};

/// What log2 a = rate r is made of; a missing channel never decays.
template <class L, class T>
__device__ float2 rates(const Inputs<T>& p, const Place<L>& at) {
  return {at.exists ? p.rate(at.channel) : 0.0F,
          at.exists && at.second ? p.rate(at.channel + 1) : 0.0F};
}

/// The tokens of a slice in one operand. Only the first address is a product: a chain of additions
/// takes two instructions per token, the products that the compiler prefers take six.
template <class T>
struct Column {
  T* p;
  std::int64_t stride;

  /// From the first token of the slice, or with `backward` from the last.
  template <class L>
  __device__ __forceinline__ Column(const DeviceRows<T>& rows, const Place<L>& at, int t0,
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

/// The slice of one operand. Tokens from `valid` on, which are not read, are `missing`.
template <bool kVector, class L, class T>
__device__ __forceinline__ void load_slice(Pair<T> (&out)[kSteps], const DeviceRows<const T>& rows,
                                           const Place<L>& at, int t0, int valid, float missing) {
  Column<const T> column(rows, at, t0);
  if (valid == kSteps) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) out[j] = load_pair<kVector>(column.next(), at.second);
    return;
  }
  const Pair<T> none = pack<T>({missing, missing});
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    const T* const p = column.next();
    out[j] = j < valid ? load_pair<kVector>(p, at.second) : none;
  }
}
/// A recurrence gate that makes a token leave the state as it is: r = 0, a = 1, 1 - a^2 = 0.
constexpr float kClosed = -INFINITY;

template <class L>
using Slots = float4[L::kWarps][L::kLanes];

/// Chains the maps of all slices. Returns what enters the slice of this thread when `carry` enters
/// the tile, and replaces `carry` by what leaves it; kReverse walks from the last slice to the
/// first. One barrier: `slots` may be written again after the next one. `product`, unless null, is
/// multiplied by the multipliers of the tile.
template <class L, bool kReverse>
__device__ __forceinline__ float2 chain(const Affine& own, float2& carry, Slots<L>& slots,
                                        const Place<L>& at, float2* product = nullptr) {
  constexpr unsigned kAll = 0xFFFFFFFFU;
  const int place = kReverse ? L::kParts - 1 - at.part : at.part;
  const auto from = [](float v, int parts) {
    const auto lanes = static_cast<unsigned>(parts * L::kLanes);
    return kReverse ? __shfl_down_sync(kAll, v, lanes) : __shfl_up_sync(kAll, v, lanes);
  };
  const auto earlier = [&](const Affine& m, int parts) {
    return Affine{{from(m.a.x, parts), from(m.a.y, parts)},
                  {from(m.b.x, parts), from(m.b.y, parts)}};
  };
  Affine up_to = own;  // of the slices of this warp up to this one
#pragma unroll
  for (int d = 1; d < L::kParts; d *= 2) {
    const Affine before = earlier(up_to, d);
    if (place >= d) up_to = up_to.after(before);
  }
  if (place == L::kParts - 1)
    slots[at.warp][at.lane] = make_float4(up_to.a.x, up_to.a.y, up_to.b.x, up_to.b.y);
  Affine before;
  if constexpr (L::kParts > 1) {
    before = earlier(up_to, 1);
    if (place == 0) before = Affine();
  }
  __syncthreads();
  float2 enters = carry;
#pragma unroll
  for (int i = 0; i < L::kWarps; ++i) {
    const int w = kReverse ? L::kWarps - 1 - i : i;
    if (w == at.warp) enters = carry;
    const float4 m = slots[w][at.lane];
    carry = Affine{{m.x, m.y}, {m.z, m.w}}(carry);
    if (product != nullptr) *product = {product->x * m.x, product->y * m.y};
  }
  return before(enters);
}

/// What enters each segment, from the maps (ends [B, segments, E]: multiplier, offset) of those
/// before it and `start` [B, E] (0 if null); `reverse` walks from the last segment to the first.
void chain_segments(Context& ctx, const float2* ends, const float* start, float* entering,
                    std::int64_t batch, int segments, int channels, bool reverse);

/// Writes the map of a segment.
template <class L>
__device__ void store_end(float2* ends, const Place<L>& at, const Segments& segments, int channels,
                          float2 product, float2 end) {
  float2* const p = ends + at.row(segments) * channels + at.channel;
  p[0] = {product.x, end.x};
  if (at.second) p[1] = {product.y, end.y};
}

}  // namespace lrnn::cuda::rglru
