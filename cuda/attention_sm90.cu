// Forward attention on Hopper: warpgroup products fed by tensor copies.
//
// A block is resident on its SM and walks items, each a tile of queries of one head. One warpgroup
// copies: the queries of an item while the one before is in work, then tiles of keys and values
// through kStages buffers each.
// The others own 64 queries each; while their products of one tile run, they take the softmax of
// the next, and they take turns so that the softmax of one runs under the products of another.
// Bound by the tensor cores at d = 128, equally by exp2 at d = 64.
#include "common/attention_wgmma.cuh"

namespace lrnn::cuda::attention {
namespace {

/// Queries in rows, keys in columns.
template <int kDim, int kConsumers, int kCols, int kStages>
struct Tile : TileSizes<kDim, kConsumers, kCols, kStages> {
  using Base = TileSizes<kDim, kConsumers, kCols, kStages>;
  static constexpr int kQueryPanel = Base::kRows * kPanelRowBytes;
  static constexpr int kKeyPanel = kCols * kPanelRowBytes;
  static constexpr int kQueryBytes = Base::kPanels * kQueryPanel;
  static constexpr int kKeyBytes = Base::kPanels * kKeyPanel;
  static constexpr int kBarriers = 4 + 4 * kStages;
  static constexpr int kShared = 1024 + 2 * kQueryBytes + 2 * kStages * kKeyBytes + 8 * kBarriers;
};

struct Maps {
  CUtensorMap q, k, v;
};

struct Args {
  Sizes z;
  DeviceRows<bf16> o;
  float* lse;
  int tiles;    // of queries per head
  int section;  // heads that are taken together
};

/// Shared addresses of the tiles and barriers of a block.
template <class Z>
struct Shared {
  std::uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* p)
      : base((shared_address(p) + 1023U) & ~1023U) {}
  __device__ __forceinline__ std::uint32_t queries(int stage) const {
    return base + static_cast<std::uint32_t>(stage * Z::kQueryBytes);
  }
  __device__ __forceinline__ std::uint32_t keys(int stage) const {
    return queries(2) + static_cast<std::uint32_t>(stage * Z::kKeyBytes);
  }
  __device__ __forceinline__ std::uint32_t values(int stage) const {
    return keys(Z::kStages + stage);
  }
  __device__ __forceinline__ std::uint32_t barrier(int i) const {
    return keys(2 * Z::kStages) + 8U * static_cast<std::uint32_t>(i);
  }
  __device__ __forceinline__ std::uint32_t queries_full(int s) const { return barrier(s); }
  __device__ __forceinline__ std::uint32_t queries_free(int s) const { return barrier(2 + s); }
  __device__ __forceinline__ std::uint32_t keys_full(int s) const { return barrier(4 + s); }
  __device__ __forceinline__ std::uint32_t keys_free(int s) const {
    return barrier(4 + Z::kStages + s);
  }
  __device__ __forceinline__ std::uint32_t values_full(int s) const {
    return barrier(4 + 2 * Z::kStages + s);
  }
  __device__ __forceinline__ std::uint32_t values_free(int s) const {
    return barrier(4 + 3 * Z::kStages + s);
  }

  __device__ void init_barriers() const {
    constexpr int kReaders = 4 * Z::kConsumers;  // warps
    for (int s = 0; s < 2; ++s) {
      barrier_init(queries_full(s), 1);
      barrier_init(queries_free(s), kReaders);
    }
    for (int s = 0; s < Z::kStages; ++s) {
      barrier_init(keys_full(s), 1);
      barrier_init(keys_free(s), kReaders);
      barrier_init(values_full(s), 1);
      barrier_init(values_free(s), kReaders);
    }
    barrier_init_done();
  }
};

/// An item and the keys it needs.
template <class Z>
struct Work {
  int head, b, first;
  Sequence seq;
  int count;  // key tiles

