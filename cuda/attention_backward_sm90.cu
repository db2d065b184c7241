// Backward attention on Hopper: warpgroup products fed by tensor copies.
//
// Two passes of one structure. A block owns a tile of rows of one head, keys in the pass for dK and
// dV, queries in the pass for dQ, and walks the tiles of the other side that meet it. One warpgroup
// copies; each of the others owns 64 rows, and computes with X, Y the owned operands and U, W the
// streamed ones: S = X U^T, P, dP = Y W^T, dS, and the sums dS U and (keys only) P W, which stay in
// registers until the end. The owned rows of an item are copied while the one before is in work. P
// and dS are left operands in registers and touch no memory. Bound by the tensor cores and the
// reads of their operands from shared memory.
#include "common/attention_wgmma.cuh"

namespace lrnn::cuda::attention {
namespace {

enum class Side { Keys, Queries };

/// The owned side in rows, the streamed one in columns.
template <Side kSide, int kDim, int kConsumers, int kCols, int kStages>
struct Tile : TileSizes<kDim, kConsumers, kCols, kStages> {
  using Base = TileSizes<kDim, kConsumers, kCols, kStages>;
  static constexpr bool kKeys = kSide == Side::Keys;
  static constexpr int kOwnPanel = Base::kRows * kPanelRowBytes;
  static constexpr int kColPanel = kCols * kPanelRowBytes;
  static constexpr int kOwnBytes = Base::kPanels * kOwnPanel;
  static constexpr int kColBytes = Base::kPanels * kColPanel;
  static constexpr int kStatBytes = kKeys ? 2 * kCols * 4 : 0;
  /// Of a warp, when it leaves a streamed tile: each lane for the statistics that it has read, which
  /// racecheck does not follow through another lane's arrival.
  static constexpr int kLeaving = kKeys ? 32 : 1;
  static constexpr int kBarriers = 4 + 3 * kStages;
  static constexpr int kShared =
      1024 + 4 * kOwnBytes + kStages * (2 * kColBytes + kStatBytes) + 8 * kBarriers;
  static_assert(!kKeys || kCols == kStatRows);
};

struct Maps {
  CUtensorMap own[2], streamed[2];
};

struct Args {
  BackwardArgs<bf16> in;
  const float* stats;  // [B, Hq, tiles of kStatRows queries, 2, kStatRows]: lse / ln 2, Delta
  int stat_tiles;      // per head
  int tiles;           // of owned rows per head
  int section;

  __device__ const float* stats_of(int b, int head, int tile) const {
    return stats +
           ((static_cast<std::int64_t>(b) * in.z.heads + head) * stat_tiles + tile) * 2 * kStatRows;
  }
};

/// Shared addresses of the tiles and barriers of a block.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t own(int stage, int which) const {
    return base + static_cast<std::uint32_t>((2 * stage + which) * Z::kOwnBytes);
  }
  __device__ __forceinline__ std::uint32_t streamed(int stage, int which) const {
    return own(2, 0) + static_cast<std::uint32_t>((2 * stage + which) * Z::kColBytes);
  }
  __device__ __forceinline__ std::uint32_t stats(int stage) const {
    return streamed(Z::kStages, 0) + static_cast<std::uint32_t>(stage * Z::kStatBytes);
  }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return stats(Z::kStages) + 8U * static_cast<std::uint32_t>(i);
  }
  __device__ __forceinline__ std::uint32_t own_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ std::uint32_t own_free(int stage) const { return barrier(2 + stage); }
  __device__ __forceinline__ std::uint32_t full(int stage, int which) const {
    return barrier(4 + 2 * stage + which);
  }
  __device__ __forceinline__ std::uint32_t free(int stage) const {
    return barrier(4 + 2 * Z::kStages + stage);
  }

  __device__ void init_barriers() const {
    constexpr int kReaders = 4 * Z::kConsumers;  // warps
    for (int s = 0; s < 2; ++s) {
      barrier_init(own_full(s), 1);
      barrier_init(own_free(s), kReaders);
    }
    for (int s = 0; s < Z::kStages; ++s) {
      barrier_init(full(s, 0), 1);
      barrier_init(full(s, 1), 1);
      barrier_init(free(s), kReaders * Z::kLeaving);
    }
    barrier_init_done();
  }
};

