// Forward, and the carries of both passes. Steps and ownership: common/diagonal_scan.cuh.
// Bound by memory: the drive is read twice (the second time mostly from L2) and x written once.
#include "lrnn/ops/diagonal_scan.hpp"

#include "common/check.cuh"
#include "common/diagonal_scan.cuh"

namespace lrnn::cuda {
namespace diagonal {
namespace {

template <class T>
struct ForwardArgs {
  Sizes sizes;
  MultiplierArgs multiplier;
  const std::int32_t* lengths;
  const float* gamma;
  const T* v;
  const float* starts;  // [B, S, 2, N]; state_in if there is one segment; null: 0
  T* x;
  float* state_out;
  float* chunk_states;
  float* ends;      // step 1
  float* products;  // step 1, event forms
};

// kEnds: step 1, which writes nothing but the end of the segment. Else step 3.
template <class T, bool kComplex, Form kForm, bool kEnds>
__global__ __launch_bounds__(kThreads) void diagonal_scan_forward_kernel(ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  const Place at(s, args.lengths);
  if (!at.exists || !at.active) return;
  if (kEnds && at.segment == s.segments - 1) return;  // nothing follows it
  constexpr bool kEvent = kForm != Form::Fixed;
  Multiplier<kForm> m(args.multiplier, s, at.lane);
  const float2 gamma =
      args.gamma == nullptr ? float2{1.0F, 0.0F} : load_pair(args.gamma, 0, s, at.lane);
  const std::int64_t first_token = at.batch * s.seqlen;
  float2 x{0.0F, 0.0F};
  float2 product{1.0F, 0.0F};
  if (!kEnds && args.starts != nullptr) x = load_pair(args.starts, at.row, s, at.lane);
  const std::int64_t last = kEnds ? at.end : at.stop;
  for (std::int64_t t0 = at.begin; t0 < last; t0 += kUnroll) {
    if (!kEnds && args.chunk_states != nullptr && t0 % kChunk == 0)
      store_pair(args.chunk_states, at.batch * s.chunks + t0 / kChunk, s, at.lane, x);
    float2 v[kUnroll];
    float tau[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (t0 + j >= at.end) continue;
      v[j] = load_drive<T, kComplex>(args.v, first_token + t0 + j, s, at.lane);
      if constexpr (kEvent) tau[j] = args.multiplier.tau[first_token + t0 + j];
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (t0 + j < at.end) {
        if constexpr (kEvent) m.set(tau[j]);
        x = m.advance(x, multiply(gamma, v[j]));
        if constexpr (kEvent && kEnds) product = multiply(product, m.a);
        if constexpr (!kEnds) store_pair(args.x, first_token + t0 + j, s, at.lane, x);
      } else if (!kEnds && t0 + j < at.stop) {
        store_pair(args.x, first_token + t0 + j, s, at.lane, {0.0F, 0.0F});
      }
    }
  }
  if constexpr (kEnds) {
    store_pair(args.ends, at.row, s, at.lane, x);
    if constexpr (kEvent) store_pair(args.products, at.row, s, at.lane, product);
  } else if (args.state_out != nullptr && at.holds_last) {
    store_pair(args.state_out, at.batch, s, at.lane, x);
  }
}

constexpr int kCarryLanes = 8;
constexpr int kCarryGroups = 64;
constexpr int kCarryAhead = 16;  // segments that are loaded before the chain needs them

struct Pair {
  double re;
  double im;
};
__device__ Pair operator*(Pair a, Pair b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ Pair operator+(Pair a, Pair b) {
  return {a.re + b.re, a.im + b.im};
}
__device__ Pair widen(float2 v) {
  return {static_cast<double>(v.x), static_cast<double>(v.y)};
}

__device__ Pair power(Pair base, std::int64_t exponent) {
  Pair result{1.0, 0.0};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = result * base;
    base = base * base;
  }
  return result;
}

// Walks the segments of one sequence and lane in the order of the recurrence. kProducts: every
// segment has a multiplier of its own.
template <bool kProducts>
struct Walk {
  const CarryArgs& args;
  std::int64_t first;  // element of planes [B, S, 2, N] of the first segment in this order
  std::int64_t step;   // from segment to segment
  std::int64_t plane;
  std::int64_t ends;  // segments that have an end and a product: nothing follows the last one
  Pair fixed{1.0, 0.0};