  __device__ __forceinline__ Work(const Args& a, const SectionItem& item)
      : head(item.head),
        b(item.b),
        first(item.tile * Z::kRows),
        seq(a.z, item.b),
        count(first < seq.length
                  ? (seq.visible(min(first + Z::kRows, seq.length) - 1) + Z::kCols - 1) / Z::kCols
                  : 0) {}
};

// The thread that copies.
template <class Z>
__device__ __forceinline__ void copy_items(const Args& a, const Maps& maps, const Shared<Z>& mem) {
  Ring<2> queries;
  Ring<Z::kStages> keys;
  for (ItemWalk walk(a.z.heads, a.z.batch, a.tiles, a.section, true); walk.valid(); walk.next()) {
    const Work<Z> w(a, walk.item());
    if (w.count == 0) continue;
    const int head_kv = w.head / a.z.group();
    barrier_wait(mem.queries_free(queries.stage), queries.parity ^ 1);
    barrier_expect(mem.queries_full(queries.stage), Z::kQueryBytes);
    copy_rows<Z::kPanels, Z::kQueryPanel>(mem.queries(queries.stage), &maps.q,
                                          mem.queries_full(queries.stage), w.head, w.first, w.b);
    queries.next();
    for (int j = 0; j < w.count; ++j, keys.next()) {
      barrier_wait(mem.keys_free(keys.stage), keys.parity ^ 1);
      barrier_expect(mem.keys_full(keys.stage), Z::kKeyBytes);
      copy_rows<Z::kPanels, Z::kKeyPanel>(mem.keys(keys.stage), &maps.k, mem.keys_full(keys.stage),
                                          head_kv, j * Z::kCols, w.b);
      barrier_wait(mem.values_free(keys.stage), keys.parity ^ 1);
      barrier_expect(mem.values_full(keys.stage), Z::kKeyBytes);
      copy_rows<Z::kPanels, Z::kKeyPanel>(mem.values(keys.stage), &maps.v,
                                          mem.values_full(keys.stage), head_kv, j * Z::kCols, w.b);
    }
  }
}

/// One warpgroup that computes.
template <class Z>
struct Consumer {
  static constexpr int kPairThreads = 2 * kWarpgroup;
  static constexpr int kTurn = 1;                     // first named barrier of the turns
  static constexpr int kOwn = kTurn + Z::kConsumers;  // first one within a warpgroup

  const Shared<Z>& mem;
  int group, lane, warp;
  float log2_scale;
  float out[Z::kDimTiles][4];
  float max[2];
  float sum[2];
  Ring<2> queries;
  Ring<Z::kStages> keys;
  Ring<Z::kStages> values;

  __device__ __forceinline__ void wait_turn() const { group_wait(kTurn + group, kPairThreads); }
  __device__ __forceinline__ void pass_turn() const {
    group_arrive(kTurn + (group + 1 == Z::kConsumers ? 0 : group + 1), kPairThreads);
  }
  __device__ __forceinline__ void release(std::uint32_t barrier) const {
    if (lane == 0) barrier_arrive(barrier);
  }

  // Starts c = Q K^T.
  __device__ __forceinline__ void start_scores(float (&c)[Z::kColTiles][4]) const {
    start_product_transposed<Z::kPanels, Z::kQueryPanel, Z::kKeyPanel>(
        c, mem.queries(queries.stage) + static_cast<std::uint32_t>(group * 64 * kPanelRowBytes),
        mem.keys(keys.stage));
    products_commit();
  }
  // Starts out += P V.
  __device__ __forceinline__ void start_output(const std::uint32_t (&p)[Z::kCols / 16][4]) {
    start_product<Z::kKeyPanel>(out, p, mem.values(values.stage));
    products_commit();
  }

  // Waits for a tile of values. Those of keys beyond the sequence may be anything, and 0 times
  // infinity is no 0: they are cleared.
  __device__ __forceinline__ void wait_values(const Sizes& z, const Work<Z>& w, int j) const {
    barrier_wait(mem.values_full(values.stage), values.parity);
    const int valid = w.seq.keys - j * Z::kCols;
    if (valid >= Z::kCols || w.seq.keys >= z.slots) return;
    clear_tail<Z::kPanels, Z::kKeyPanel>(mem.values(values.stage), valid, warp * 32 + lane);
    fence_shared_async();
    group_wait(kOwn + group, kWarpgroup);
  }

  __device__ __forceinline__ void mask(float (&c)[Z::kColTiles][4], const Work<Z>& w, int j) const {
    const int row = w.first + group * 64;
    if ((j + 1) * Z::kCols <= w.seq.visible(row)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int visible =
          w.seq.visible(row + warp * 16 + half * 8 + lane / 4) - j * Z::kCols - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n) {
        if (n * 8 >= visible) c[n][2 * half] = -INFINITY;
        if (n * 8 + 1 >= visible) c[n][2 * half + 1] = -INFINITY;
      }
    }
  }

  // Scores become probabilities relative to the running maximum (in units of log2); returns by what
  // earlier sums shrink.
  __device__ __forceinline__ void softmax(float (&c)[Z::kColTiles][4], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n)
        top = fmaxf(top, fmaxf(c[n][2 * half], c[n][2 * half + 1]));
      // Finite from the first tile on, since every query sees key 0.
      top = fmaxf(max[half], quad_max(top) * log2_scale);
      shrink[half] = exp2_approx(max[half] - top);
      max[half] = top;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < Z::kColTiles; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          c[n][e] = exp2_approx(fmaf(c[n][e], log2_scale, -top));
          part += c[n][e];
        }
      sum[half] = fmaf(sum[half], shrink[half], part);
    }
  }

  __device__ __forceinline__ void attend(const Args& a, const Work<Z>& w) {
    float c[Z::kColTiles][4];
    std::uint32_t p[Z::kCols / 16][4];
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = -INFINITY;
      sum[half] = 0.0F;
    }
    clear_tiles(out);
    barrier_wait(mem.queries_full(queries.stage), queries.parity);
    barrier_wait(mem.keys_full(keys.stage), keys.parity);
    pin(c);
    products_begin();
    start_scores(c);
    products_wait<0>();
    pin(c);
    release(mem.keys_free(keys.stage));
    keys.next();
    mask(c, w, 0);
    softmax(c, shrink);
    pack_tiles(p, c);
