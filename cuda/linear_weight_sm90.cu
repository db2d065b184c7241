// Gradients of weights in TF32 on Hopper: dweight += dy^T x, a sum over rows ("tokens").
//
// Tensor cores take TF32 only with the summed dimension inside, which neither operand has. Of the
// wider one ("left") a thread reads four neighbouring columns of a token at once: that is its part
// of A fragments of four rows. The other ("right") is transposed by one warpgroup, four tokens by
// four columns in registers, into a ring of panels of 32 tokens in shared memory. Which row of a
// panel or fragment is which column is chosen so that all of these accesses are of 16 bytes and
// hit all banks.
// A block owns kLeft columns of one by kRight of the other and a part of the tokens; each of two
// more warpgroups multiplies 128 by kRight, one while the other converts and waits. Parts are
// added in order by a second kernel. They depend on the sizes alone: so many that the waves of
// blocks are full.
// H200, cold L2, 16384 tokens: 768 x 768 takes 105 us (184 TFLOP/s), 768 x 1536 194 (199), 3072 x
// 768 391 (198), where cuBLASLt takes 137, 211 and 377; 65536 tokens of 3072 x 768 1.39 ms, 2.12
// there. A panel takes 1.25 us, twice the time of its products: reading operands from L2, at 5.1
// TB/s, binds. Prefetches into L2 (155 us) and copies of both operands into shared memory ahead of
// their use (212) made it slower.
#include "common/linear_weight_sm90.cuh"
#include "common/wgmma_wide.cuh"

namespace lrnn::cuda::linear_weight {
namespace {

constexpr int kGroupLeft = 128;  // columns of the left operand of a warpgroup
constexpr int kGroups = 2;
constexpr int kLeft = kGroups * kGroupLeft;
constexpr int kRight = 128;
constexpr int kThreads = kWarpgroup * (kGroups + 1);
constexpr int kTokens = 32;  // of a panel
constexpr int kStages = 6;
constexpr int kPanelBytes = kRight * kPanelRowBytes;
constexpr int kShared = 1024 + kStages * (kPanelBytes + 16);
constexpr int kWave = 132;        // blocks: one for each SM of an H200
constexpr int kLeastPerPart = 8;  // panels
// Of a thread of those that transpose and those that multiply.
constexpr int kTransposeRegisters = 88;
constexpr int kProductRegisters = 208;

struct Args {
  DeviceRows<const float> left, right;
  std::int64_t tokens;
  std::int64_t per_part;  // tokens, a multiple of kTokens
  int left_columns, right_columns;
  bool left_inside;  // partial is [parts, right_columns, left_columns], else the other way
  float* partial;
};

/// Shared addresses of panels and barriers.
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t panel(int stage) const {
    return base + static_cast<std::uint32_t>(stage * kPanelBytes);
  }
  __device__ __forceinline__ std::uint32_t full(int stage) const {
    return panel(kStages) + 16U * static_cast<std::uint32_t>(stage);
  }
  __device__ __forceinline__ std::uint32_t free(int stage) const { return full(stage) + 8U; }
};

/// The tokens of a block.
struct Part {
  std::int64_t first, last;
  int panels;

  __device__ __forceinline__ explicit Part(const Args& a)
      : first(blockIdx.z * a.per_part),
        last(min(first + a.per_part, a.tokens)),
        panels(static_cast<int>((last - first + kTokens - 1) / kTokens)) {}
};

/// Four numbers of a token, zero beyond the operand.
__device__ __forceinline__ float4 load_four(const float* p, bool exists) {
  return exists ? *reinterpret_cast<const float4*>(p) : float4{0.0F, 0.0F, 0.0F, 0.0F};
}

__device__ __forceinline__ void store_four(std::uint32_t at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(round_tf32(a)),
               "f"(round_tf32(b)), "f"(round_tf32(c)), "f"(round_tf32(d))
               : "memory");
}

