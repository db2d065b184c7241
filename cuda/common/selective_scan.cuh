/// What the forward and backward kernels of selective_scan share.
///
/// A block owns a tile of neighbouring channels of one segment of one sequence. kLanes lanes of a
/// warp hold the states of a channel, kStates each, in registers; neighbouring lanes hold
/// neighbouring channels, so that the lanes of a warp read few distinct addresses of B and C. Time
/// runs serially in tiles of steps, whose operands are staged in shared memory.
///
/// Few sequences and channels leave a GPU idle, so time is cut into segments of whole chunks:
///   1. every segment from a zero state, to its end (not if there is one segment);
///   2. every segment from what enters it: the ends of those before it, one after the other.
/// The number of segments depends on the sizes alone, so results do not depend on the device.
///
/// At padding, and behind the end of a sequence, delta = alpha = 0 and u = B = C = 0: the state
/// stays what it is.
#pragma once

#include <algorithm>

#include "lrnn/ops/selective_scan.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "common/transpose_add.cuh"

namespace lrnn::cuda::selective {

using Disc = SelectiveDiscretization;

constexpr int kChunk = static_cast<int>(kSelectiveScanChunk);
constexpr float kLog2e = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;

/// Which threads own which channels and states: kLanes x kStates >= N, kChannels per block.
template <int kLanes_, int kStates_, int kChannels_>
struct Layout {
  static constexpr int kLanes = kLanes_;
  static constexpr int kStates = kStates_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kN = kLanes * kStates;   ///< N rounded up; the rest is zero
  static constexpr int kPerWarp = 32 / kLanes;  ///< channels of a warp
  static constexpr int kWarps = kChannels / kPerWarp;
  static constexpr int kThreads = 32 * kWarps;

  static __device__ int part_of(int thread) { return thread % 32 / kPerWarp; }
  static __device__ int channel_of(int thread) {
    return thread / 32 * kPerWarp + thread % kPerWarp;
  }
};

struct Sizes {
  int batch;
  int seqlen;
  int channels;
  int dstate;
  int chunks;
  int tiles;  // of channels
  int segments;
  int segment_length;

  Sizes(const SelectiveScanInputs& in, int channels_per_block, int warps_per_block)
      : batch(static_cast<int>(in.u.dim(0))),
        seqlen(static_cast<int>(in.u.dim(1))),
        channels(static_cast<int>(in.u.dim(2))),
        dstate(static_cast<int>(in.A_log.dim(1))),
        chunks(static_cast<int>(selective_scan_chunks(seqlen))),
        tiles((channels + channels_per_block - 1) / channels_per_block) {
    // Enough warps to hide latency on any device.
    constexpr std::int64_t kTargetWarps = 1536;
    const std::int64_t warps = std::int64_t{batch} * tiles * warps_per_block;
    cut((kTargetWarps + warps - 1) / warps);
  }
  /// Cuts time into about `wanted` segments. Two would only double the work.
  void cut(std::int64_t wanted) {
    constexpr std::int64_t kShortest = 256 / kChunk;  // chunks of a segment
    const auto most = static_cast<int>(std::min<std::int64_t>(wanted, chunks / kShortest));
    const int per_segment = most < 3 ? chunks : (chunks + most - 1) / most;
    segments = (chunks + per_segment - 1) / per_segment;
    segment_length = per_segment * kChunk;
  }
  [[nodiscard]] unsigned blocks(int of_segments) const {
    return static_cast<unsigned>(std::int64_t{batch} * of_segments * tiles);
  }
  [[nodiscard]] Shape carry_shape() const { return {batch, segments, channels, dstate}; }
};

/// Operands of all passes.
template <class T>
struct Operands {
  Sizes sizes;
  Disc discretization;
  DeviceRows<const T> u, dt, B, C, z;
  const float* dt_bias;
  const float* A_log;
  const float* D;         // may be null
  const float* tau;       // null: no event mode
  const float* dtA_bias;  // event mode
  const std::int32_t* lengths;
  bool wide_channels;  // u, dt, z and what is written beside them allow 16-byte accesses
  bool wide_states;    // so do B and C