/// An item and the streamed rows it needs: [begin, end) of each of `heads` heads.
template <class Z>
struct Work {
  int head, b, first;
  Sequence seq;
  int first_head, heads;
  int begin, end;

  __device__ __forceinline__ Work(const Sizes& z, const SectionItem& item)
      : head(item.head), b(item.b), first(item.tile * Z::kRows), seq(z, item.b) {
    if constexpr (Z::kKeys) {
      first_head = head * z.group();
      heads = z.group();
      begin = seq.causal ? max(0, first - seq.offset) / Z::kCols * Z::kCols : 0;
      end = first < seq.keys ? seq.length : 0;
    } else {
      first_head = head / z.group();
      heads = 1;
      begin = 0;
      end = first < seq.length ? seq.visible(min(first + Z::kRows, seq.length) - 1) : 0;
    }
  }
  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

template <class Z>
__device__ __forceinline__ ItemWalk items_of(const Args& a) {
  const Sizes& z = a.in.z;
  return {Z::kKeys ? z.heads_kv : z.heads, z.batch, a.tiles, a.section, !Z::kKeys};
}

// The thread that copies.
template <class Z>
__device__ __forceinline__ void copy_items(const Args& a, const Maps& maps, const Shared<Z>& mem) {
  Ring<2> own;
  Ring<Z::kStages> ring;
  for (ItemWalk walk = items_of<Z>(a); walk.valid(); walk.next()) {
    const Work<Z> w(a.in.z, walk.item());
    if (w.empty()) continue;
    barrier_wait(mem.own_free(own.stage), own.parity ^ 1);
    barrier_expect(mem.own_full(own.stage), 2 * Z::kOwnBytes);
    for (int which = 0; which < 2; ++which)
      copy_rows<Z::kPanels, Z::kOwnPanel>(mem.own(own.stage, which), &maps.own[which],
                                          mem.own_full(own.stage), w.head, w.first, w.b);
    own.next();
    for (int head = w.first_head; head < w.first_head + w.heads; ++head)
      for (int i = w.begin; i < w.end; i += Z::kCols, ring.next()) {
        const int s = ring.stage;
        barrier_wait(mem.free(s), ring.parity ^ 1);
        barrier_expect(mem.full(s, 0), Z::kColBytes + Z::kStatBytes);
        copy_rows<Z::kPanels, Z::kColPanel>(mem.streamed(s, 0), &maps.streamed[0], mem.full(s, 0),
                                            head, i, w.b);
        if constexpr (Z::kKeys)
          copy_bytes(mem.stats(s), a.stats_of(w.b, head, i / kStatRows), Z::kStatBytes,
                     mem.full(s, 0));
        barrier_expect(mem.full(s, 1), Z::kColBytes);
        copy_rows<Z::kPanels, Z::kColPanel>(mem.streamed(s, 1), &maps.streamed[1], mem.full(s, 1),
                                            head, i, w.b);
      }
  }
}

/// One warpgroup that computes.
template <class Z>
struct Consumer {
  static constexpr int kOwn = 1;  // first named barrier within a warpgroup
  static constexpr int kInner = Z::kCols / 16;

  const Args& a;
  const Shared<Z>& mem;
  int group, lane, warp;
  float log2_scale;
  float first_sum[Z::kDimTiles][4];                  // dK or dQ
  float second_sum[Z::kKeys ? Z::kDimTiles : 1][4];  // dV
  float row_stats[2][2];                             // of owned queries
  Ring<2> own;
  Ring<Z::kStages> ring;

  __device__ __forceinline__ void release_streamed(int stage) const {
    if (lane < Z::kLeaving) barrier_arrive(mem.free(stage));
  }
  __device__ __forceinline__ int row0(const Work<Z>& w) const {
    return w.first + group * 64 + warp * 16 + lane / 4;
  }

