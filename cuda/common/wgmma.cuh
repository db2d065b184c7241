/// Hopper's warpgroup products, tensor copies and barriers in shared memory (sm_90a only).
///
/// Tiles of bfloat16 in shared memory are panels of 64 columns: rows of 128 bytes, 1024-byte
/// aligned, whose 16-byte chunks the tensor copy permutes (128-byte swizzle). A product reads
/// either operand from there by a descriptor, the left one also from registers. Fragments of a
/// warpgroup are those of mma.m16n8k16 (common/mma.cuh), warp w owning rows 16 w .. 16 w + 15.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include "common/check.cuh"
#include "common/mma.cuh"

namespace lrnn::cuda {

constexpr int kPanel = 64;           // columns of a panel
constexpr int kPanelRowBytes = 128;  // of one row of a panel
constexpr int kWarpgroup = 128;      // threads

/// Descriptor of a panel tile from shared address `at`. `panel_bytes` is the distance of panels,
/// read only if the panels lie along the dimension that is not summed over.
__device__ __forceinline__ std::uint64_t panel_descriptor(std::uint32_t at, int panel_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = (std::uint64_t{8 * kPanelRowBytes} >> 4) << 32;
  return kSwizzle128 | kEightRows | (static_cast<std::uint64_t>(panel_bytes >> 4) << 16) |
         ((at & 0x3FFFFU) >> 4);
}
/// The descriptor `bytes` further on.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

/// Orders register writes before the products that follow.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Closes a group of products.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps uses of `c` on their side of a begin or wait.
template <int kTiles>
__device__ __forceinline__ void pin(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[n][e])::"memory");
}

#define LRNN_C_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LRNN_C_TILES_8(n)                                                                         \
  LRNN_C_TILE(n), LRNN_C_TILE(n + 1), LRNN_C_TILE(n + 2), LRNN_C_TILE(n + 3), LRNN_C_TILE(n + 4), \
      LRNN_C_TILE(n + 5), LRNN_C_TILE(n + 6), LRNN_C_TILE(n + 7)
#define LRNN_C_TILES_2(n) LRNN_C_TILE(n), LRNN_C_TILE(n + 1)
#define LRNN_C_TILES_4(n) LRNN_C_TILES_2(n), LRNN_C_TILES_2(n + 2)
#define LRNN_C_8 "{%0, %1, %2, %3, %4, %5, %6, %7"
#define LRNN_C_16 LRNN_C_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LRNN_C_32                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LRNN_C_36 LRNN_C_32 ", %32, %33, %34, %35"
#define LRNN_C_64                                                                      \
  LRNN_C_32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define LRNN_MULTIPLY_128(type)                                                      \
  asm volatile(                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " LRNN_C_64     \
      "}, %64, %65, p, 1, 1, %67, %68;\n}\n"                                         \
      : LRNN_C_TILES_8(0), LRNN_C_TILES_8(8)                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0), \
        "n"(kTransposeB ? 1 : 0)                                                     \
      : "memory")

/// c = [c +] a b^T over 16 columns, both operands in shared memory; a [64, 16], b [8 kTiles, 16].
/// A transposed operand is given by the descriptor of [16, rows] instead. T is bfloat16 or float16.
template <bool kTransposeA, bool kTransposeB, class T = bf16, int kTiles>
__device__ __forceinline__ void multiply_shared(float (&c)[kTiles][4], std::uint64_t a,
                                                std::uint64_t b, bool accumulate) {
  static_assert(kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 9 || kTiles == 16);
  static_assert(std::is_same_v<T, bf16> || (std::is_same_v<T, __half> && kTiles == 16));
  if constexpr (kTiles == 2) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " LRNN_C_8
        "}, %8, %9, p, 1, 1, %11, %12;\n}\n"
        : LRNN_C_TILES_2(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  } else if constexpr (kTiles == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " LRNN_C_16
        "}, %16, %17, p, 1, 1, %19, %20;\n}\n"
        : LRNN_C_TILES_4(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  } else if constexpr (kTiles == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LRNN_C_32
        "}, %32, %33, p, 1, 1, %35, %36;\n}\n"
        : LRNN_C_TILES_8(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  } else if constexpr (kTiles == 9) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %38, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 " LRNN_C_36
        "}, %36, %37, p, 1, 1, %39, %40;\n}\n"
        : LRNN_C_TILES_8(0), LRNN_C_TILE(8)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  } else if constexpr (std::is_same_v<T, __half>) {
    LRNN_MULTIPLY_128("f16");
  } else {
    LRNN_MULTIPLY_128("bf16");
  }
}
#undef LRNN_MULTIPLY_128

/// c = [c +] a b over 16 columns of a, which is an A fragment; b is [16, 8 kTiles] in shared
/// memory, or [8 kTiles, 16] if kTransposeB is false.
template <bool kTransposeB = true, int kTiles>
__device__ __forceinline__ void multiply_registers(float (&c)[kTiles][4],
                                                   const std::uint32_t (&a)[4], std::uint64_t b,
                                                   bool accumulate = true) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " LRNN_C_32
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
        : LRNN_C_TILES_8(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " LRNN_C_64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
        : LRNN_C_TILES_8(0), LRNN_C_TILES_8(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
          "n"(kTransposeB ? 1 : 0)
        : "memory");
  }
}