  __device__ Walk(const CarryArgs& a, std::int64_t batch, std::int64_t lane)
      : args(a),
        first((batch * a.sizes.segments + (a.reverse ? a.sizes.segments - 1 : 0)) * 2 *
                  a.sizes.lanes +
              lane),
        step(a.reverse ? -2 * a.sizes.lanes : 2 * a.sizes.lanes),
        plane(a.sizes.lanes),
        ends(a.sizes.segments - 1) {
    if constexpr (!kProducts) {
      Pair base = widen(load_pair(a.multiplier.a, 0, a.sizes, lane));
      if (a.multiplier.a_low != nullptr)
        base = base + widen(load_pair(a.multiplier.a_low, 0, a.sizes, lane));
      fixed = conjugate(power(base, a.sizes.segment_length));
    }
  }
  [[nodiscard]] __device__ Pair conjugate(Pair m) const {
    return {m.re, args.reverse ? -m.im : m.im};
  }

  // Calls f(element, multiplier, end) for segments [begin, last), in order.
  template <class F>
  __device__ void for_each(std::int64_t begin, std::int64_t last, F&& f) const {
    for (std::int64_t i = begin; i < last; i += kCarryAhead) {
      const std::int64_t at = first + i * step;
      float2 end[kCarryAhead];
      float2 product[kCarryAhead];
#pragma unroll
      for (int k = 0; k < kCarryAhead; ++k) {
        end[k] = {0.0F, 0.0F};
        product[k] = {1.0F, 0.0F};
        if (i + k >= min(last, ends)) continue;
        end[k] = {args.ends[at + k * step], args.ends[at + k * step + plane]};
        if constexpr (kProducts)
          product[k] = {args.products[at + k * step], args.products[at + k * step + plane]};
      }
#pragma unroll
      for (int k = 0; k < kCarryAhead; ++k) {
        if (i + k >= last) break;
        f(at + k * step, kProducts ? conjugate(widen(product[k])) : fixed, widen(end[k]));
      }
    }
  }
};

// A block owns kCarryLanes lanes of one sequence; thread (lane, group) owns a run of segments.
// Runs are reduced to one multiplier and one end, chained through shared memory by one thread per
// lane, and walked again from their carry. Bound by latency; in double, because it is short and the
// only place where rounding would travel along the whole sequence.
template <bool kProducts>
__global__ __launch_bounds__(kCarryLanes* kCarryGroups) void diagonal_scan_carry_kernel(
    CarryArgs args) {
  __shared__ Pair multipliers[kCarryGroups][kCarryLanes];
  __shared__ Pair carries[kCarryGroups][kCarryLanes];
  const Sizes& s = args.sizes;
  const std::int64_t tiles = (s.lanes + kCarryLanes - 1) / kCarryLanes;
  const std::int64_t batch = blockIdx.x / tiles;
  const int in_tile = static_cast<int>(threadIdx.x) % kCarryLanes;
  const int group = static_cast<int>(threadIdx.x) / kCarryLanes;
  const std::int64_t lane = blockIdx.x % tiles * kCarryLanes + in_tile;
  const bool active = lane < s.lanes;
  const std::int64_t loaded = min(lane, s.lanes - 1);
  const Walk<kProducts> walk(args, batch, loaded);
  const std::int64_t per_group = (s.segments + kCarryGroups - 1) / kCarryGroups;
  const std::int64_t first = min(group * per_group, s.segments);
  const std::int64_t last = min(first + per_group, s.segments);
  Pair total{1.0, 0.0};
  Pair carry{0.0, 0.0};
  walk.for_each(first, last, [&](std::int64_t, Pair m, Pair end) {
    carry = m * carry + end;
    total = m * total;
  });
  multipliers[group][in_tile] = total;
  carries[group][in_tile] = carry;
  __syncthreads();
  if (group == 0) {
    Pair state{0.0, 0.0};
    if (args.start != nullptr) state = widen(load_pair(args.start, batch, s, loaded));
    for (int g = 0; g < kCarryGroups; ++g) {
      const Pair next = multipliers[g][in_tile] * state + carries[g][in_tile];
      carries[g][in_tile] = state;
      state = next;
    }
  }
  __syncthreads();
  if (!active) return;
  Pair state = carries[group][in_tile];
  walk.for_each(first, last, [&](std::int64_t at, Pair m, Pair end) {
    args.carries[at] = static_cast<float>(state.re);
    args.carries[at + s.lanes] = static_cast<float>(state.im);
    state = m * state + end;
  });
}

template <class T, bool kComplex, Form kForm, bool kEnds>
void launch_forward(Context& ctx, const ForwardArgs<T>& args) {
  diagonal_scan_forward_kernel<T, kComplex, kForm, kEnds>
      <<<args.sizes.grid(), kThreads, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class T, bool kComplex, Form kForm>
void forward(Context& ctx, ForwardArgs<T> args) {
  const Sizes& s = args.sizes;
  if (s.segments == 1) return launch_forward<T, kComplex, kForm, false>(ctx, args);
  const Shape shape = {s.batch, s.segments, 2, s.lanes};
  Tensor ends = ctx.empty(shape, DType::float32);
  Tensor carries = ctx.empty(shape, DType::float32);
  Tensor products;
  if (kForm != Form::Fixed) products = ctx.empty(shape, DType::float32);
  args.ends = ends.view().data<float>();
  args.products = data_or_null<float>(products.view());
  launch_forward<T, kComplex, kForm, true>(ctx, args);
  launch_carry(ctx, {s, false, args.multiplier, args.products, args.ends, args.starts,
                     carries.view().data<float>()});
  args.starts = carries.view().data<float>();
  launch_forward<T, kComplex, kForm, false>(ctx, args);
}

}  // namespace

void launch_carry(Context& ctx, const CarryArgs& args) {
  const std::int64_t tiles = (args.sizes.lanes + kCarryLanes - 1) / kCarryLanes;
  const auto blocks = static_cast<unsigned>(args.sizes.batch * tiles);
  constexpr int kCarryThreads = kCarryLanes * kCarryGroups;
  const cudaStream_t stream = ctx.stream().handle;
  if (args.products != nullptr)
    diagonal_scan_carry_kernel<true><<<blocks, kCarryThreads, 0, stream>>>(args);
  else
    diagonal_scan_carry_kernel<false><<<blocks, kCarryThreads, 0, stream>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace diagonal

void diagonal_scan_forward(Context& ctx, const DiagonalScanForward& a) {
  using namespace diagonal;
  visit_float("diagonal_scan_forward", a.v.dtype(), [&]<class T>() {
    const ForwardArgs<T> args{Sizes(a.v),
                              MultiplierArgs(a.multiplier),
                              data_or_null<std::int32_t>(a.lengths),
                              data_or_null<float>(a.gamma),
                              a.v.data<T>(),
                              data_or_null<float>(a.state_in),
                              a.x.data<T>(),
                              data_or_null<float>(a.state_out),
                              data_or_null<float>(a.chunk_states),
                              nullptr,
                              nullptr};
    visit_form(form_of(a.multiplier), [&]<Form kForm>() {
      if (a.v.rank() == 4)
        forward<T, true, kForm>(ctx, args);
      else
        forward<T, false, kForm>(ctx, args);
    });
  });
}

}  // namespace lrnn::cuda