  Operands(const SelectiveScanInputs& in, const Sizes& s)
      : sizes(s),
        discretization(in.discretization),
        u(device_rows<T>(in.u)),
        dt(in.dt ? device_rows<T>(in.dt) : DeviceRows<const T>{nullptr, 0}),
        B(device_rows<T>(in.B)),
        C(device_rows<T>(in.C)),
        z(in.z ? device_rows<T>(in.z) : DeviceRows<const T>{nullptr, 0}),
        dt_bias(in.dt_bias.data<float>()),
        A_log(in.A_log.data<float>()),
        D(in.D ? in.D.data<float>() : nullptr),
        tau(in.integration_timesteps ? in.integration_timesteps.data<float>() : nullptr),
        dtA_bias(in.dtA_bias ? in.dtA_bias.data<float>() : nullptr),
        lengths(in.lengths ? in.lengths.data<std::int32_t>() : nullptr),
        wide_channels(wide(u, s.channels) && wide(dt, s.channels) && wide(z, s.channels)),
        wide_states(wide(B, s.dstate) && wide(C, s.dstate)) {}

  template <class U>
  static bool wide(const DeviceRows<U>& r, std::int64_t width) {
    return allows_vectors(r.data, width, r.stride, kWide<T>);
  }
};

template <class T>
T* data_or_null(const MutableTensorView& t) {
  return t ? t.data<T>() : nullptr;
}
template <class T>
const T* data_or_null(const TensorView& t) {
  return t ? t.data<T>() : nullptr;
}

/// What a block and a thread own. [begin, stop) are the positions of the segment, of which those
/// before `length` are valid.
template <class L>
struct Place {
  int tile;
  int batch;
  int segment;
  int begin;
  int stop;
  int length;
  std::int64_t first_row;  // row of position 0
  int part;                // which states of the channel
  int local;               // channel in the tile
  int channel;
  bool active;  // whether the channel exists