  // Waits for the streamed tile at row i. What lies at padding is cleared.
  __device__ __forceinline__ void wait_tile(const Work<Z>& w, int i, int which) const {
    barrier_wait(mem.full(ring.stage, which), ring.parity);
    const int rows = Z::kKeys ? w.seq.length : w.seq.keys;
    const int limit = Z::kKeys ? a.in.z.seqlen : a.in.z.slots;
    if (i + Z::kCols <= rows || rows >= limit) return;
    clear_tail<Z::kPanels, Z::kColPanel>(mem.streamed(ring.stage, which), rows - i,
                                         warp * 32 + lane);
    fence_shared_async();
    group_wait(kOwn + group, kWarpgroup);
  }

  // lse (0) or Delta (1) of the rows 0, 1 of C tile n (queries) or of its columns 0, 1 (keys).
  __device__ __forceinline__ float2 statistics(int which, int n) const {
    if constexpr (!Z::kKeys) return {row_stats[which][0], row_stats[which][1]};
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(mem.stats(ring.stage) +
                       4U * static_cast<std::uint32_t>(which * kStatRows + n * 8 + lane % 4 * 2))
                 : "memory");
    return v;
  }
  // Whether element e of a C tile takes the second of two statistics.
  __device__ static constexpr bool second(int e) { return Z::kKeys ? e % 2 == 1 : e / 2 == 1; }

  // Scores become probabilities.
  __device__ __forceinline__ void probabilities(float (&c)[Z::kColTiles][4], const Work<Z>& w,
                                                int i) const {
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n) {
      const float2 lse = statistics(0, n);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        c[n][e] = exp2_approx(fmaf(c[n][e], log2_scale, second(e) ? -lse.y : -lse.x));
    }
    const int row = w.first + group * 64;
    if constexpr (Z::kKeys) {
      // Keys beyond the sequence are left out at the end; queries beyond it have lse = inf.
      if (!w.seq.causal || row + 63 <= w.seq.offset + i) return;
      const int ahead = row0(w) - w.seq.offset - i - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (ahead + e / 2 * 8 > n * 8 + e % 2) c[n][e] = 0.0F;
    } else {
      if (i + Z::kCols <= w.seq.visible(row)) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int visible = w.seq.visible(row0(w) + half * 8) - i - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < Z::kColTiles; ++n) {
          if (n * 8 >= visible) c[n][2 * half] = 0.0F;
          if (n * 8 + 1 >= visible) c[n][2 * half + 1] = 0.0F;
        }
      }
    }
  }

  // One streamed tile. Its last product is left in flight; the buffer of the tile before, if any,
  // is freed when its own has been done.
  __device__ __forceinline__ void tile(const Work<Z>& w, int i, bool is_first) {
    float p[Z::kColTiles][4];
    float dp[Z::kColTiles][4];
    std::uint32_t fragments[kInner][4];
    const auto rows = static_cast<std::uint32_t>(group * 64 * kPanelRowBytes);
    wait_tile(w, i, 0);
    pin(p);
    products_begin();
    start_product_transposed<Z::kPanels, Z::kOwnPanel, Z::kColPanel>(
        p, mem.own(own.stage, 0) + rows, mem.streamed(ring.stage, 0));
    products_commit();
    wait_tile(w, i, 1);
    products_wait<0>();  // before dP takes registers that the sum before has to leave
    pin(p);
    if (!is_first) release_streamed(ring.before());
    pin(dp);
    products_begin();
    start_product_transposed<Z::kPanels, Z::kOwnPanel, Z::kColPanel>(
        dp, mem.own(own.stage, 1) + rows, mem.streamed(ring.stage, 1));
    products_commit();
    probabilities(p, w, i);
    if constexpr (Z::kKeys) {
      std::uint32_t left[kInner][4];
      pack_tiles(left, p);
      products_begin();
      start_product<Z::kColPanel>(second_sum, left, mem.streamed(ring.stage, 1));
      products_commit();
    }
    products_wait<Z::kKeys ? 1 : 0>();
    pin(dp);
#pragma unroll
    for (int n = 0; n < Z::kColTiles; ++n) {
      const float2 delta = statistics(1, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] *= dp[n][e] - (second(e) ? delta.y : delta.x);
    }
    pack_tiles(fragments, p);
    products_begin();
    start_product<Z::kColPanel>(first_sum, fragments, mem.streamed(ring.stage, 0));
    products_commit();
  }

  __device__ __forceinline__ void load_row_stats(const Work<Z>& w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0(w) + half * 8;
      const bool valid = row < w.seq.length;
      const float* const from = a.stats_of(w.b, w.head, row / kStatRows) + row % kStatRows;
      row_stats[0][half] = valid ? from[0] : INFINITY;
      row_stats[1][half] = valid ? from[kStatRows] : 0.0F;
    }
  }

  __device__ __forceinline__ void sum_tiles(const Work<Z>& w) {
    if constexpr (!Z::kKeys) load_row_stats(w);
    barrier_wait(mem.own_full(own.stage), own.parity);
    for (int head = w.heads; head > 0; --head)
#pragma unroll 1
      for (int i = w.begin; i < w.end; i += Z::kCols, ring.next())
        tile(w, i, i == w.begin && head == w.heads);
    products_wait<0>();
    pin(first_sum);
    pin(second_sum);
    release_streamed(ring.before());
    if (lane == 0) barrier_arrive(mem.own_free(own.stage));
    own.next();
  }

  __device__ __forceinline__ void store(const Work<Z>& w) const {
    const Sizes& z = a.in.z;
    const int row = w.first + group * 64 + warp * 16;
    const float scale[2] = {z.scale, z.scale};
    const float one[2] = {1.0F, 1.0F};
    if constexpr (Z::kKeys) {
      store_rows(head_of(a.in.dk, w.b, z.slots, w.head, z.head_dim), row, w.seq.keys, z.slots,
                 z.head_dim, first_sum, scale, lane);
      store_rows(head_of(a.in.dv, w.b, z.slots, w.head, z.head_dim), row, w.seq.keys, z.slots,
                 z.head_dim, second_sum, one, lane);
    } else {
      store_rows(head_of(a.in.dq, w.b, z.seqlen, w.head, z.head_dim), row, w.seq.length, z.seqlen,
                 z.head_dim, first_sum, scale, lane);
    }
  }

  __device__ __forceinline__ void run() {
    for (ItemWalk walk = items_of<Z>(a); walk.valid(); walk.next()) {
      const Work<Z> w(a.in.z, walk.item());
      clear_tiles(first_sum);
      clear_tiles(second_sum);
      if (!w.empty()) sum_tiles(w);
      store(w);
    }
  }
};

