/// What the kernels of s7_gated_step share: all between the projections of a token and its output
/// before the gate.
#pragma once

#include "lrnn/ops/s7_gated_step.hpp"

#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/s7_contract.cuh"
#include "common/transpose_add.cuh"
#include "common/vec.cuh"

namespace lrnn::cuda::s7 {

constexpr int kStepThreads = 512;
constexpr int kStepWarps = kStepThreads / 32;
constexpr std::int64_t kMostRows = 8192;  // of pB, H N: what the threads load at once

template <class T>
struct TokenArgs {
  const T* P;  // [tokens, N + 2 H N + H + N]
  const T* x;
  const float* base;
  float* state;
  int dim;
};

template <class T>
TokenArgs<T> token_args(const S7GatedStep& a, TensorView P) {
  return {.P = P.data<T>(),
          .x = a.x.data<T>(),
          .base = a.base.data<float>(),
          .state = a.state.data<float>(),
          .dim = static_cast<int>(a.x.dim(2))};
}

/// What a thread holds of pB or pC of its token: every kStepThreads-th group of kWide states. A
/// channel has kPer groups.
template <class T, int kPer>
struct Projections {
  static constexpr int kVectors = static_cast<int>(kMostRows) / (kWide<T> * kStepThreads);
  Packed<T, kWide<T>> groups[kVectors];

  __device__ __forceinline__ void load(const T* p, int dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      groups[i] = {};
      if (channel(i) < dim) groups[i].load(p + group(i) * kWide<T>);
    }
  }
  [[nodiscard]] static __device__ __forceinline__ int group(int i) {
    return static_cast<int>(threadIdx.x) + i * kStepThreads;
  }
  [[nodiscard]] static __device__ __forceinline__ int channel(int i) { return group(i) / kPer; }
};

/// The block of a token: sums over channels are added within a warp and then over the warps in
/// order. With everything in flight at once, one latency of memory and two barriers.
template <class T, int kPer>
class TokenStep {
 public:
  static constexpr int kStates = kWide<T>;   // of a thread
  static constexpr int kN = kPer * kStates;  // of a token

  struct Shared {
    float sums[kStepWarps][kN];
    __align__(16) float states[kN];
  };

  /// Before the kernels before this one have ended.
  __device__ __forceinline__ explicit TokenStep(const TokenArgs<T>& a)
      : a_(a), base_(thread() < kN ? a.base[thread()] : 0.0F) {}

  /// Behind them. Calls store(channel, v) for every channel, once.
  template <class Store>
  __device__ __forceinline__ void run(std::int64_t token, Shared& shared, const Store& store) {
    load(token);
    contract(shared);
    __syncthreads();
    if (thread() < kN) advance(token, shared);
    __syncthreads();
    read_out(shared, store);
  }

 private:
  using Own = Projections<T, kPer>;
  static constexpr int kVectors = Own::kVectors;
  static constexpr int kParts = 32 / kPer;  // channels of a warp at a time

  [[nodiscard]] static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x);
  }
  [[nodiscard]] static __device__ __forceinline__ int first_state() {
    return thread() % kPer * kStates;
  }

  __device__ __forceinline__ void load(std::int64_t token) {
    const std::int64_t HN = static_cast<std::int64_t>(a_.dim) * kN;
    const T* const pA = a_.P + token * (2 * HN + a_.dim + 2 * kN);
    const T* const pD = pA + kN + 2 * HN;
    const T* const x = a_.x + token * a_.dim;
    B_.load(pA + kN, a_.dim);
    T own_x[kVectors];
    T own_D[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int channel = min(Own::channel(i), a_.dim - 1);
      own_x[i] = x[channel];
      own_D[i] = pD[channel];
    }
    C_.load(pA + kN + HN, a_.dim);
    if (thread() < kN) {
      A_ = to_float(pA[thread()]) + base_;
      drive_ = to_float(pD[a_.dim + thread()]);
      state_ = a_.state[token * kN + thread()];
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x_[i] = to_float(own_x[i]);
      skip_[i] = to_float(own_D[i]) * x_[i];
    }
  }
  __device__ __forceinline__ void contract(Shared& shared) const {
    float sum[kStates] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int k = 0; k < kStates; ++k) sum[k] = fmaf(B_.groups[i].get(k), x_[i], sum[k]);
    const int part = thread() % 32 / kPer;
    transpose_add<kStates, kParts, kPer>(sum, part);
    if (part % kLanesOfSum<kStates, kParts> != 0) return;
    float* const to = shared.sums[thread() / 32] + first_state() + first_sum<kStates, kParts>(part);
