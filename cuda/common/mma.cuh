/// Warp-level products of bfloat16 tiles on tensor cores, and asynchronous copies (sm_80 and
/// later).
///
/// Fragments of mma.m16n8k16, with g = lane / 4 and c = 2 (lane % 4): A [16, 16] is four registers
/// (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8) of two neighbouring columns each; B [16, 8] is
/// two registers of rows c, c + 1 and c + 8, c + 9 of column g; C [16, 8] is (g, c), (g, c + 1), (g
/// + 8, c), (g + 8, c + 1). Two C tiles side by side, rounded, are one A tile.
#pragma once

#include <cstdint>

#include "common/dtype.cuh"

namespace lrnn::cuda {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Copies 16 bytes, or clears them if not `valid`; `from` is not read then.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits until at most kPending groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Four 8x8 matrices; lanes 8 i .. 8 i + 7 give the rows of matrix i, 16-byte aligned.
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const bf16* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const bf16* row) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/// c += a b, in float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// 2^x to 2 units in the last place; results below the normal range are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers rounded to bfloat16, `low` in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

/// The A fragment of columns [16 i, 16 i + 16) of a C tile row.
template <int kTiles>
__device__ __forceinline__ void pack_fragment(std::uint32_t (&a)[4], const float (&c)[kTiles][4],
                                              int i) {
  a[0] = pack_bf16(c[2 * i][0], c[2 * i][1]);
  a[1] = pack_bf16(c[2 * i][2], c[2 * i][3]);
  a[2] = pack_bf16(c[2 * i + 1][0], c[2 * i + 1][1]);
  a[3] = pack_bf16(c[2 * i + 1][2], c[2 * i + 1][3]);
}

/// c[m] += a[m] b^T. a: rows [16 kRows, kDepth] in shared memory from `a`; b: [8 kCols, kDepth].
/// Both row-major with a row distance of kPitch elements; `lane` of the warp.
template <int kRows, int kCols, int kDepth, int kPitch>
__device__ __forceinline__ void product_transposed(float (&c)[kRows][kCols][4], const bf16* a,
                                                   const bf16* b, int lane) {
  static_assert(kCols % 2 == 0 && kDepth % 16 == 0);
  const bf16* const a_row = a + (lane % 16) * kPitch + lane / 16 * 8;
  const bf16* const b_row = b + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    std::uint32_t left[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) load_matrices(left[m], a_row + m * 16 * kPitch + k);
#pragma unroll
    for (int n = 0; n < kCols; n += 2) {
      std::uint32_t right[4];
      load_matrices(right, b_row + n * 8 * kPitch + k);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        multiply_add(c[m][n], left[m], right[0], right[1]);
        multiply_add(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// c[m] += p[m] b. p: C tiles [16 kRows, 8 kInner], rounded here; b: [8 kInner, 8 kCols] in shared
/// memory, row-major.
template <int kRows, int kInner, int kCols, int kPitch>
__device__ __forceinline__ void product_registers(float (&c)[kRows][kCols][4],
                                                  const float (&p)[kRows][kInner][4], const bf16* b,
                                                  int lane) {
  static_assert(kCols % 2 == 0 && kInner % 2 == 0);
  const bf16* const b_row = b + (lane % 16) * kPitch + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kInner / 2; ++k) {
    std::uint32_t left[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) pack_fragment(left[m], p[m], k);
#pragma unroll
    for (int n = 0; n < kCols; n += 2) {
      std::uint32_t right[4];
      load_matrices_transposed(right, b_row + k * 16 * kPitch + n * 8);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        multiply_add(c[m][n], left[m], right[0], right[1]);
        multiply_add(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

}  // namespace lrnn::cuda