template <class Z>
__global__ __launch_bounds__(Z::kThreads, 1) void attention_backward_sm90_kernel(
    Args a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  share_out<Z>(
      mem, [&] { copy_items<Z>(a, maps, mem); },
      [&](int group) {
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
        Consumer<Z> consumer{.a = a,
                             .mem = mem,
                             .group = group,
                             .lane = thread % 32,
                             .warp = thread / 32,
                             .log2_scale = a.in.z.scale * kLog2e};
        consumer.run();
      });
}

constexpr int kStatThreads = 256;
constexpr int kStatLanes = 16;  // of one row of a head; each reads 8 elements

// Sixteen lanes own one head of one position, padded ones included. Bound by HBM.
__global__ __launch_bounds__(kStatThreads) void attention_statistics_kernel(Args a, float* stats) {
  const Sizes& z = a.in.z;
  const std::int64_t rows = std::int64_t{a.stat_tiles} * kStatRows;
  const std::int64_t item =
      (static_cast<std::int64_t>(blockIdx.x) * kStatThreads + threadIdx.x) / kStatLanes;
  const int head = static_cast<int>(item % z.heads);
  const std::int64_t b = item / z.heads / rows;
  const int t = static_cast<int>(item / z.heads % rows);
  const int c = static_cast<int>(threadIdx.x) % kStatLanes * 8;
  const bool valid = b < z.batch && t < z.length(static_cast<int>(b));
  float sum = 0.0F;
  if (valid && c < z.head_dim) {
    const std::int64_t row = b * z.seqlen + t;
    float o[8];
    float d_o[8];
    load_vec<bf16, 8>(a.in.o.row(row) + std::int64_t{head} * z.head_dim + c, o);
    load_vec<bf16, 8>(a.in.d_o.row(row) + std::int64_t{head} * z.head_dim + c, d_o);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = fmaf(o[e], d_o[e], sum);
  }
#pragma unroll
  for (int offset = kStatLanes / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
  if (b >= z.batch || threadIdx.x % kStatLanes != 0) return;
  const std::int64_t pair = b * z.heads + head;
  float* const to = stats + (pair * a.stat_tiles + t / kStatRows) * 2 * kStatRows + t % kStatRows;
  to[0] = valid ? a.in.lse[pair * z.seqlen + t] * kLog2e : INFINITY;
  to[kStatRows] = sum;
}

template <class Z>
void launch_pass(Context& ctx, Args args) {
  const BackwardArgs<bf16>& in = args.in;
  const Sizes& z = in.z;
  const auto map = [&](const DeviceRows<const bf16>& rows, bool keys, int box) {
    const HeadRows shape{z.batch, keys ? z.slots : z.seqlen, keys ? z.heads_kv : z.heads,
                         z.head_dim, rows.stride};
    return head_map(rows.data, shape, box);
  };
  constexpr int kKeyBox = Z::kKeys ? Z::kRows : Z::kCols;
  constexpr int kQueryBox = Z::kKeys ? Z::kCols : Z::kRows;
  const CUtensorMap k = map(in.k, true, kKeyBox);
  const CUtensorMap v = map(in.v, true, kKeyBox);
  const CUtensorMap q = map(in.q, false, kQueryBox);
  const CUtensorMap d_o = map(in.d_o, false, kQueryBox);
  const Maps maps = Z::kKeys ? Maps{{k, v}, {q, d_o}} : Maps{{q, d_o}, {k, v}};
  const std::int64_t heads = std::int64_t{z.batch} * (Z::kKeys ? z.heads_kv : z.heads);
  const std::int64_t rows = Z::kKeys ? std::int64_t{z.seqlen} * z.group() : z.slots / z.group();
  args.tiles = tiles_of(Z::kKeys ? z.slots : z.seqlen, Z::kRows);
  args.section = heads_of_section(heads, 4 * rows * z.head_dim);
  const std::int64_t items = heads * args.tiles;
  LRNN_CHECK(items <= INT_MAX / 2, InvalidArgument, "attention: too many tiles: ", items);
  const auto kernel = attention_backward_sm90_kernel<Z>;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, multiprocessors()));
  kernel<<<blocks, Z::kThreads, Z::kShared, ctx.stream().handle>>>(args, maps);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