/// The warpgroup that transposes. Column 4 j + e of the right operand is row 32 e + j of a panel.
__device__ __forceinline__ void fill_panels(const Args& a, const Shared& mem, const Part& part) {
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
  const int j = static_cast<int>(threadIdx.x) % 32;
  const int column = static_cast<int>(blockIdx.y) * kRight + 4 * j;
  const bool exists = column < a.right_columns;
  const float* const from = a.right.data + column;
  float4 next[2][4];
  const auto load = [&](int i) {
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const std::int64_t token = part.first + i * kTokens + 4 * (warp + 4 * q) + t;
        next[q][t] = load_four(from + token * a.right.stride, exists && token < part.last);
      }
  };
  load(0);
  for (int i = 0; i < part.panels; ++i) {
    const int stage = i % kStages;
    float4 v[2][4];
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int t = 0; t < 4; ++t) v[q][t] = next[q][t];
    load(i + 1);
    barrier_wait(mem.free(stage), i / kStages % 2 ^ 1);
    const std::uint32_t row = mem.panel(stage) + static_cast<std::uint32_t>(j * kPanelRowBytes);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const std::uint32_t to = row + static_cast<std::uint32_t>(((warp + 4 * q) ^ (j & 7)) << 4);
      constexpr std::uint32_t kNext = 32 * kPanelRowBytes;
      store_four(to, v[q][0].x, v[q][1].x, v[q][2].x, v[q][3].x);
      store_four(to + kNext, v[q][0].y, v[q][1].y, v[q][2].y, v[q][3].y);
      store_four(to + 2 * kNext, v[q][0].z, v[q][1].z, v[q][2].z, v[q][3].z);
      store_four(to + 3 * kNext, v[q][0].w, v[q][1].w, v[q][2].w, v[q][3].w);
    }
    fence_shared_async();
    __syncwarp();
    if (j == 0) barrier_arrive(mem.full(stage));
  }
}

/// Sums of a warpgroup: of its 16-column groups of the left operand, those at even places are rows
/// of c[0], at odd places of c[1].
using Sums = float[2][kRight / 8][4];

/// A warpgroup that multiplies. `column` is the first of the thread's four of the left operand:
/// rows g and g + 8 of c[0], then of c[1].
__device__ __forceinline__ void multiply_panels(Sums& c, const Args& a, const Shared& mem,
                                                const Part& part, int column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool exists = column < a.left_columns;
  const float* const from = a.left.data + column;
  float4 next[kPanelSteps][2];
  const auto load = [&](int i) {
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::int64_t token = part.first + i * kTokens + 8 * step + 4 * half + lane % 4;
        next[step][half] = load_four(from + token * a.left.stride, exists && token < part.last);
      }
  };
  load(0);
  for (int i = 0; i < part.panels; ++i) {
    const int stage = i % kStages;
    std::uint32_t x[2][kPanelSteps][4];
    const auto bits = [](float v) { return __float_as_uint(round_tf32(v)); };
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = next[step][half];
        x[0][step][2 * half] = bits(v.x);
        x[0][step][2 * half + 1] = bits(v.y);
        x[1][step][2 * half] = bits(v.z);
        x[1][step][2 * half + 1] = bits(v.w);
      }
    load(i + 1);
    barrier_wait(mem.full(stage), i / kStages % 2);
    pin(c[0]);
    pin(c[1]);
    products_begin();
#pragma unroll
    for (int step = 0; step < kPanelSteps; ++step)
#pragma unroll
      for (int block = 0; block < 2; ++block)
        multiply_step<float>(c[block], x[block][step],
                             advance(panel_descriptor(mem.panel(stage), 16), step * kStepBytes));
    products_commit();
    products_wait<0>();
    pin(c[0]);
    pin(c[1]);
    if (lane == 0) barrier_arrive(mem.free(stage));
  }
}

/// The thread's sums: four columns of the left operand by four of the right one at a time.
__device__ __forceinline__ void store_sums(const Sums& c, const Args& a, int column) {
  float* const partial =
      a.partial + static_cast<std::int64_t>(blockIdx.z) * a.left_columns * a.right_columns;
  if (column >= a.left_columns) return;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int j = 8 * i + static_cast<int>(threadIdx.x) % 4 * 2 + odd;
      const int right = static_cast<int>(blockIdx.y) * kRight + 4 * j;
      if (right >= a.right_columns) continue;
      const auto sum = [&](int l, int r) { return c[l / 2][i + 4 * r][l % 2 * 2 + odd]; };
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const std::int64_t at =
            a.left_inside ? static_cast<std::int64_t>(right + k) * a.left_columns + column
                          : static_cast<std::int64_t>(column + k) * a.right_columns + right;
        *reinterpret_cast<float4*>(partial + at) =
            a.left_inside ? float4{sum(0, k), sum(1, k), sum(2, k), sum(3, k)}
                          : float4{sum(k, 0), sum(k, 1), sum(k, 2), sum(k, 3)};
      }
    }
}

