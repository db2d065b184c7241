// Backward: steps and ownership as in common/diagonal_scan.cuh, from right to left. Step 3 is
// fused: per chunk the states are recomputed into shared memory, then the adjoints walk back over
// them; gradients of what all tokens share stay in registers. Bound by memory: dx is read twice,
// the drive twice (the second time from L1), dv and x are written once.
#include "lrnn/ops/diagonal_scan.hpp"

#include "common/check.cuh"
#include "common/diagonal_scan.cuh"

namespace lrnn::cuda {
namespace diagonal {
namespace {

template <class T>
struct BackwardArgs {
  Sizes sizes;
  MultiplierArgs multiplier;
  const std::int32_t* lengths;
  const float* gamma;
  const T* dx;
  const T* v;
  const float* chunk_states;
  const float* dstate_out;
  T* dv;
  T* x;                  // may be null
  float* dstate_in;      // may be null
  float* ends;           // step 1
  float* products;       // step 1, event forms
  const float* carries;  // step 3; null with one segment
  float* partial;        // [B S, 4, N]: multiplier (re, im), gamma (re, im)
  float* dtau;           // [tiles, B, L]; may be null
};

__device__ inline std::int64_t last_group(std::int64_t begin, std::int64_t end) {
  return begin + (end - begin - 1) / kUnroll * kUnroll;
}

// What enters a segment from the right: nothing in step 1, the carry in step 3, and the gradient
// of the final state behind the last valid token.
template <class T>
__device__ float2 entering(const BackwardArgs<T>& args, const Place& at) {
  float2 carry{0.0F, 0.0F};
  if (args.carries != nullptr) carry = load_pair(args.carries, at.row, args.sizes, at.lane);
  if (args.dstate_out != nullptr && at.holds_last)
    carry = carry + load_pair(args.dstate_out, at.batch, args.sizes, at.lane);
  return carry;
}

template <class T>
__device__ float2 load_dx(const BackwardArgs<T>& args, std::int64_t token, std::int64_t lane) {
  return load_drive<T, true>(args.dx, token, args.sizes, lane);
}

// Step 1: what leaves a segment to the left when nothing enters it.
template <class T, Form kForm>
__global__ __launch_bounds__(kThreads) void diagonal_scan_backward_ends_kernel(
    BackwardArgs<T> args) {
  const Sizes& s = args.sizes;
  const Place at(s, args.lengths);
  if (!at.exists || !at.active || at.segment == 0) return;
  Multiplier<kForm> m(args.multiplier, s, at.lane);
  const std::int64_t first_token = at.batch * s.seqlen;
  float2 carry = entering(args, at);
  float2 product{1.0F, 0.0F};
  for (std::int64_t t0 = last_group(at.begin, at.end); t0 >= at.begin; t0 -= kUnroll) {
    if (at.begin == at.end) break;
    float2 dx[kUnroll];
    float tau[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (t0 + j >= at.end) continue;
      dx[j] = load_dx(args, first_token + t0 + j, at.lane);
      if constexpr (m.kEvent) tau[j] = args.multiplier.tau[first_token + t0 + j];
    }
#pragma unroll
    for (int j = kUnroll - 1; j >= 0; --j) {
      if (t0 + j >= at.end) continue;
      if constexpr (m.kEvent) {
        m.set(tau[j]);
        product = multiply(product, m.a);
      }
      carry = m.retreat(dx[j] + carry);
    }
  }
  store_pair(args.ends, at.row, s, at.lane, carry);
  if constexpr (m.kEvent) store_pair(args.products, at.row, s, at.lane, product);
}

template <class T, bool kComplex>
__device__ void store_dv(const BackwardArgs<T>& args, std::int64_t token, std::int64_t lane,
                         float2 value) {
  if constexpr (kComplex)
    store_pair(args.dv, token, args.sizes, lane, value);
  else
    args.dv[token * args.sizes.lanes + lane] = from_float<T>(value.x);
}

// Sum over the threads of a tile within a warp, which share their control flow.
__device__ inline float tile_sum(float value, int tile) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned ones = tile == 32 ? 0xFFFFFFFFU : (1U << tile) - 1U;
  const unsigned mask = ones << (lane / static_cast<unsigned>(tile) * static_cast<unsigned>(tile));
  for (int offset = tile / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(mask, value, offset, tile);
  return value;
}

// Step 3. `before[j][i]` is the state that enters token j of the chunk of thread i: every thread
// uses its own column, so no barriers.
template <class T, bool kComplex, Form kForm>
__global__ __launch_bounds__(kThreads) void diagonal_scan_backward_kernel(BackwardArgs<T> args) {
  __shared__ float2 before[kChunk][kThreads];
  const Sizes& s = args.sizes;
  const Place at(s, args.lengths);
  if (!at.exists) return;
  constexpr bool kEvent = kForm != Form::Fixed;
  if (!kEvent && !at.active) return;  // event forms shuffle
  Multiplier<kForm> m(args.multiplier, s, at.lane);
  const float2 gamma =
      args.gamma == nullptr ? float2{1.0F, 0.0F} : load_pair(args.gamma, 0, s, at.lane);
  const std::int64_t first_token = at.batch * s.seqlen;
  const int column = static_cast<int>(threadIdx.x);
  float2 carry = entering(args, at);
  float2 dmultiplier{0.0F, 0.0F};
  float2 dgamma{0.0F, 0.0F};

  for (std::int64_t t = at.end; t < at.stop && at.active; ++t) {
    store_dv<T, kComplex>(args, first_token + t, at.lane, {0.0F, 0.0F});
    if (args.x != nullptr) store_pair(args.x, first_token + t, s, at.lane, {0.0F, 0.0F});
  }
  const std::int64_t valid_chunks = (at.end - at.begin + kChunk - 1) / kChunk;
  for (std::int64_t c = valid_chunks - 1; c >= 0; --c) {
    const std::int64_t begin = at.begin + c * kChunk;
    const std::int64_t end = min(begin + kChunk, at.end);
    float2 x = load_pair(args.chunk_states, at.batch * s.chunks + begin / kChunk, s, at.lane);
    for (std::int64_t t0 = begin; t0 < end; t0 += kUnroll) {
      float2 v[kUnroll];
      float tau[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (t0 + j >= end) continue;
        v[j] = load_drive<T, kComplex>(args.v, first_token + t0 + j, s, at.lane);
        if constexpr (kEvent) tau[j] = args.multiplier.tau[first_token + t0 + j];
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (t0 + j >= end) continue;
        before[t0 - begin + j][column] = x;
        if constexpr (kEvent) m.set(tau[j]);
        x = m.advance(x, multiply(gamma, v[j]));
        if (args.x != nullptr && at.active) store_pair(args.x, first_token + t0 + j, s, at.lane, x);
      }
    }
    // Sums of a chunk first: two short sums round less than one long one.
    float2 chunk_dmultiplier{0.0F, 0.0F};
    float2 chunk_dgamma{0.0F, 0.0F};
    for (std::int64_t t0 = last_group(begin, end); t0 >= begin; t0 -= kUnroll) {
      float2 dx[kUnroll];
      float2 v[kUnroll];
      float tau[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (t0 + j >= end) continue;
        dx[j] = load_dx(args, first_token + t0 + j, at.lane);
        v[j] = load_drive<T, kComplex>(args.v, first_token + t0 + j, s, at.lane);
        if constexpr (kEvent) tau[j] = args.multiplier.tau[first_token + t0 + j];
      }
#pragma unroll
      for (int j = kUnroll - 1; j >= 0; --j) {
        if (t0 + j >= end) continue;
        if constexpr (kEvent) m.set(tau[j]);
        const float2 p = dx[j] + carry;
        carry = m.retreat(p);
        const float2 da = multiply_conj(p, before[t0 - begin + j][column]);
        if constexpr (kEvent) {
          const float2 dw = multiply_conj(da, m.slope);
          chunk_dmultiplier.x = fmaf(tau[j], dw.x, chunk_dmultiplier.x);
          chunk_dmultiplier.y = fmaf(tau[j], dw.y, chunk_dmultiplier.y);
          if (args.dtau != nullptr) {
            const float2 z = m.rate();
            const float sum = tile_sum(at.active ? fmaf(dw.x, z.x, dw.y * z.y) : 0.0F, s.tile);
            if ((threadIdx.x & (s.tile - 1)) == 0)
              args.dtau[blockIdx.y * s.batch * s.seqlen + first_token + t0 + j] = sum;
          }
        } else {
          chunk_dmultiplier = chunk_dmultiplier + da;
        }
        chunk_dgamma = chunk_dgamma + multiply_conj(p, v[j]);
        if (at.active)
          store_dv<T, kComplex>(args, first_token + t0 + j, at.lane, multiply_conj(p, gamma));
      }
    }
    dmultiplier = dmultiplier + chunk_dmultiplier;
    dgamma = dgamma + chunk_dgamma;
  }
  if (!at.active) return;
  store_pair(args.partial, 2 * at.row, s, at.lane, dmultiplier);
  store_pair(args.partial, 2 * at.row + 1, s, at.lane, dgamma);
  if (args.dstate_in != nullptr && at.segment == 0)
    store_pair(args.dstate_in, at.batch, s, at.lane, carry);
}

constexpr int kSumLanes = 8;
constexpr int kSumGroups = 64;

struct SumArgs {
  Sizes sizes;
  MultiplierArgs multiplier;
  const float* partial;
  float* da;
  float* dlog_a;
  float* dz;
  float* dgamma;
};

__device__ void add_pair(float* planes, const Sizes& s, std::int64_t lane, double re, double im) {
  if (planes == nullptr) return;
  planes[lane] += static_cast<float>(re);
  planes[s.lanes + lane] += static_cast<float>(im);
}

// A block owns kSumLanes lanes of the gradient of the multiplier (blockIdx.y 0) or of gamma (1);
// thread (lane, group) sums rows group, group + kSumGroups, ... Bound by latency.
// dlog_a is conj(a) da, because a is the same at every token.
__global__ __launch_bounds__(kSumLanes* kSumGroups) void diagonal_scan_sum_kernel(SumArgs args) {
  __shared__ double sums[2][kSumGroups][kSumLanes];
  const Sizes& s = args.sizes;
  const int in_tile = static_cast<int>(threadIdx.x) % kSumLanes;
  const int group = static_cast<int>(threadIdx.x) / kSumLanes;
  const std::int64_t lane = static_cast<std::int64_t>(blockIdx.x) * kSumLanes + in_tile;
  const bool active = lane < s.lanes;
  double sum[2] = {0.0, 0.0};
  if (active) {
#pragma unroll 8
    for (std::int64_t row = group; row < s.rows(); row += kSumGroups) {
      const float2 v = load_pair(args.partial, 2 * row + blockIdx.y, s, lane);
      sum[0] += static_cast<double>(v.x);
      sum[1] += static_cast<double>(v.y);
    }
  }
  for (int i = 0; i < 2; ++i) sums[i][group][in_tile] = sum[i];
  __syncthreads();
  for (int half = kSumGroups / 2; half > 0; half /= 2) {
    if (group < half)
      for (int i = 0; i < 2; ++i) sums[i][group][in_tile] += sums[i][group + half][in_tile];
    __syncthreads();
  }
  if (group != 0 || !active) return;
  const double re = sums[0][0][in_tile];
  const double im = sums[1][0][in_tile];
  if (blockIdx.y == 1) return add_pair(args.dgamma, s, lane, re, im);
  add_pair(args.da, s, lane, re, im);
  add_pair(args.dz, s, lane, re, im);
  if (args.dlog_a == nullptr) return;
  float2 low{0.0F, 0.0F};
  if (args.multiplier.a_low != nullptr) low = load_pair(args.multiplier.a_low, 0, s, lane);
  const float2 a = load_pair(args.multiplier.a, 0, s, lane);
  const double a_re = static_cast<double>(a.x) + static_cast<double>(low.x);
  const double a_im = static_cast<double>(a.y) + static_cast<double>(low.y);
  add_pair(args.dlog_a, s, lane, re * a_re + im * a_im, im * a_re - re * a_im);
}

// One thread owns one token.
__global__ __launch_bounds__(kThreads) void diagonal_scan_dtau_kernel(
    Sizes s, const std::int32_t* __restrict__ lengths, const float* __restrict__ partial,
    float* __restrict__ dtau) {
  const std::int64_t tokens = s.batch * s.seqlen;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  float sum = 0.0F;
  if (lengths == nullptr || token % s.seqlen < lengths[token / s.seqlen])
    for (std::int64_t tile = 0; tile < (s.lanes + s.tile - 1) / s.tile; ++tile)
      sum += partial[tile * tokens + token];
  dtau[token] = sum;
}

template <class T, bool kComplex, Form kForm>
void backward(Context& ctx, BackwardArgs<T> args) {
  const Sizes& s = args.sizes;
  Tensor ends, carries, products;
  if (s.segments > 1) {
    const Shape shape = {s.batch, s.segments, 2, s.lanes};
    ends = ctx.empty(shape, DType::float32);
    carries = ctx.empty(shape, DType::float32);
    if (kForm != Form::Fixed) products = ctx.empty(shape, DType::float32);
    args.ends = ends.view().data<float>();
    args.products = data_or_null<float>(products.view());
    diagonal_scan_backward_ends_kernel<T, kForm>
        <<<s.grid(), kThreads, 0, ctx.stream().handle>>>(args);
    LRNN_CUDA_CHECK_LAUNCH();
    launch_carry(ctx, {s, true, args.multiplier, args.products, args.ends, nullptr,
                       carries.view().data<float>()});
    args.carries = carries.view().data<float>();
  }
  diagonal_scan_backward_kernel<T, kComplex, kForm>
      <<<s.grid(), kThreads, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

void sum_rows(Context& ctx, const SumArgs& args) {
  const dim3 blocks(static_cast<unsigned>((args.sizes.lanes + kSumLanes - 1) / kSumLanes), 2);
  diagonal_scan_sum_kernel<<<blocks, kSumLanes * kSumGroups, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace
}  // namespace diagonal

void diagonal_scan_backward(Context& ctx, const DiagonalScanBackward& a) {
  using namespace diagonal;
  const Sizes s(a.v);
  const MultiplierArgs multiplier(a.multiplier);
  Tensor partial = ctx.empty({s.rows(), 4, s.lanes}, DType::float32);
  Tensor dtau;
  if (a.dtau) dtau = ctx.empty({s.tiles(), s.batch, s.seqlen}, DType::float32);
  visit_float("diagonal_scan_backward", a.v.dtype(), [&]<class T>() {
    const BackwardArgs<T> args{s,
                               multiplier,
                               data_or_null<std::int32_t>(a.lengths),
                               data_or_null<float>(a.gamma),
                               a.dx.data<T>(),
                               a.v.data<T>(),
                               a.chunk_states.data<float>(),
                               data_or_null<float>(a.dstate_out),
                               a.dv.data<T>(),
                               data_or_null<T>(a.x),
                               data_or_null<float>(a.dstate_in),
                               nullptr,
                               nullptr,
                               nullptr,
                               partial.view().data<float>(),
                               data_or_null<float>(dtau.view())};
    visit_form(form_of(a.multiplier), [&]<Form kForm>() {
      if (a.v.rank() == 4)
        backward<T, true, kForm>(ctx, args);
      else
        backward<T, false, kForm>(ctx, args);
    });
  });
  if (a.da || a.dlog_a || a.dz || a.dgamma)
    sum_rows(ctx, {s, multiplier, partial.view().data<float>(), data_or_null<float>(a.da),
                   data_or_null<float>(a.dlog_a), data_or_null<float>(a.dz),
                   data_or_null<float>(a.dgamma)});
  if (!a.dtau) return;
  const std::int64_t tokens = s.batch * s.seqlen;
  diagonal_scan_dtau_kernel<<<static_cast<unsigned>((tokens + kThreads - 1) / kThreads), kThreads,
                              0, ctx.stream().handle>>>(
      s, data_or_null<std::int32_t>(a.lengths), dtau.view().data<float>(), a.dtau.data<float>());
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
