// Products in float32 accuracy on Hopper's tensor cores: warpgroup products of numbers that are
// split into three bfloat16 each (common/linear_float32_sm90.cuh).
//
// A block stays and takes tiles of 128 rows of y, one after the other, or parts of the depth of
// such tiles. Two warpgroups read the right operand, split it and write its parts to buffers of 64
// of the depth; two others own 64 rows of the tile each and multiply 32 of the depth at a time.
// While these products run they make the next fragments: a thread reads its share of the left
// operand and splits it in registers. The parts of a sum over the depth are written beside each
// other and added in their order.
// On an H200 16384 x 1536 x 768 takes 0.346 ms, 112 TFLOP/s; 16384 x 768 x 1536 with the right
// operand across 116, 1536 x 768 x 16384 with both across 103. Tensor cores are busy 79 % of the
// time, the data path of shared memory and L1 82 %: products read the right operand once for every
// 64 rows, which alone is half of what it carries.
//
// How the depth is cut depends on the sizes of the product alone.
#include "common/linear_float32_tiles.cuh"

namespace lrnn::cuda::linear_float32_sm90::bfloat16x3 {
namespace {

constexpr int kGroups = 2;   // warpgroups that multiply
constexpr int kReaders = 2;  // warpgroups that split the right operand
constexpr int kThreads = kWarpgroup * (kGroups + kReaders);
constexpr int kBlock = 32;  // of the depth, between two additions in float32
constexpr int kPrefetchStages = 3;
constexpr int kPrefetchTiles = 4;
constexpr int kSplit = 3;  // bfloat16 of a number
constexpr int kPanelBytes = 64 * kPanelRowBytes;

template <int kColumns_>
struct Tile {
  static constexpr int kColumns = kColumns_;
  static constexpr int kPanels = kColumns / 64;
  static constexpr int kPartBytes = kPanels * kPanelBytes;
  static constexpr int kStageBytes = kSplit * kPartBytes;
  static constexpr int kStages = kColumns == 64 ? 6 : 4;
  static constexpr int kShared = 1024 + kStages * kStageBytes + 16 * kStages;
  using Sum = float[kColumns / 8][4];
};

constexpr Costs kCosts[] = {
    {.columns = 64, .start = 4, .stage = 1.1, .store = 1.6, .sum = 4.3, .part = 3.4e-6},
    {.columns = 128, .start = 4, .stage = 2.15, .store = 3.2, .sum = 4.3, .part = 3.4e-6}};

/// Shared addresses of the buffers and barriers of a block.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t stage(int s) const {
    return base + static_cast<std::uint32_t>(s * Z::kStageBytes);
  }
  __device__ __forceinline__ std::uint32_t full(int s) const {
    return stage(Z::kStages) + 8U * static_cast<std::uint32_t>(s);
  }
  __device__ __forceinline__ std::uint32_t free(int s) const { return full(Z::kStages + s); }

  __device__ void init_barriers() const {
    for (int s = 0; s < Z::kStages; ++s) {
      barrier_init(full(s), 4 * kReaders);
      barrier_init(free(s), 4 * kGroups);
    }
    barrier_init_done();
  }
};
/// x1, x2, x3 of two numbers. x1 and x2 are rounded to nearest; what remains is exact each time,
/// and x3 needs no more than seven bits.
__device__ __forceinline__ std::uint32_t round_pair(float x, float y) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}
__device__ __forceinline__ void subtract_pair(float& x, float& y, std::uint32_t pair) {
  x -= __uint_as_float(pair << 16);
  y -= __uint_as_float(pair & 0xFFFF0000U);
}
__device__ __forceinline__ void split_rest(float x, float y, std::uint32_t (&parts)[kSplit]) {
  subtract_pair(x, y, parts[0]);
  parts[1] = round_pair(x, y);
  subtract_pair(x, y, parts[1]);
  parts[2] = __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x7632);
}
__device__ __forceinline__ void split(float x, float y, std::uint32_t (&parts)[kSplit]) {
  parts[0] = round_pair(x, y);
  split_rest(x, y, parts);
}
/// The same, not before `yes`, which is not 0, is known. The compiler would rather split before the
/// products that shall run meanwhile.
__device__ __forceinline__ void split_after(float x, float y, std::uint32_t (&parts)[kSplit],
                                            int yes) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p cvt.rn.bf16x2.f32 %0, %1, %2;\n}\n"
               : "+r"(parts[0])
               : "f"(y), "f"(x), "r"(yes));
  split_rest(x, y, parts);
}

