/// What the Hopper kernels of S7 share: a ring of buffers that one warp fills for two warpgroups,
/// packed operands, fragments.
#pragma once

#include "common/s7_sm90.cuh"
#include "common/vec.cuh"
#include "common/wgmma_wide.cuh"

namespace lrnn::cuda::s7 {

constexpr int kRows = 128;  // tokens of a block of the contractions
constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kMostStates = 64;
constexpr int kBlock = kWarpgroup * (kGroups + 1);
// Of a thread of those that copy and those that compute.
constexpr int kCopyRegisters = 24;
constexpr int kProductRegisters = 240;

/// Where element (row, column) of a buffer lies, in bytes.
template <class T>
__host__ __device__ __forceinline__ int packed_at(int row, int column) {
  return row * kPanelRowBytes + ((column * static_cast<int>(sizeof(T))) ^ ((row & 7) << 4));
}

/// Addresses of an operand, buffers and barriers. Z says how large they are.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t buffer(int i) const {
    return base + static_cast<std::uint32_t>(Z::kOperandBytes + i * Z::kBufferBytes);
  }
  __device__ __forceinline__ std::uint32_t full(int i) const {
    return buffer(Z::kBuffers) + 16U * static_cast<std::uint32_t>(i);
  }
  __device__ __forceinline__ std::uint32_t free(int i) const { return full(i) + 8U; }
};

template <class Z>
__device__ __forceinline__ void prepare(const Shared<Z>& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Z::kBuffers; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.free(i), kGroups * kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();
}

/// Whether this warpgroup is the one that copies; shifts registers from it to the others.
__device__ __forceinline__ bool copies() {
  const bool last =
      __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0) == kGroups;
  if (last)
    give_registers<kCopyRegisters>();
  else
    take_registers<kProductRegisters>();
  return last;
}

/// Fills `count` buffers as they become free: copy(i, buffer, barrier) starts the copies of buffer
/// i, of `bytes` in all. One thread does.
template <class Z, class Copy>
__device__ __forceinline__ void fill_buffers(const Shared<Z>& shared, int count, int bytes,
                                             Copy copy) {
  if (threadIdx.x % kWarpgroup != 0) return;
  int at = 0;
  int parity = 1;
  for (int i = 0; i < count; ++i) {
    barrier_wait(shared.free(at), parity);
    barrier_expect(shared.full(at), bytes);
    copy(i, shared.buffer(at), shared.full(at));
    if (++at == Z::kBuffers) {
      at = 0;
      parity ^= 1;
    }
  }
}

/// A warpgroup's place in the ring. A buffer is handed back when the products on it are known to
/// have finished.
template <class Z>
struct Reader {
  const Shared<Z>& shared;
  int next = 0;
  int parity = 0;
  int held = -1;

  /// Waits for the next buffer.
  __device__ __forceinline__ std::uint32_t take() {
    barrier_wait(shared.full(next), parity);
    return shared.buffer(next);
  }
  /// After the products on it have been started.
  __device__ __forceinline__ void started() {
    products_commit();
    products_wait<1>();
    give_back();
    held = next;
    if (++next == Z::kBuffers) {
      next = 0;
      parity ^= 1;
    }
  }
  /// Waits for all products.
  __device__ __forceinline__ void finish() {
    products_wait<0>();
    give_back();
  }

 private:
  /// Each lane for itself: racecheck does not follow another lane's arrival.
  __device__ __forceinline__ void give_back() {
    if (held >= 0) barrier_arrive(shared.free(held));
    held = -1;
  }
};

/// The rows of a warpgroup's thread.
struct Seat {
  int group, thread, warp, lane;
  std::int64_t token;  // of C tile rows; the other one is 8 further on

  __device__ __forceinline__ Seat()
      : group(static_cast<int>(threadIdx.x) / kWarpgroup),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup),
        warp(thread / 32),
        lane(thread % 32),
        token(static_cast<std::int64_t>(blockIdx.x) * kRows + group * 64 + warp * 16 + lane / 4) {}
  __device__ __forceinline__ std::int64_t first_token() const {
    return static_cast<std::int64_t>(blockIdx.x) * kRows + group * 64;
  }
};

/// Rows [tokens, dim], zero beyond.
template <class T>
struct Rows {
  const T* data;
  std::int64_t tokens;
  int dim;

  __device__ __forceinline__ Packed<T, kWide<T>> operator()(std::int64_t token, int column) const {
    Packed<T, kWide<T>> v = {};
    if (token < tokens && column < dim) v.load_constant(data + token * dim + column);
    return v;
  }
};

template <class Number, int kTiles>
__device__ __forceinline__ void clear(Number (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = Number{};
}

/// Products read the fragments of a panel while those of the next are made: two sets, of which one
/// may be overwritten when started() has returned for the other.
using Fragments = std::uint32_t[kPanelSteps][4];

/// Keeps the registers of fragments from other use up to here.
__device__ __forceinline__ void keep(const Fragments& a) {
#pragma unroll
  for (int s = 0; s < kPanelSteps; ++s)
    asm volatile("" ::"r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]) : "memory");
}

template <class T>
void launch(Context& ctx, void (*kernel)(T), int shared, dim3 blocks, const T& args) {
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<blocks, kBlock, static_cast<std::size_t>(shared), ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

template <class F>
void visit_width(int dim, F&& f) {
  if (dim <= 128)
    f.template operator()<128>();
  else
    f.template operator()<256>();
}

}  // namespace lrnn::cuda::s7