void backward_sm90(Context& ctx, const BackwardArgs<bf16>& in) {
  const int stat_tiles = tiles_of(in.z.seqlen, kStatRows);
  const std::int64_t pairs = std::int64_t{in.z.batch} * in.z.heads;
  Tensor stats = ctx.empty({pairs, stat_tiles, 2, kStatRows}, DType::float32);
  float* const data = stats.view().data<float>();
  const Args args{.in = in, .stats = data, .stat_tiles = stat_tiles, .tiles = 0, .section = 0};
  const std::int64_t threads = pairs * stat_tiles * kStatRows * kStatLanes;
  attention_statistics_kernel<<<static_cast<unsigned>((threads + kStatThreads - 1) / kStatThreads),
                                kStatThreads, 0, ctx.stream().handle>>>(args, data);
  LRNN_CUDA_CHECK_LAUNCH();
  if (in.z.head_dim <= 64) {
    launch_pass<Tile<Side::Keys, 64, 2, 64, 4>>(ctx, args);
    launch_pass<Tile<Side::Queries, 64, 3, 64, 4>>(ctx, args);
  } else {
    launch_pass<Tile<Side::Keys, 128, 2, 64, 2>>(ctx, args);
    launch_pass<Tile<Side::Queries, 128, 2, 64, 2>>(ctx, args);
  }
}

}  // namespace lrnn::cuda::attention