  __device__ Place(const Sizes& s, const std::int32_t* lengths, int segments, int first_block = 0) {
    const int block = first_block + static_cast<int>(blockIdx.x);
    tile = block % s.tiles;
    batch = block / s.tiles / segments;
    move_to(s, block / s.tiles % segments);
    length = lengths == nullptr ? s.seqlen : lengths[batch];
    first_row = std::int64_t{batch} * s.seqlen;
    part = L::part_of(static_cast<int>(threadIdx.x));
    local = L::channel_of(static_cast<int>(threadIdx.x));
    channel = tile * L::kChannels + local;
    active = channel < s.channels;
  }
  __device__ void move_to(const Sizes& s, int to_segment) {
    segment = to_segment;
    begin = segment * s.segment_length;
    stop = min(begin + s.segment_length, s.seqlen);
  }
  /// Index of the states of this segment in [B, S, E, N].
  __device__ std::int64_t state_row(const Sizes& s) const {
    return (std::int64_t{batch} * s.segments + segment) * s.channels + channel;
  }
};

__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
/// exp(delta A), A times log2(e). ex2.approx falls short of a power near 1 by 2e-8 to 5e-8 of it,
/// which a state adds up over all that it remembers; the bias undoes most of that, and a product of
/// zero still gives 1.
__device__ __forceinline__ float decay(float delta, float A) {
  return exp2_approx(fmaf(delta, A, 2.9e-8F));
}
__device__ __forceinline__ float fast_sigmoid(float v) {
  return __fdividef(1.0F, 1.0F + __expf(-v));
}

/// max(x, 0) + log1p(e), e = exp(-|x|), by log1p(e) = 2 atanh(s), s = e / (2 + e): a polynomial in
/// s^2 <= 1/9 with relative error 4e-9, also where e is small and log(1 + e) would cancel.
__device__ __forceinline__ float softplus(float x) {
  const float e = expf(-fabsf(x));
  const float s = __fdividef(e, 2.0F + e);
  const float w = s * s;
  float p = fmaf(w, 0.281577784F, 0.279651577F);
  p = fmaf(p, w, 0.400245952F);
  p = fmaf(p, w, 0.666663216F);
  p = fmaf(p, w, 2.0F);
  return fmaf(p, s, fmaxf(x, 0.0F));
}

/// max(x, 0) + log1p(e), e = exp(-|x|): one exponential, the rest multiply-adds. log1p(e) / e is a
/// polynomial on [0, 1] with relative error 3e-8, for x in bfloat16 1.3e-6. In float the error of
/// the argument of ex2 is undone to first order, since e may be all there is of the result.
template <class T>
__device__ __forceinline__ float softplus_of_step(float x) {
  const float exponent = -kLog2e * fabsf(x);
  float e = exp2_approx(exponent);
  float p;
  if constexpr (std::is_same_v<T, float>) {
    e = fmaf(e, kLn2 * fmaf(-kLog2e, fabsf(x), -exponent), e);
    p = fmaf(e, 0.00523269083F, -0.0295052286F);
    p = fmaf(p, e, 0.0782259479F);
    p = fmaf(p, e, -0.136632457F);
    p = fmaf(p, e, 0.191060081F);
    p = fmaf(p, e, -0.24842982F);
    p = fmaf(p, e, 0.333190978F);
    p = fmaf(p, e, -0.499994934F);
    p = fmaf(p, e, 0.99999994F);
  } else {
    p = fmaf(e, 0.0141405311F, -0.0664003178F);
    p = fmaf(p, e, 0.149222202F);
    p = fmaf(p, e, -0.235037732F);
    p = fmaf(p, e, 0.331094284F);
    p = fmaf(p, e, -0.499869639F);
    p = fmaf(p, e, 0.999998731F);
  }
  return fmaf(p, e, fmaxf(x, 0.0F));
}

/// kCount floats of shared memory, aligned to 16 bytes.
template <int kCount>
__device__ __forceinline__ void read_shared(const float* p, float (&v)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 q = *reinterpret_cast<const float4*>(p + i);
    v[i] = q.x;
    v[i + 1] = q.y;
    v[i + 2] = q.z;
    v[i + 3] = q.w;
  }
}
template <int kCount>
__device__ __forceinline__ void write_shared(float* p, const float (&v)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

/// States of the calling thread in a tensor [.., E, N], at channel row `row`.
template <class L>
__device__ __forceinline__ void read_states(const float* base, std::int64_t row, const Place<L>& at,
                                            int dstate, float (&h)[L::kStates]) {
#pragma unroll
  for (int i = 0; i < L::kStates; ++i) {
    const int n = at.part * L::kStates + i;
    h[i] = base != nullptr && at.active && n < dstate ? base[row * dstate + n] : 0.0F;
  }
}
template <class L>
__device__ __forceinline__ void write_states(float* base, std::int64_t row, const Place<L>& at,
                                             int dstate, const float (&h)[L::kStates]) {
  if (!at.active) return;
  const int first = at.part * L::kStates;
  float* const p = base + row * dstate + first;
  if (dstate == L::kN && reinterpret_cast<std::uintptr_t>(base) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < L::kStates; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < L::kStates; ++i)
    if (first + i < dstate) p[i] = h[i];
}

__device__ __forceinline__ float A_of(const float* A_log, std::int64_t i) {
  return -expf(A_log[i]);
}
/// A of the states of the calling thread, times `scale`; 0 where there is none.
template <class L>
__device__ __forceinline__ void read_A(const float* A_log, const Place<L>& at, int dstate,
                                       float scale, float (&A)[L::kStates]) {
#pragma unroll
  for (int i = 0; i < L::kStates; ++i) {
    const int n = at.part * L::kStates + i;
    A[i] = at.active && n < dstate ? scale * A_of(A_log, at.channel * dstate + n) : 0.0F;
  }
}

__device__ __forceinline__ void copy_16_bytes_async(void* to_shared, const void* from,
                                                    bool exists) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  const int bytes = exists ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(to_shared) =
      exists ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}