#pragma unroll
    for (int k = 0; k < kSumsOfLane<kStates, kParts>; ++k) to[k] = sum[k];
  }
  __device__ __forceinline__ void advance(std::int64_t token, Shared& shared) const {
    float drive = drive_;
#pragma unroll
    for (int w = 0; w < kStepWarps; ++w) drive += shared.sums[w][thread()];
    const float state = fmaf(multiplier(A_), state_, drive);
    shared.states[thread()] = state;
    a_.state[token * kN + thread()] = state;
  }
  template <class Store>
  __device__ __forceinline__ void read_out(const Shared& shared, const Store& store) const {
    float h[kStates];
#pragma unroll
    for (int k = 0; k < kStates; k += 4)
      load_vec<float, 4>(shared.states + first_state() + k, reinterpret_cast<float (&)[4]>(h[k]));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v = 0.0F;
#pragma unroll
      for (int k = 0; k < kStates; ++k) v = fmaf(C_.groups[i].get(k), h[k], v);
#pragma unroll
      for (int distance = kPer / 2; distance > 0; distance /= 2)
        v += __shfl_xor_sync(0xFFFFFFFFU, v, distance);
      if (thread() % kPer == 0 && Own::channel(i) < a_.dim)
        store(Own::channel(i), from_float<T>(v + skip_[i]));
    }
  }

  const TokenArgs<T>& a_;
  float base_;
  Own B_;
  Own C_;
  float x_[kVectors];
  float skip_[kVectors];
  float A_ = 0.0F;
  float drive_ = 0.0F;
  float state_ = 0.0F;
};

/// Eight neighbouring elements of a weight, in the order of the program: else the compiler moves
/// the loads of weights behind the wait for the kernels before, to save registers.
__device__ __forceinline__ Packed<__nv_bfloat16, 8> load_weight(const __nv_bfloat16* p) {
  Packed<__nv_bfloat16, 8> v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p)
               : "memory");
  return v;
}

/// GELU of an output, rounded.
template <class T>
__device__ __forceinline__ T activated(T v) {
  return from_float<T>(activate<Activation::Gelu>(to_float(v)));
}
/// sig(gate) v + hid, the gate a sum.
template <class T>
__device__ __forceinline__ T gated(float gate, float v, float hid) {
  const auto rounded = [](float value) { return to_float(from_float<T>(value)); };
  return from_float<T>(rounded(v * sigmoid(rounded(gate))) + hid);
}

/// Calls f.operator()<kPer>() if TokenStep takes these sizes; returns whether it did.
template <class T, class F>
bool visit_states(std::int64_t dim, std::int64_t dstate, F&& f) {
  if (dim % kWide<T> != 0 || dstate % kWide<T> != 0 || dim * dstate > kMostRows) return false;
  switch (dstate / kWide<T>) {
    case 1:
      f.template operator()<1>();
      return true;
    case 2:
      f.template operator()<2>();
      return true;
    case 4:
      f.template operator()<4>();
      return true;
    case 8:
      f.template operator()<8>();
      return true;
    default:
      return false;
  }
}

/// Whether Hopper's kernel takes the tokens behind their projections.
bool takes_sm90(const S7GatedStep& args);
/// All behind the projections P.
void step_sm90(Context& ctx, const S7GatedStep& args, TensorView P);

}  // namespace lrnn::cuda::s7