#undef LRNN_C_64
#undef LRNN_C_36
#undef LRNN_C_32
#undef LRNN_C_16
#undef LRNN_C_8
#undef LRNN_C_TILES_8
#undef LRNN_C_TILES_4
#undef LRNN_C_TILES_2
#undef LRNN_C_TILE

/// Registers of this warpgroup's threads from here on; the whole warpgroup calls it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Barrier in shared memory by its address. A phase completes with its arrivals and bytes.
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to tensor copies. A fence of shared memory: one of all memory
/// waits for the whole device, about 1 us before a block's first copy.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Waits for the phase of this parity; a fresh barrier counts as past parity 1.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// Whether barrier_wait() would not wait.
__device__ __forceinline__ bool barrier_passed(std::uint32_t barrier, int parity) {
  std::uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}
/// One thread of a warp that is all there. The compiler knows that it is one: behind any other
/// condition, and behind a bool kept of this one, it puts a loop over the lanes around each bulk
/// copy, so that a copy takes 120 cycles.
__device__ __forceinline__ bool elected() {
  std::uint32_t is;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(is));
  return is != 0;
}
/// Goes round kStages buffers, each with barriers of its own: a round is a phase of them.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  /// The buffer used before this one.
  __device__ __forceinline__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};
/// Orders this thread's shared memory writes before later products and tensor copies.
__device__ __forceinline__ void fence_shared_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Barrier `id` of a part of a block: `threads` of it wait here or have arrived.
__device__ __forceinline__ void group_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void group_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Copies the box of `map` at column c, head h, row r, sequence b; its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap* map,
                                         std::uint32_t barrier, int c, int h, int r, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(barrier), "r"(c), "r"(h), "r"(r), "r"(b)
      : "memory");
}
/// How long lines that a copy reads stay in L2: as others, or not as long.
__device__ __forceinline__ std::uint64_t cache_policy(bool once) {
  std::uint64_t usual;
  std::uint64_t first;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  return once ? first : usual;
}
/// The same under a policy.
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap* map,
                                         std::uint32_t barrier, int c, int h, int r, int b,
                                         std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(barrier), "r"(c), "r"(h), "r"(r), "r"(b),
      "l"(policy)
      : "memory");
}
/// Asks for that box: it is on its way to L2.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int c, int h, int r, int b) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(
                   reinterpret_cast<std::uint64_t>(map)),
               "r"(c), "r"(h), "r"(r), "r"(b)
               : "memory");
}
/// Copies 16 bytes to shared memory; copies_async_wait() waits for all that the thread asked for.
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void copies_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
/// Copies `bytes`, a multiple of 16, between 16-byte aligned places; they count at `barrier`.
__device__ __forceinline__ void copy_bytes(std::uint32_t to, const void* from, int bytes,
                                           std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}
/// The same, of what is read once: it is the first to leave L2.
__device__ __forceinline__ void copy_bytes_once(std::uint32_t to, const void* from, int bytes,
                                                std::uint32_t barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], policy;\n}" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(map)) : "memory");
}

/// Shape of an operand [batch, rows, heads, head_dim] whose rows are `stride` elements apart.
struct HeadRows {
  std::int64_t batch, rows, heads, head_dim, stride;
};

/// Map of an operand for boxes of one panel by `box_rows` rows of one head; elements beyond its
/// columns and rows read as 0. `data` is 16-byte aligned, head_dim and stride multiples of 8.
inline CUtensorMap head_map(const bf16* data, const HeadRows& shape, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // Through the runtime, so that the library does not depend on the driver's.
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    LRNN_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                     cudaEnableDefault, &found));
#else
    LRNN_CUDA_CHECK(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found));
#endif
    LRNN_CHECK(found == cudaDriverEntryPointSuccess && entry != nullptr, DeviceError,
               "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const auto bytes = [](std::int64_t elements) {
    return static_cast<cuuint64_t>(elements) * sizeof(bf16);
  };
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.heads),
      static_cast<cuuint64_t>(shape.rows), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t strides[3] = {bytes(shape.head_dim), bytes(shape.stride),
                                 bytes(shape.stride * shape.rows)};
  const cuuint32_t box[4] = {kPanel, 1, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16*>(data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LRNN_CHECK(result == CUDA_SUCCESS, DeviceError, "cuTensorMapEncodeTiled failed with code ",
             static_cast<int>(result));
  return map;
}

}  // namespace lrnn::cuda