__device__ __forceinline__ void prefetch_to_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// Calls f(i) for i in [0, kCount), spread over the threads of a block. The number of turns is
/// known at compile time: the kernels consist of many such loops, and their code has to stay in the
/// instruction cache.
template <int kCount, int kThreads, class F>
__device__ __forceinline__ void for_items(F&& f) {
  constexpr int kTurns = kCount / kThreads;
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < kTurns; ++k) f(thread + k * kThreads);
  if constexpr (kCount % kThreads != 0) {
    const int i = thread + kTurns * kThreads;
    if (i < kCount) f(i);
  }
}

/// Copies rows [row, row + kRows) and columns [column, column + kWidth) to shared memory. Rows from
/// `rows` and columns from `columns` on are zero.
template <int kRows, int kWidth, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const DeviceRows<const T>& from,
                                          std::int64_t row, int rows, int column, int columns,
                                          bool wide) {
  constexpr int kVec = kWide<T>;
  if constexpr (kWidth % kVec == 0) {
    if (wide) {
      constexpr int kPerRow = kWidth / kVec;
      for_items<kRows * kPerRow, kThreads>([&](int i) {
        const int r = i / kPerRow;
        const int c = i % kPerRow * kVec;
        const bool exists = r < rows && column + c < columns;
        copy_16_bytes_async(tile + i * kVec, exists ? from.row(row + r) + column + c : from.data,
                            exists);
      });
      return;
    }
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kWidth; i += kThreads) {
    const int r = i / kWidth;
    const int c = i % kWidth;
    tile[i] =
        r < rows && column + c < columns ? from.row(row + r)[column + c] : from_float<T>(0.0F);
  }
}

/// Writes a tile back: rows before `rows`, of which those from `valid` on become zero.
template <int kRows, int kWidth, int kThreads, class T>
__device__ __forceinline__ void store_tile(const T* tile, const DeviceRows<T>& to, std::int64_t row,
                                           int rows, int valid, int column, int columns,
                                           bool wide) {
  constexpr int kVec = kWide<T>;
  if constexpr (kWidth % kVec == 0) {
    if (wide) {
      constexpr int kPerRow = kWidth / kVec;
      for_items<kRows * kPerRow, kThreads>([&](int i) {
        const int r = i / kPerRow;
        const int c = i % kPerRow * kVec;
        if (r >= rows || column + c >= columns) return;
        *reinterpret_cast<uint4*>(to.row(row + r) + column + c) =
            r < valid ? *reinterpret_cast<const uint4*>(tile + i * kVec) : make_uint4(0, 0, 0, 0);
      });
      return;
    }
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kWidth; i += kThreads) {
    const int r = i / kWidth;
    const int c = i % kWidth;
    if (r < rows && column + c < columns)
      to.row(row + r)[column + c] = r < valid ? tile[i] : from_float<T>(0.0F);
  }
}

/// Hints that a tile will be loaded soon.
template <int kRows, int kWidth, int kThreads, class T>
__device__ __forceinline__ void prefetch_tile(const DeviceRows<const T>& from, std::int64_t row,
                                              int column, int columns) {
  constexpr int kPerRow =
      (kWidth * static_cast<int>(sizeof(T)) + 127) / 128;  // lines, if rows are aligned
  constexpr int kStep = 128 / static_cast<int>(sizeof(T));
  for_items<kRows * kPerRow, kThreads>([&](int i) {
    const int c = column + i % kPerRow * kStep;
    if (c < columns) prefetch_to_l2(from.row(row + i / kPerRow) + c);
  });
}