__device__ __forceinline__ void load_4(float* v, const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

// The order of the depth in fragments and buffers: of 16, number 4 t + i is in place
// 2 t + i % 2 + i / 2 * 8, so that the lane that holds row g and columns 2 t, 2 t + 1, 2 t + 8 and
// 2 t + 9 of a fragment reads four neighbours.

/// A fragment for each part and step.
using Fragments = std::uint32_t[kSplit][2][4];

/// Keeps the making of fragments before what follows.
__device__ __forceinline__ void pin_fragments(Fragments& f) {
#pragma unroll
  for (int p = 0; p < kSplit; ++p)
#pragma unroll
    for (int n = 0; n < 8; ++n) asm volatile("" : "+r"(f[p][n / 4][n % 4])::"memory");
}

/// Whether the phase of this parity is complete.
__device__ __forceinline__ int is_full(std::uint32_t barrier, int parity) {
  int yes;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.s32 %0, 1, 0, p;\n}\n"
      : "=r"(yes)
      : "r"(barrier), "r"(parity)
      : "memory");
  return yes;
}

/// What a lane holds of the left operand over kBlock: rows g and g + 8 of its warp, or, across,
/// rows 2 g and 2 g + 1.
template <class Z, bool kAcross>
struct LeftBlock {
  float v[2][2][4];              // [step of 16][row][i]
  Walk<Z::kColumns, kBlock> at;  // of the next loads
  int row, t;
  const float* from[kAcross ? 1 : 2];

  __device__ __forceinline__ LeftBlock(const Args& a, int warp, int lane)
      : at(a), row(warp * 16 + lane / 4 * (kAcross ? 2 : 1)), t(lane % 4) {
    open(a);
  }
  __device__ __forceinline__ void open(const Args& a) {
    const int k = at.at + t * 4;
    if constexpr (kAcross)
      from[0] = a.left.data + min(at.row + row, a.rows - 2) + k * a.left.stride;
    else
#pragma unroll
      for (int r = 0; r < 2; ++r)
        from[r] = a.left.data + min(at.row + row + r * 8, a.rows - 1) * a.left.stride + k;
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_block(const Args& a) {
    const int inside = a.depth - at.at - t * 4;  // numbers of the depth
    if constexpr (kAcross) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float (&x)[2][4] = v[k / 4];
        const float2 pair =
            kWhole || k / 4 * 16 + k % 4 < inside
                ? *reinterpret_cast<const float2*>(from[0] + (k / 4 * 16 + k % 4) * a.left.stride)
                : float2{};
        x[0][k % 4] = pair.x, x[1][k % 4] = pair.y;
      }
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float (&x)[4] = v[n / 2][n % 2];
        if (kWhole || n / 2 * 16 < inside) {
          load_4(x, from[n % 2] + n / 2 * 16);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = 0;
        }
      }
    }
  }
  __device__ __forceinline__ void load(const Args& a) {
    if (!at.more(a)) return;
    if (at.at + kBlock <= a.depth)
      load_block<true>(a);
    else
      load_block<false>(a);
    if (at.step(a)) return open(a);
#pragma unroll
    for (const float*& p : from) p += kAcross ? kBlock * a.left.stride : kBlock;
  }
  /// Fragments of what was loaded, and loads of the block after it.
  __device__ __forceinline__ void split(const Args& a, Fragments& f, int yes) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        std::uint32_t parts[kSplit] = {f[0][s][e]};
        split_after(v[s][e % 2][e / 2 * 2], v[s][e % 2][e / 2 * 2 + 1], parts, yes);
#pragma unroll
        for (int p = 0; p < kSplit; ++p) f[p][s][e] = parts[p];
      }
    pin_fragments(f);
    load(a);
  }
};

/// The warpgroups that read and split the right operand. A thread has a piece of eight neighbours
/// in memory for every 64 columns and half a buffer.
template <class Z, bool kAcross>
struct RightReader {
  static constexpr int kPieces = Z::kPanels;
  int warp, lane;
  Walk<Z::kColumns, kStageDepth> at;  // of the next loads
  float v[kPieces][8];
  const float* from[kPieces][kAcross ? 2 : 1];

