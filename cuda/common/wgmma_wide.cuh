/// Warpgroup products of bfloat16 and TF32 with up to 256 columns (sm_90a only).
///
/// Tiles are panels as in common/wgmma.cuh, rows of 128 bytes: 64 numbers of bfloat16 or 32 of
/// TF32. A step sums over 32 bytes of a row, 16 or 8 numbers. The fragments of TF32 hold one number
/// where those of bfloat16 hold two, so that matrix loads serve both.
#pragma once

#include "common/wgmma.cuh"

namespace lrnn::cuda {

template <class T>
constexpr int kPanelColumns = kPanelRowBytes / static_cast<int>(sizeof(T));
constexpr int kStepBytes = 32;
constexpr int kPanelSteps = kPanelRowBytes / kStepBytes;

/// A number as tensor cores read it, to nearest: they would cut a float off.
__device__ __forceinline__ float round_tf32(float v) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
  return __uint_as_float(rounded);
}

/// Four 8x8 matrices of 16-byte rows from this lane's row address: an A fragment of 16 rows.
__device__ __forceinline__ void load_fragment(std::uint32_t (&a)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}

#define LRNN_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LRNN_TILES_4(n) LRNN_TILE(n), LRNN_TILE(n + 1), LRNN_TILE(n + 2), LRNN_TILE(n + 3)
#define LRNN_TILES_16(n) \
  LRNN_TILES_4(n), LRNN_TILES_4(n + 4), LRNN_TILES_4(n + 8), LRNN_TILES_4(n + 12)
#define LRNN_TILES_32(n) LRNN_TILES_16(n), LRNN_TILES_16(n + 16)
#define LRNN_LIST_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LRNN_LIST_16                                                                 \
  LRNN_LIST_4                                                                        \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LRNN_LIST_32                                                                 \
  LRNN_LIST_16                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"   \
  ", %123, %124, %125, %126, %127"
#define LRNN_SHARED(tiles, columns, type, transposes, a_at, b_at)                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns type " {" LRNN_LIST_##tiles \
               "}, %" a_at ", %" b_at ", 1, 1, 1" transposes ";"                       \
               : LRNN_TILES_##tiles(0)                                                 \
               : "l"(a), "l"(b)                                                        \
               : "memory")
#define LRNN_REGISTERS(tiles, columns, type, transposes, a0, a1, a2, a3, b_at)              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns type " {" LRNN_LIST_##tiles      \
               "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", 1, 1, 1" transposes ";" \
               : LRNN_TILES_##tiles(0)                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                         \
               : "memory")
#define LRNN_BF16 "k16.f32.bf16.bf16"
#define LRNN_TF32 "k8.f32.tf32.tf32"

/// c += a b^T over one step, both operands in shared memory; a has 64 rows, b 8 kTiles.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&c)[kTiles][4], std::uint64_t a,
                                              std::uint64_t b) {
  static_assert(kTiles == 4 || kTiles == 32);
  constexpr bool kHalf = sizeof(T) == 2;
  if constexpr (kTiles == 4 && kHalf)
    LRNN_SHARED(4, "32", LRNN_BF16, ", 0, 0", "16", "17");
  else if constexpr (kTiles == 4)
    LRNN_SHARED(4, "32", LRNN_TF32, "", "16", "17");
  else if constexpr (kHalf)
    LRNN_SHARED(32, "256", LRNN_BF16, ", 0, 0", "128", "129");
  else
    LRNN_SHARED(32, "256", LRNN_TF32, "", "128", "129");
}

/// The same with a as a fragment.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&c)[kTiles][4], const std::uint32_t (&a)[4],
                                              std::uint64_t b) {
  static_assert(kTiles == 16 || kTiles == 32);
  constexpr bool kHalf = sizeof(T) == 2;
  if constexpr (kTiles == 16 && kHalf)
    LRNN_REGISTERS(16, "128", LRNN_BF16, ", 0", "64", "65", "66", "67", "68");
  else if constexpr (kTiles == 16)
    LRNN_REGISTERS(16, "128", LRNN_TF32, "", "64", "65", "66", "67", "68");
  else if constexpr (kHalf)
    LRNN_REGISTERS(32, "256", LRNN_BF16, ", 0", "128", "129", "130", "131", "132");
  else
    LRNN_REGISTERS(32, "256", LRNN_TF32, "", "128", "129", "130", "131", "132");
}

#undef LRNN_TF32
#undef LRNN_BF16
#undef LRNN_REGISTERS
#undef LRNN_SHARED
#undef LRNN_LIST_32
#undef LRNN_LIST_16
#undef LRNN_LIST_4
#undef LRNN_TILES_32
#undef LRNN_TILES_16
#undef LRNN_TILES_4
#undef LRNN_TILE

}  // namespace lrnn::cuda
