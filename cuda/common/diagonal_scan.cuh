/// What the forward and backward kernels of diagonal_scan share.
///
/// Time is cut into chunks of kChunk tokens, whose entering states are kept for backward, and into
/// segments of whole chunks, which run in parallel. One thread owns one lane of one segment:
///   1. every segment from a zero state, to its end;   (not if there is one segment)
///   2. the carries from segment to segment;           (not if there is one segment)
///   3. every segment from its carry.
/// Step 2 keeps rounding from adding up along the sequence: a carry is rounded once per segment.
/// The number of segments depends on the sizes alone, so results do not depend on the device.
#pragma once

#include <algorithm>

#include "lrnn/ops/diagonal_scan.hpp"

#include "common/dtype.cuh"

namespace lrnn::cuda::diagonal {

constexpr int kThreads = 128;
constexpr int kChunk = static_cast<int>(kDiagonalScanChunk);
constexpr int kUnroll = 8;  // tokens loaded ahead of the recurrence; divides kChunk
// Enough threads to hide latency on any device; more segments would only cost carries.
constexpr std::int64_t kTargetThreads = std::int64_t{1} << 17;
constexpr std::int64_t kShortSequence = 128;  // not worth three launches
constexpr float kTwoPi = 6.283185307F;

struct Sizes {
  std::int64_t batch;
  std::int64_t seqlen;
  std::int64_t lanes;
  std::int64_t chunks;
  std::int64_t segments;
  std::int64_t segment_length;
  int tile;  // lanes side by side in a block: 8, 16 or 32
  int tile_log2;