  __device__ __forceinline__ RightReader(const Args& a, int warp_, int lane_)
      : warp(warp_), lane(lane_), at(a) {
    open(a);
  }
  /// Of a warp's eight, such that lanes 0..15 and 16..31 write to all banks.
  __device__ __forceinline__ int row_of_lane() const {
    return (lane >> 2 & 1) | (lane >> 3 & 1) << 2 | (lane >> 4 & 1) << 1;
  }
  /// Of the first number of a thread's pieces, from that of half a buffer.
  __device__ __forceinline__ int depth_of_lane() const {
    return kAcross ? warp * 4 + lane / 8 : lane % 4 * 8;
  }
  __device__ __forceinline__ void open(const Args& a) {
    const int k = at.at + depth_of_lane();
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int column = at.column + n * 64 + (kAcross ? lane % 8 * 8 : warp * 8 + row_of_lane());
      if constexpr (kAcross)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          from[n][e] = a.right.data + k * a.right.stride + min(column + 4 * e, a.columns - 4);
      else
        from[n][0] = a.right.data + min(column, a.columns - 1) * a.right.stride + k;
    }
  }
  __device__ __forceinline__ void step(const Args& a) {
    if (at.step(a)) return open(a);
#pragma unroll
    for (auto& piece : from)
#pragma unroll
      for (const float*& p : piece) p += kAcross ? kStageDepth * a.right.stride : kStageDepth;
  }

  __device__ __forceinline__ void load(const Args& a, int half, int n) {
    if (!at.more(a)) return;
    const bool whole = at.at + kStageDepth <= a.depth;
    const int k = at.at + depth_of_lane() + half * kBlock;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float (&x)[8] = v[n];
      if (whole || (kAcross ? k : k + 4 * e) < a.depth) {
        load_4(x + 4 * e, kAcross ? from[n][kAcross ? e : 0] + half * kBlock * a.right.stride
                                  : from[n][0] + half * kBlock + 4 * e);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * e + i] = 0;
      }
    }
  }

  __device__ __forceinline__ void store(std::uint32_t buffer, int half, int n) const {
    std::uint32_t parts[4][kSplit];  // of pairs
#pragma unroll
    for (int e = 0; e < 4; ++e) split(v[n][2 * e], v[n][2 * e + 1], parts[e]);
    const std::uint32_t panel = buffer + static_cast<std::uint32_t>(n * kPanelBytes);
    if constexpr (kAcross) {
      const int i = lane / 8;
      const int place = warp % 4 * 2 + i % 2 + i / 2 * 8;
      const std::uint32_t to =
          panel +
          static_cast<std::uint32_t>((half * kBlock + warp / 4 * 16 + place) * kPanelRowBytes +
                                     ((lane ^ place) % 8) * 16);
#pragma unroll
      for (int p = 0; p < kSplit; ++p)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + p * Z::kPartBytes),
                     "r"(parts[0][p]), "r"(parts[1][p]), "r"(parts[2][p]), "r"(parts[3][p])
                     : "memory");
    } else {
      const int chunk = (half * 4 + lane % 4 / 2 * 2) ^ row_of_lane();  // and its neighbour
      const std::uint32_t to =
          panel +
          static_cast<std::uint32_t>((warp * 8 + row_of_lane()) * kPanelRowBytes + lane % 2 * 8);
#pragma unroll
      for (int p = 0; p < kSplit; ++p)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          asm volatile(
              "st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + (chunk ^ e) * 16 + p * Z::kPartBytes),
              "r"(parts[e][p]), "r"(parts[e + 2][p])
              : "memory");
    }
  }
};

/// Asks for the left operand, [depth, rows] if kAcross, over a buffer of the depth: a thread for
/// one line of it.
template <class Z, bool kAcross>
__device__ __forceinline__ void prefetch_left(const Args& a,
                                              const Walk<Z::kColumns, kStageDepth>& w, int thread) {
  if (!w.more(a)) return;
  const std::int64_t row =
      kAcross ? min(w.at + thread / 4, a.depth - 1) : min(w.row + thread / 2, a.rows - 1);
  const int column = kAcross ? w.row + thread % 4 * 32 : w.at + thread % 2 * 32;
  prefetch_to_l2(a.left.data + row * a.left.stride + min(column, (kAcross ? a.rows : a.depth) - 1));
}

template <class Z, bool kAcrossLeft, bool kAcross>
__device__ __forceinline__ void split_right(const Args& a, const Shared<Z>& mem, int warp,
                                            int lane) {
  RightReader<Z, kAcross> reader(a, warp, lane);
#pragma unroll
  for (int n = 0; n < reader.kPieces; ++n) reader.load(a, 0, n);
  // Blocks of several tiles of the same rows, which read them at the same time: the first brings
  // them to L2. dx became 3 % faster; with fewer tiles or right not across it was slower.
  const bool prefetches = kAcross && a.column_tiles >= kPrefetchTiles;
  Walk<Z::kColumns, kStageDepth> far(a);
  const auto prefetch = [&] {
    prefetch_left<Z, kAcrossLeft>(a, far, warp * 32 + lane);
    far.step(a);
  };
  if (prefetches)
    for (int i = 0; i < kPrefetchStages; ++i) prefetch();
  Ring<Z::kStages> ring;
  for (Walk<Z::kColumns, kStageDepth> w(a); w.more(a); w.step(a)) {
    if (prefetches) prefetch();
    barrier_wait(mem.free(ring.stage), ring.parity ^ 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1) reader.step(a);
#pragma unroll
      for (int n = 0; n < reader.kPieces; ++n) {
        reader.store(mem.stage(ring.stage), half, n);
        reader.load(a, half ^ 1, n);
      }
    }
    fence_shared_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(mem.full(ring.stage));
    ring.next();
  }
}