#pragma unroll 1
    for (int j = 1; j < w.count; ++j) {
      barrier_wait(mem.keys_full(keys.stage), keys.parity);
      wait_turn();
      pin(c);
      pin(out);
      products_begin();
      start_scores(c);
      wait_values(a.z, w, j - 1);
      products_begin();
      start_output(p);
      pass_turn();
      products_wait<1>();
      pin(c);
      release(mem.keys_free(keys.stage));
      keys.next();
      mask(c, w, j);
      softmax(c, shrink);
      products_wait<0>();
      pin(out);
      release(mem.values_free(values.stage));
      values.next();
      pack_tiles(p, c);
#pragma unroll
      for (int n = 0; n < Z::kDimTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
    }
    release(mem.queries_free(queries.stage));
    queries.next();
    wait_values(a.z, w, w.count - 1);
    pin(out);
    products_begin();
    start_output(p);
    products_wait<0>();
    pin(out);
    release(mem.values_free(values.stage));
    values.next();
  }

  __device__ __forceinline__ void store(const Args& a, const Work<Z>& w) const {
    const int row0 = w.first + group * 64 + warp * 16;
    const std::int64_t stats = (static_cast<std::int64_t>(w.b) * a.z.heads + w.head) * a.z.seqlen;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[half]);
      inverse[half] = 1.0F / total;
      const int row = row0 + half * 8 + lane / 4;
      if (a.lse != nullptr && lane % 4 == 0 && row < a.z.seqlen)
        a.lse[stats + row] = row < w.seq.length ? (max[half] + log2f(total)) * kLn2 : 0.0F;
    }
    store_rows(head_of(a.o, w.b, a.z.seqlen, w.head, a.z.head_dim), row0, w.seq.length, a.z.seqlen,
               a.z.head_dim, out, inverse, lane);
  }

  __device__ __forceinline__ void run(const Args& a) {
    if (group == Z::kConsumers - 1) pass_turn();  // the first warpgroup begins
    for (ItemWalk walk(a.z.heads, a.z.batch, a.tiles, a.section, true); walk.valid(); walk.next()) {
      const Work<Z> w(a, walk.item());
      if (w.count > 0) attend(a, w);
      store(a, w);
    }
  }
};

template <class Z>
__global__ __launch_bounds__(Z::kThreads, 1) void attention_forward_sm90_kernel(
    Args a, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Shared<Z> mem(shared);
  share_out<Z>(
      mem, [&] { copy_items<Z>(a, maps, mem); },
      [&](int group) {
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
        Consumer<Z> consumer{.mem = mem,
                             .group = group,
                             .lane = thread % 32,
                             .warp = thread / 32,
                             .log2_scale = a.z.scale * kLog2e};
        consumer.run(a);
      });
}

template <class Z>
void launch_forward(Context& ctx, const ForwardArgs<bf16>& f) {
  const std::int64_t batch = f.z.batch;
  const HeadRows q{batch, f.z.seqlen, f.z.heads, f.z.head_dim, f.q.stride};
  const HeadRows k{batch, f.z.slots, f.z.heads_kv, f.z.head_dim, f.k.stride};
  const HeadRows v{batch, f.z.slots, f.z.heads_kv, f.z.head_dim, f.v.stride};
  const Maps maps{head_map(f.q.data, q, Z::kRows), head_map(f.k.data, k, Z::kCols),
                  head_map(f.v.data, v, Z::kCols)};
  const std::int64_t streamed = std::int64_t{4} * f.z.slots * f.z.head_dim / f.z.group();
  const Args args{f.z, f.o, f.lse, tiles_of(f.z.seqlen, Z::kRows),
                  heads_of_section(batch * f.z.heads, streamed)};
  const std::int64_t items = batch * f.z.heads * args.tiles;
  LRNN_CHECK(items <= INT_MAX / 2, InvalidArgument, "attention: too many tiles: ", items);
  const auto kernel = attention_forward_sm90_kernel<Z>;
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kShared));
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, multiprocessors()));
  kernel<<<blocks, Z::kThreads, Z::kShared, ctx.stream().handle>>>(args, maps);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

void forward_sm90(Context& ctx, const ForwardArgs<bf16>& args) {
  if (args.z.head_dim <= 64) return launch_forward<Tile<64, 3, 128, 2>>(ctx, args);
  launch_forward<Tile<128, 2, 128, 2>>(ctx, args);
}

}  // namespace lrnn::cuda::attention