/// float copy of a tile of T.
template <int kCount, int kThreads, class T>
__device__ __forceinline__ void widen_tile(const T* tile, float* out) {
  static_assert(kCount % 4 == 0);
  for_items<kCount / 4, kThreads>([&](int i) {
    float v[4];
    load_vec<T, 4>(tile + 4 * i, v);
    write_shared<4>(out + 4 * i, v);
  });
}

/// a(alpha, A) and k(delta, A) of any discretization.
struct GeneralRule {
  Disc disc;

  __device__ __forceinline__ float multiplier(float alpha, float A) const {
    if (disc != Disc::Bilinear) return expf(alpha * A);
    const float v = 0.5F * alpha * A;
    return (1.0F + v) / (1.0F - v);
  }
  __device__ __forceinline__ float factor(float delta, float A) const {
    switch (disc) {
      case Disc::Mamba:
        return delta;
      case Disc::Zoh:
        return A == 0.0F ? delta : expm1f(delta * A) / A;
      case Disc::Bilinear:
        return delta / (1.0F - 0.5F * delta * A);
      default:
        return 1.0F;
    }
  }
};

/// Whether the inputs ask for more than the discretization of Mamba without event mode.
inline bool is_general(const SelectiveScanInputs& in) {
  return in.integration_timesteps || in.discretization != Disc::Mamba;
}
/// Calls f.operator()<kGeneral>().
template <class F>
void visit_rule(bool general, F&& f) {
  if (general)
    f.template operator()<true>();
  else
    f.template operator()<false>();
}

/// Limits of the kernels: states of a channel in the lanes of a warp, sizes and blocks in int.
inline void check_limits(const char* op, const SelectiveScanInputs& in) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const std::int64_t dstate = in.A_log.dim(1);
  LRNN_CHECK(dstate <= 256, ShapeError, op, ": A_log: CUDA holds at most 256 states, got ", dstate);
  LRNN_CHECK(in.u.dim(1) <= kMost && in.u.dim(0) * in.u.dim(2) <= kMost, ShapeError, op,
             ": u: CUDA takes at most 2^30 positions and 2^30 channels of all sequences, got ",
             in.u.shape());
}

/// What enters the segments: `first` [B, E, N] (0 if null) if there is one. Else [B, S, E, N]: a
/// copy of `first`, which may be overwritten meanwhile, and behind it in the direction of the walk
/// `multipliers` times what entered the segment before, plus `ends`.
struct Starts {
  const float* first;
  const float* ends;
  const float* multipliers;

  /// Of the segment that has `before` ones before it; `step` is to the next one.
  template <class L>
  __device__ void read(const Sizes& s, const Place<L>& at, int before, int step,
                       float (&h)[L::kStates]) const {
    if (ends == nullptr)
      return read_states<L>(first, std::int64_t{at.batch} * s.channels + at.channel, at, s.dstate,
                            h);
    const std::int64_t pace = std::int64_t{step} * s.channels;
    read_states<L>(ends, at.state_row(s) - before * pace, at, s.dstate, h);
#pragma unroll 4
    for (int k = before - 1; k >= 0; --k) {
      float end[L::kStates];
      float multiplier[L::kStates];
      read_states<L>(ends, at.state_row(s) - k * pace, at, s.dstate, end);
      read_states<L>(multipliers, at.state_row(s) - k * pace, at, s.dstate, multiplier);
#pragma unroll
      for (int i = 0; i < L::kStates; ++i) h[i] = fmaf(multiplier[i], h[i], end[i]);
    }
  }
};

/// Step 1, of the states, or if dy is given of their gradients, which walk from the right.
struct SegmentEnds {
  Tensor ends;  // absent if there is one segment
  Tensor multipliers;
  const float* first;

  [[nodiscard]] Starts starts() const {
    return {first, data_or_null<float>(ends.view()), data_or_null<float>(multipliers.view())};
  }
};
template <class T, bool kGeneral>
SegmentEnds segment_ends(Context& ctx, const Operands<T>& in, DeviceRows<const T> dy,
                         const float* first);

}  // namespace lrnn::cuda::selective