/// c = the products of kBlock of the depth, small ones first. `right`: its first part.
template <class Z, bool kAcross>
__device__ __forceinline__ void multiply_block(typename Z::Sum& c, const Fragments& f,
                                               std::uint64_t right) {
  constexpr int kPairs[][2] = {{2, 0}, {0, 2}, {1, 1}, {1, 0}, {0, 1}, {0, 0}};
  constexpr int kStepBytes = kAcross ? 16 * kPanelRowBytes : 32;
  products_begin();
#pragma unroll
  for (int n = 0; n < 6; ++n)
#pragma unroll
    for (int s = 0; s < 2; ++s)
      multiply_registers<kAcross>(c, f[kPairs[n][0]][s],
                                  advance(right, kPairs[n][1] * Z::kPartBytes + s * kStepBytes),
                                  n + s > 0);
  products_commit();
}

/// A warpgroup that multiplies: 64 rows of every tile.
template <class Z, bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void multiply(const Args& a, const Shared<Z>& mem, int warp, int lane) {
  LeftBlock<Z, kAcrossLeft> left(a, warp, lane);
  Fragments f[2]{};
  left.load(a);
  left.split(a, f[0], 1);
  Ring<Z::kStages> ring;
  for (Walk<Z::kColumns, kStageDepth> w(a); w.more(a);
       w.open(a, w.item + static_cast<int>(gridDim.x))) {
    typename Z::Sum sum = {};
    const int begin = w.at;
    for (; w.at < w.end; w.at += kStageDepth) {
      barrier_wait(mem.full(ring.stage), ring.parity);
      const std::uint64_t right =
          panel_descriptor(mem.stage(ring.stage), kAcrossRight ? kPanelBytes : 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        typename Z::Sum c;
        multiply_block<Z, kAcrossRight>(
            c, f[half], advance(right, half * kBlock * (kAcrossRight ? kPanelRowBytes : 2)));
        // Not 0 in any case.
        left.split(a, f[half ^ 1], is_full(mem.full(ring.stage), ring.parity) | a.depth);
        products_wait<0>();
        pin(c);
        if (half == 1 && lane == 0) barrier_arrive(mem.free(ring.stage));
#pragma unroll
        for (int n = 0; n < Z::kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[n][e] += c[n][e];
      }
      ring.next();
    }
    const Strip<kAcrossLeft> strip{w.row + warp * 16, w.column, lane};
    correct<kAcrossLeft, kAcrossRight>(a, strip, begin, min(w.end, a.depth), {}, sum);
    store_strip(a, strip, a.y + w.part * a.part_size, sum);
  }
}

template <class Z, bool kAcrossLeft, bool kAcrossRight>
__global__ __launch_bounds__(kThreads,
                             1) void float32_product_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  if (threadIdx.x == 0) mem.init_barriers();
  __syncthreads();
  wait_for_previous_kernel();
  const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (warp >= 4 * kGroups) {
    give_registers<48>();
    split_right<Z, kAcrossLeft, kAcrossRight>(a, mem, warp - 4 * kGroups, lane);
  } else {
    take_registers<208>();
    multiply<Z, kAcrossLeft, kAcrossRight>(a, mem, warp, lane);
  }
}

template <class Z>
void launch(Context& ctx, const Product& p, const Args& a) {
  const auto run = [&](auto kernel) {
    LRNN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
    launch_overlapped(kernel, static_cast<unsigned>(std::min(a.items, multiprocessors())), kThreads,
                      Z::kShared, ctx.stream().handle, a);
  };
  if (p.left.across) return run(float32_product_kernel<Z, true, true>);
  if (p.right.across) return run(float32_product_kernel<Z, false, true>);
  run(float32_product_kernel<Z, false, false>);
}

Plan plan_of(const Product& p) {
  return {p, kCosts[p.columns <= 64 ? 0 : 1]};
}

}  // namespace

bool applies(const Product& p) {
  return suits(p, p.left.across ? 2 : 4, 4);
}

double time(const Product& p) {
  return plan_of(p).time;
}

void run(Context& ctx, const Product& p) {
  run_in_parts(ctx, p, plan_of(p), [&](const Args& a) {
    if (p.columns <= 64)
      launch<Tile<64>>(ctx, p, a);
    else
      launch<Tile<128>>(ctx, p, a);
  });
}

}  // namespace lrnn::cuda::linear_float32_sm90::bfloat16x3