__global__ __launch_bounds__(kThreads, 1) void linear_weight_kernel(Args a) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared mem(shared);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(mem.full(s), kWarpgroup / 32);
      barrier_init(mem.free(s), kGroups * kWarpgroup / 32);
    }
    barrier_init_done();
  }
  __syncthreads();
  const Part part(a);
  const int group = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group == kGroups) {
    give_registers<kTransposeRegisters>();
    fill_panels(a, mem, part);
  } else {
    take_registers<kProductRegisters>();
    const int column = static_cast<int>(blockIdx.x) * kLeft +
                       static_cast<int>(threadIdx.x) / 32 * 32 +
                       static_cast<int>(threadIdx.x) % 32 / 4 * 4;
    Sums c = {};
    multiply_panels(c, a, mem, part, column);
    store_sums(c, a, column);
  }
}

constexpr int kSumThreads = 128;

/// dweight += the sum of its parts, in their order; four columns of a row for each thread.
__global__ __launch_bounds__(kSumThreads) void add_parts_kernel(const float* __restrict__ partial,
                                                                int parts, std::int64_t rows,
                                                                int columns,
                                                                DeviceRows<float> dweight) {
  const std::int64_t i = 4 * (static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x);
  const std::int64_t size = rows * columns;
  if (i >= size) return;
  float4 sum{0.0F, 0.0F, 0.0F, 0.0F};
#pragma unroll 8
  for (int p = 0; p < parts; ++p) {
    const float4 v = *reinterpret_cast<const float4*>(partial + p * size + i);
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  float* const to = dweight.row(i / columns) + i % columns;
  to[0] += sum.x;
  to[1] += sum.y;
  to[2] += sum.z;
  to[3] += sum.w;
}

std::int64_t ceil_div(std::int64_t n, std::int64_t d) {
  return (n + d - 1) / d;
}

/// Parts that `panels` are cut into: those of the least time, in panels. More parts fill the last
/// wave of blocks better, but each is written and read again.
std::int64_t parts_of(std::int64_t tiles, std::int64_t panels, std::int64_t elements) {
  constexpr double kStart = 3;          // of a block, until its first product
  constexpr double kElements = 600000;  // of a part, moved in the time of a panel
  const auto time = [&](std::int64_t parts) {
    return static_cast<double>(ceil_div(tiles * parts, kWave)) *
               (static_cast<double>(ceil_div(panels, parts)) + kStart) +
           static_cast<double>(parts * elements) / kElements;
  };
  std::int64_t best = 1;
  for (std::int64_t parts = 2; parts <= std::min<std::int64_t>(kWave, panels / kLeastPerPart);
       ++parts)
    if (time(parts) < time(best)) best = parts;
  return best;
}

}  // namespace

void add(Context& ctx, const LinearBackward& a) {
  const bool swapped = a.dy.dim(-1) < a.x.dim(-1);
  const TensorView left = swapped ? a.x : a.dy;
  const TensorView right = swapped ? a.dy : a.x;
  const std::int64_t tokens = detail::row_count(left);
  const std::int64_t across = ceil_div(left.dim(-1), kLeft);
  const std::int64_t down = ceil_div(right.dim(-1), kRight);
  const std::int64_t panels = ceil_div(tokens, kTokens);
  const std::int64_t per_part =
      ceil_div(panels, parts_of(across * down, panels, a.dweight.numel())) * kTokens;
  const std::int64_t parts = ceil_div(tokens, per_part);
  const Shape shape = {parts, a.dweight.dim(0), a.dweight.dim(1)};
  const Tensor partial = ctx.empty(shape, DType::float32);
  const Args args{.left = device_rows<float>(left),
                  .right = device_rows<float>(right),
                  .tokens = tokens,
                  .per_part = per_part,
                  .left_columns = static_cast<int>(left.dim(-1)),
                  .right_columns = static_cast<int>(right.dim(-1)),
                  .left_inside = swapped,
                  .partial = const_cast<float*>(partial.view().data<float>())};
  LRNN_CUDA_CHECK(cudaFuncSetAttribute(linear_weight_kernel,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  linear_weight_kernel<<<dim3(static_cast<unsigned>(across), static_cast<unsigned>(down),
                              static_cast<unsigned>(parts)),
                         kThreads, kShared, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
  const std::int64_t vectors = a.dweight.numel() / 4;
  add_parts_kernel<<<static_cast<unsigned>(ceil_div(vectors, kSumThreads)), kSumThreads, 0,
                     ctx.stream().handle>>>(args.partial, static_cast<int>(parts), a.dweight.dim(0),
                                            static_cast<int>(a.dweight.dim(1)),
                                            device_rows<float>(a.dweight));
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda::linear_weight