  explicit Sizes(const TensorView& v) : Sizes(v.dim(0), v.dim(1), v.dim(-1)) {}
  Sizes(std::int64_t batch, std::int64_t seqlen, std::int64_t lanes)
      : batch(batch),
        seqlen(seqlen),
        lanes(lanes),
        chunks(diagonal_scan_chunks(seqlen)),
        tile_log2(lanes > 16  ? 5
                  : lanes > 8 ? 4
                              : 3) {
    tile = 1 << tile_log2;
    std::int64_t wanted = (kTargetThreads + batch * lanes - 1) / (batch * lanes);
    if (seqlen <= kShortSequence) wanted = 1;
    const std::int64_t most = std::min(wanted, chunks);
    const std::int64_t chunks_per_segment = (chunks + most - 1) / most;
    segments = (chunks + chunks_per_segment - 1) / chunks_per_segment;
    segment_length = chunks_per_segment * kChunk;
  }
  [[nodiscard]] __host__ __device__ std::int64_t rows() const { return batch * segments; }
  [[nodiscard]] std::int64_t tiles() const { return (lanes + tile - 1) / tile; }
  [[nodiscard]] dim3 grid() const {
    const std::int64_t per_block = kThreads / tile;
    return {static_cast<unsigned>((rows() + per_block - 1) / per_block),
            static_cast<unsigned>(tiles())};
  }
};

__device__ inline float2 operator+(float2 a, float2 b) {
  return {a.x + b.x, a.y + b.y};
}
__device__ inline float2 multiply(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
// a conj(b)
__device__ inline float2 multiply_conj(float2 a, float2 b) {
  return {fmaf(a.x, b.x, a.y * b.y), fmaf(a.y, b.x, -a.x * b.y)};
}

// What a thread owns. `row` counts the segments of all sequences; [begin, end) are the valid
// tokens of the segment, [end, stop) its padding.
struct Place {
  bool exists;
  bool active;  // whether the lane exists; if not, `lane` is the last one, to keep loads in bounds
  std::int64_t row;
  std::int64_t batch;
  std::int64_t segment;
  std::int64_t lane;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t stop;
  bool holds_last;  // whether the last valid token of the sequence is in the segment

  __device__ Place(const Sizes& s, const std::int32_t* lengths) {
    const int in_tile = static_cast<int>(threadIdx.x) & (s.tile - 1);
    row = static_cast<std::int64_t>(blockIdx.x) * (kThreads >> s.tile_log2) +
          (threadIdx.x >> s.tile_log2);
    lane = static_cast<std::int64_t>(blockIdx.y) * s.tile + in_tile;
    exists = row < s.batch * s.segments;
    active = lane < s.lanes;
    lane = min(lane, s.lanes - 1);
    if (!exists) return;
    batch = row / s.segments;
    segment = row % s.segments;
    const std::int64_t length = lengths == nullptr ? s.seqlen : lengths[batch];
    begin = segment * s.segment_length;
    stop = min(begin + s.segment_length, s.seqlen);
    end = max(begin, min(length, stop));
    holds_last = begin < length && length <= stop;
  }
};

// Element of a tensor [rows, 2, lanes].
__device__ inline float2 load_pair(const float* planes, std::int64_t row, const Sizes& s,
                                   std::int64_t lane) {
  const float* const p = planes + row * 2 * s.lanes + lane;
  return {p[0], p[s.lanes]};
}
template <class T>
__device__ void store_pair(T* planes, std::int64_t row, const Sizes& s, std::int64_t lane,
                           float2 value) {
  T* const p = planes + row * 2 * s.lanes + lane;
  p[0] = from_float<T>(value.x);
  p[s.lanes] = from_float<T>(value.y);
}
// The drive of one token. No __restrict__: dv may be v.
template <class T, bool kComplex>
__device__ float2 load_drive(const T* v, std::int64_t token, const Sizes& s, std::int64_t lane) {
  if constexpr (!kComplex) return {to_float(v[token * s.lanes + lane]), 0.0F};
  const T* const p = v + token * 2 * s.lanes + lane;
  return {to_float(p[0]), to_float(p[s.lanes])};
}

enum class Form { Fixed, EventExp, EventBilinear };

struct MultiplierArgs {
  const float* a;
  const float* a_low;
  const float* z;
  const float* tau;

  explicit MultiplierArgs(const ScanMultiplier& m)
      : a(m.a ? m.a.data<float>() : nullptr),
        a_low(m.a_low ? m.a_low.data<float>() : nullptr),
        z(m.z ? m.z.data<float>() : nullptr),
        tau(m.tau ? m.tau.data<float>() : nullptr) {}
};
inline Form form_of(const ScanMultiplier& m) {
  if (!m.z) return Form::Fixed;
  return m.event_bilinear ? Form::EventBilinear : Form::EventExp;
}

// The multiplier of one lane.
template <Form kForm>
struct Multiplier {
  static constexpr bool kEvent = kForm != Form::Fixed;

  float2 a{1.0F, 0.0F};
  float2 low{0.0F, 0.0F};    // Fixed: the rest of a
  float2 slope{0.0F, 0.0F};  // event: derivative of a by tau z
  float re_high = 0.0F, re_low = 0.0F, turns_high = 0.0F, turns_low = 0.0F;

  Multiplier() = default;
  __device__ Multiplier(const MultiplierArgs& m, const Sizes& s, std::int64_t lane) {
    if constexpr (kEvent) {
      re_high = m.z[lane];
      re_low = m.z[s.lanes + lane];
      turns_high = m.z[2 * s.lanes + lane];
      turns_low = m.z[3 * s.lanes + lane];
    } else {
      a = load_pair(m.a, 0, s, lane);
      if (m.a_low != nullptr) low = load_pair(m.a_low, 0, s, lane);
    }
  }

  // Moves to a position with relative time step `tau`.
  __device__ void set(float tau) {
    if constexpr (kForm == Form::EventExp) {
      // tau z to twice the precision of float: the angle may be hundreds of turns.
      const float re = tau * re_high;
      const float re_rest = fmaf(tau, re_high, -re) + tau * re_low;
      const float turns = tau * turns_high;
      const float turns_rest = fmaf(tau, turns_high, -turns) + tau * turns_low;
      const float magnitude = expf(re);
      const float r = fmaf(magnitude, re_rest, magnitude);
      float sine, cosine;
      sincospif(2.0F * ((turns - rintf(turns)) + turns_rest), &sine, &cosine);
      a = {r * cosine, r * sine};
      slope = a;
    } else if constexpr (kForm == Form::EventBilinear) {
      const float re = 0.5F * tau * re_high;
      const float im = 0.5F * kTwoPi * tau * turns_high;
      const float scale = 1.0F / fmaf(1.0F - re, 1.0F - re, im * im);
      const float2 r{(1.0F - re) * scale, im * scale};  // 1 / (1 - tau z / 2)
      a = {(1.0F - fmaf(re, re, im * im)) * scale, 2.0F * im * scale};
      slope = multiply(r, r);
    }
  }
  // a x + b
  __device__ float2 advance(float2 x, float2 b) const {
    if constexpr (!kEvent) {
      b.x = fmaf(low.x, x.x, fmaf(-low.y, x.y, b.x));
      b.y = fmaf(low.x, x.y, fmaf(low.y, x.x, b.y));
    }
    return {fmaf(a.x, x.x, fmaf(-a.y, x.y, b.x)), fmaf(a.x, x.y, fmaf(a.y, x.x, b.y))};
  }
  // conj(a) p
  __device__ float2 retreat(float2 p) const {
    float2 q = multiply_conj(p, a);
    if constexpr (!kEvent) q = q + multiply_conj(p, low);
    return q;
  }
  // z, for the gradient of tau
  __device__ float2 rate() const { return {re_high, kTwoPi * turns_high}; }
};

/// Step 2. Forward: carries[b, s] is the state that enters segment s, from the ends of the segments
/// before it and `start` [B, 2, N] (0 if null). Reverse: what enters segment s from the right, with
/// conjugate multipliers; `start` is null. The multiplier of a segment is a to the power
/// segment_length, or products [B, S, 2, N] if given.
struct CarryArgs {
  Sizes sizes;
  bool reverse;
  MultiplierArgs multiplier;
  const float* products;
  const float* ends;
  const float* start;
  float* carries;
};
void launch_carry(Context& ctx, const CarryArgs& args);

/// Calls f.operator()<kForm>().
template <class F>
void visit_form(Form form, F&& f) {
  switch (form) {
    case Form::Fixed:
      return f.template operator()<Form::Fixed>();
    case Form::EventExp:
      return f.template operator()<Form::EventExp>();
    case Form::EventBilinear:
      return f.template operator()<Form::EventBilinear>();
  }
}

template <class T>
T* data_or_null(const MutableTensorView& t) {
  return t ? t.data<T>() : nullptr;
}
template <class T>
const T* data_or_null(const TensorView& t) {
  return t ? t.data<T>() : nullptr;
}

}  // namespace lrnn::cuda::diagonal
