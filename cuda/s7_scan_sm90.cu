// S7's contractions on Hopper, for H up to 256: warpgroup products whose other operand is packed
// weights, copied in the order in which they are used.
//
// drive and ds are sums over channels of products: drive[n] = sum_h x[h] sum_k W[(h, n), k] x[k].
//   A block owns 128 tokens, whose rows of x stay in shared memory; a warpgroup owns 64 of them and
//   walks tiles of 16 channels by 16 states. Columns (h, n) of a tile, n fastest, put the same
//   states of all channels into the same thread: its sums over channels need no other thread. The
//   quadratic form of the drive reads one triangle of W_n + W_n^T only, half of the products.
// y and dx are products over (n, k): y[h] = sum_{n, k} W_C[(h, n), k] (s[n] x[k]).
//   A block owns 128 tokens and all columns; fragments of x are scaled by s[n] in registers.
//   dx[k] adds sum_{n, h} (g[n] x[h]) (W_B[(k, n), h] + W_B[(h, n), k]), the gradient of the
//   quadratic form, and the same of dy, s and W_C.
// One warp copies weights through a ring of buffers.
#include <algorithm>

#include "common/capability.cuh"
#include "common/s7_sm90.cuh"
#include "common/vec.cuh"
#include "common/wgmma_wide.cuh"

namespace lrnn::cuda::s7 {
namespace {

constexpr int kRows = 128;  // tokens of a block
constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kBlock = kWarpgroup * (kGroups + 1);
// Of a thread of those that copy and those that compute.
constexpr int kCopyRegisters = 24;
constexpr int kProductRegisters = 240;
constexpr int kStates = 16;  // states and channels of a tile of a contraction over channels
constexpr int kChannels = 16;
constexpr int kSmallRows = 2 * kStates;  // rows of A and bias of a tile

/// Compile-time sizes: padded H, rows of packed weights in a buffer.
template <class T_, int kWidth_, int kBufferRows>
struct Tile {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kPanels = kWidth / kPanelColumns<T>;
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kOperandBytes = kPanels * kPanelBytes;
  static constexpr int kBufferBytes = kBufferRows * kPanelRowBytes;
  static constexpr int kBuffers = (224 * 1024 - kOperandBytes) / kBufferBytes;
  static constexpr int kShared = 1024 + kOperandBytes + kBuffers * kBufferBytes + 16 * kBuffers;
  static_assert(kShared <= 227 * 1024 && kBuffers >= 3);
};
template <class T, int kWidth>
using ContractTile = Tile<T, kWidth, kStates * kChannels>;
template <class T, int kWidth>
using MixTile = Tile<T, kWidth, kWidth>;

// ---- Packed weights ----------------------------------------------------------------------------

/// Where element (row, column) of a buffer lies, in bytes.
template <class T>
__host__ __device__ __forceinline__ int packed_at(int row, int column) {
  return row * kPanelRowBytes + ((column * static_cast<int>(sizeof(T))) ^ ((row & 7) << 4));
}

/// Buffers of a contraction over channels before tile `tile` of channels. A triangle starts at the
/// panel that holds the diagonal.
template <class T, int kWidth, bool kTriangle>
struct ChannelOrder {
  static constexpr int kPanels = kWidth / kPanelColumns<T>;
  static constexpr int kTiles = kWidth / kChannels;
  static constexpr int kTilesOfPanel = kPanelColumns<T> / kChannels;

  __host__ __device__ static constexpr int first_panel(int tile) {
    return kTriangle ? tile / kTilesOfPanel : 0;
  }
  __host__ __device__ static constexpr int before(int tile) {
    if (!kTriangle) return tile * kPanels;
    const int a = tile / kTilesOfPanel;
    const int b = tile % kTilesOfPanel;
    return kTilesOfPanel * (a * kPanels - a * (a - 1) / 2) + b * (kPanels - a);
  }
  // A triangle comes with a buffer of the rows of A and bias.
  static constexpr int kPerStates = before(kTiles) + (kTriangle ? 1 : 0);
};

/// What a part of the packed weights is made of.
enum class Source {
  Triangle,
  Small,
  ChannelRows,
  Skip,
  StateRows,
  BothRows,
  TransposedRows,
  SkipTransposed,
  SmallTransposed
};

struct Part {
  Source source;
  int first;  // buffer
  int count;  // of n
};
template <class T>
struct PackArgs {
  Weights<T> weights;
  int dim, dstate;
  T* packed;
  Part parts[6];
};

/// Rows of the weights that one n of a part is made of: row a is `stride` numbers behind the one
/// before; from `split` on they come from a second block of rows. Both have `rows`, others are 0.
template <class T>
struct SourceRows {
  const T* base;
  std::int64_t stride;
  int rows;
  int split = 1 << 30;
  const T* second = nullptr;

  __device__ SourceRows(const PackArgs<T>& p, Source source, int n) {
    const auto H = static_cast<std::int64_t>(p.dim);
    stride = H;
    rows = p.dim;
    switch (source) {
      case Source::Small:
        base = p.weights.A + n * kStates * H;
        second = p.weights.bias + n * kStates * H;
        split = kStates;
        rows = min(kStates, p.dstate - n * kStates);
        break;
      case Source::SmallTransposed:
        base = p.weights.A;
        second = p.weights.bias;
        split = p.dstate;
        rows = p.dstate;
        break;
      case Source::Skip:
      case Source::SkipTransposed:
        base = p.weights.D;
        break;
      default: {
        const bool from_B = source == Source::Triangle || source == Source::BothRows;
        base = (from_B ? p.weights.B : p.weights.C) + n * H;
        stride = p.dstate * H;
        if (n >= p.dstate) rows = 0;
      }
    }
  }
  __device__ __forceinline__ float load(int a, int column, int dim) const {
    const int in_block = a < split ? a : a - split;
    const T* const from = (a < split ? base : second) + in_block * stride;
    return in_block < rows && column < dim ? to_float(from[column]) : 0.0F;
  }
};

/// Panels of the rows of A and bias, an even number.
template <class T>
__host__ __device__ constexpr int small_panels(int dstate) {
  constexpr int kPair = 2 * kPanelColumns<T>;
  return (2 * dstate + kPair - 1) / kPair * 2;
}

/// Byte offset of (row, n, column) of a part, or -1 where the part has no place for it.
template <class T, int kWidth>
__device__ __forceinline__ std::int64_t packed_place(const Part& part, int row, int n, int column,
                                                     int dstate) {
  constexpr int kColumns = kPanelColumns<T>;
  const int panel = column / kColumns;
  const int rest = column % kColumns;
  const auto channel_place = [&]<bool kTriangle>() -> std::int64_t {
    using Order = ChannelOrder<T, kWidth, kTriangle>;
    const int tile = row / kChannels;
    if (panel < Order::first_panel(tile)) return -1;
    const int buffer = part.first + n / kStates * Order::kPerStates + Order::before(tile) + panel -
                       Order::first_panel(tile) + (kTriangle ? 1 : 0);
    return static_cast<std::int64_t>(buffer) * ContractTile<T, kWidth>::kBufferBytes +
           packed_at<T>(row % kChannels * kStates + n % kStates, rest);
  };
  switch (part.source) {
    case Source::Triangle:
      return channel_place.template operator()<true>();
    case Source::ChannelRows:
      return channel_place.template operator()<false>();
    case Source::Small: {
      if (row >= kSmallRows) return -1;
      const std::int64_t buffer = part.first + n * ChannelOrder<T, kWidth, true>::kPerStates;
      return buffer * ContractTile<T, kWidth>::kBufferBytes + panel * kSmallRows * kPanelRowBytes +
             packed_at<T>(row, rest);
    }
    default: {
      if (part.source == Source::SmallTransposed && panel >= small_panels<T>(dstate)) return -1;
      constexpr int kPanels = kWidth / kColumns;
      return static_cast<std::int64_t>(part.first + n * kPanels + panel) *
                 MixTile<T, kWidth>::kBufferBytes +
             packed_at<T>(row, rest);
    }
  }
}

constexpr int kPackTile = 32;

/// A block packs a tile of rows and columns of one n of one part, with the transposed tile if the
/// part has a use for it.
template <class T, int kWidth>
__global__ __launch_bounds__(256) void pack_kernel(const __grid_constant__ PackArgs<T> p) {
  __shared__ float straight[kPackTile][kPackTile + 1];
  __shared__ float across[kPackTile][kPackTile + 1];
  int n = static_cast<int>(blockIdx.z);
  int which = 0;
  while (n >= p.parts[which].count) n -= p.parts[which++].count;
  const Part part = p.parts[which];
  const Source source = part.source;
  const bool transposed = source == Source::TransposedRows || source == Source::SkipTransposed ||
                          source == Source::SmallTransposed;
  const bool both = source == Source::Triangle || source == Source::BothRows;
  const int lane = static_cast<int>(threadIdx.x) % kPackTile;
  const int r0 = static_cast<int>(blockIdx.y) * kPackTile;
  const int c0 = static_cast<int>(blockIdx.x) * kPackTile;
  if (source == Source::Triangle && c0 + kPanelColumns<T> <= r0) return;
  const SourceRows<T> from(p, source, n);
  const int first = static_cast<int>(threadIdx.x) / kPackTile;
  constexpr int kStep = 256 / kPackTile;
  if (!transposed)
#pragma unroll
    for (int i = first; i < kPackTile; i += kStep)
      straight[i][lane] = from.load(r0 + i, c0 + lane, p.dim);
  if (transposed || both)
#pragma unroll
    for (int i = first; i < kPackTile; i += kStep)
      across[i][lane] = from.load(c0 + i, r0 + lane, p.dim);
  __syncthreads();
  constexpr int kVec = kWide<T>;
  constexpr int kPerRow = kPackTile / kVec;
  const int i = static_cast<int>(threadIdx.x) / kPerRow;
  const int j = static_cast<int>(threadIdx.x) % kPerRow * kVec;
  if (i >= kPackTile) return;
  const std::int64_t to = packed_place<T, kWidth>(part, r0 + i, n, c0 + j, p.dstate);
  if (to < 0) return;
  float values[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const float there = transposed || both ? across[j + k][i] : 0.0F;
    float v = transposed ? there : straight[i][j + k];
    const int beyond = c0 + j + k - (r0 + i);
    if (source == Source::BothRows || (source == Source::Triangle && beyond > 0)) v += there;
    if (source == Source::Triangle && beyond < 0) v = 0.0F;
    values[k] = sizeof(T) == 4 ? round_tf32(v) : v;
  }
  store_packed<T, kVec>(reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(p.packed) + to),
                        values);
}

template <class T, int kWidth>
Tensor pack(Context& ctx, const Problem<T>& problem, int buffers,
            std::initializer_list<Part> parts) {
  Tensor packed = ctx.empty({buffers, kWidth * kPanelColumns<T>}, dtype_of<T>::value);
  PackArgs<T> args{
      problem.weights, problem.dim, problem.dstate, packed.view().template data<T>(), {}};
  unsigned count = 0;
  int i = 0;
  for (const Part& part : parts) {
    args.parts[i++] = part;
    count += static_cast<unsigned>(part.count);
  }
  constexpr unsigned kTiles = kWidth / kPackTile;
  pack_kernel<T, kWidth><<<dim3(kTiles, kTiles, count), 256, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
  return packed;
}

// ---- The ring of buffers -----------------------------------------------------------------------

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
      barrier_init(shared.free(i), kGroups * kWarpgroup / 32);
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

/// Copies `count` buffers; one thread does.
template <class Z>
__device__ __forceinline__ void copy_buffers(const Shared<Z>& shared, const void* packed,
                                             int count) {
  if (threadIdx.x % kWarpgroup != 0) return;
  const auto* from = static_cast<const unsigned char*>(packed);
  int at = 0;
  int parity = 1;
  for (int i = 0; i < count; ++i, from += Z::kBufferBytes) {
    barrier_wait(shared.free(at), parity);
    barrier_expect(shared.full(at), Z::kBufferBytes);
    copy_bytes(shared.buffer(at), from, Z::kBufferBytes, shared.full(at));
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
  __device__ __forceinline__ void give_back() {
    if (held >= 0 && threadIdx.x % 32 == 0) barrier_arrive(shared.free(held));
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

/// Fills the warpgroup's 64 rows of the resident operand: fetch(token, first column) gives 16
/// bytes.
template <class Z, class Fetch>
__device__ __forceinline__ void load_operand(const Shared<Z>& shared, const Seat& at, int panels,
                                             Fetch fetch) {
  using T = typename Z::T;
  constexpr int kVec = kWide<T>;
  const int per_row = panels * (kPanelRowBytes / 16);
#pragma unroll 8
  for (int i = at.thread; i < 64 * per_row; i += kWarpgroup) {
    const int row = i / per_row;
    const int chunk = i % per_row;
    Packed<T, kVec> v = fetch(at.first_token() + row, chunk * kVec);
    if constexpr (sizeof(T) == 4)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v.words[k] = __float_as_uint(round_tf32(__uint_as_float(v.words[k])));
    const std::uint32_t to = shared.base + static_cast<std::uint32_t>(
                                               chunk / 8 * Z::kPanelBytes +
                                               packed_at<T>(at.group * 64 + row, chunk % 8 * kVec));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
  }
  fence_shared_async();
  group_wait(1 + at.group, kWarpgroup);
}

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

// ---- Contraction over channels -----------------------------------------------------------------

template <class T>
struct ContractArgs {
  Rows<T> x;        // left operand of the products
  Rows<T> weights;  // of the sum over channels
  float* out;
  const float* base = nullptr;
  float* A = nullptr;
  const T* packed = nullptr;
  int dstate = 0;
};

/// Writes the columns of two C tiles, states first .. first + 15.
__device__ __forceinline__ void store_states(float* out, const Seat& at, std::int64_t tokens,
                                             int dstate, int first, const float (&sum)[2][4],
                                             const float* base) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const std::int64_t token = at.token + e / 2 * 8;
      const int n = first + i * 8 + at.lane % 4 * 2 + e % 2;
      if (token < tokens && n < dstate)
        out[token * dstate + n] = sum[i][e] + (base != nullptr ? base[n] : 0.0F);
    }
}

/// sum += rows of weights times a tile's products.
template <class T>
__device__ __forceinline__ void add_channels(
    float (&sum)[2][4], const float (&c)[32][4],
    const Packed<T, kWide<T>> (&w)[2][kChannels / kWide<T>]) {
#pragma unroll
  for (int h = 0; h < kChannels; ++h) {
    const float upper = w[0][h / kWide<T>].get(h % kWide<T>);
    const float lower = w[1][h / kWide<T>].get(h % kWide<T>);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[i][e] = fmaf(e < 2 ? upper : lower, c[2 * h + i][e], sum[i][e]);
  }
}

template <class Number, int kTiles>
__device__ __forceinline__ void clear(Number (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = Number{};
}

template <class T, int kWidth, bool kDrive>
__device__ __forceinline__ void contract(const ContractArgs<T>& a,
                                         const Shared<ContractTile<T, kWidth>>& shared) {
  using Z = ContractTile<T, kWidth>;
  using Order = ChannelOrder<T, kWidth, kDrive>;
  const Seat at;
  load_operand(shared, at, Z::kPanels, a.x);
  const std::uint64_t left = panel_descriptor(
      shared.base + static_cast<std::uint32_t>(at.group * 64 * kPanelRowBytes), 16);
  Reader<Z> in{shared};
  for (int first = 0; first < a.dstate; first += kStates) {
    float sum[2][4] = {};
    if constexpr (kDrive) {
      float c[4][4];
      clear(c);
      const std::uint64_t right = panel_descriptor(in.take(), 16);
      products_begin();
#pragma unroll
      for (int s = 0; s < Z::kPanels * kPanelSteps; ++s)
        multiply_step<T>(
            c, advance(left, s / kPanelSteps * Z::kPanelBytes + s % kPanelSteps * kStepBytes),
            advance(right,
                    s / kPanelSteps * kSmallRows * kPanelRowBytes + s % kPanelSteps * kStepBytes));
      in.started();
      in.finish();
      pin(c);
      const float from_x[2][4] = {{c[0][0], c[0][1], c[0][2], c[0][3]},
                                  {c[1][0], c[1][1], c[1][2], c[1][3]}};
      store_states(a.A, at, a.x.tokens, a.dstate, first, from_x, a.base);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e / 4][e % 4] = c[2 + e / 4][e % 4];
    }
    for (int tile = 0; tile < Order::kTiles; ++tile) {
      Packed<T, kWide<T>> w[2][kChannels / kWide<T>];
#pragma unroll
      for (int i = 0; i < 2 * kChannels / kWide<T>; ++i)
        w[i % 2][i / 2] = a.weights(at.token + i % 2 * 8, tile * kChannels + i / 2 * kWide<T>);
      float c[32][4];
      clear(c);
      for (int panel = Order::first_panel(tile); panel < Z::kPanels; ++panel) {
        const std::uint64_t right = panel_descriptor(in.take(), 16);
        products_begin();
#pragma unroll
        for (int s = 0; s < kPanelSteps; ++s)
          multiply_step<T>(c, advance(left, panel * Z::kPanelBytes + s * kStepBytes),
                           advance(right, s * kStepBytes));
        in.started();
      }
      in.finish();
      pin(c);
      add_channels<T>(sum, c, w);
    }
    store_states(a.out, at, a.x.tokens, a.dstate, first, sum, nullptr);
  }
}

template <class T, int kWidth, bool kDrive>
__global__ __launch_bounds__(kBlock, 1) void contract_kernel(const ContractArgs<T> a) {
  using Z = ContractTile<T, kWidth>;
  extern __shared__ unsigned char memory[];
  const Shared<Z> shared(memory);
  prepare(shared);
  const int blocks = (a.dstate + kStates - 1) / kStates;
  if (copies())
    copy_buffers(shared, a.packed, blocks * ChannelOrder<T, kWidth, kDrive>::kPerStates);
  else
    contract<T, kWidth, kDrive>(a, shared);
}

// ---- Products over states and channels ---------------------------------------------------------

template <class T>
struct MixArgs {
  Rows<T> x;
  Rows<T> skip;  // multiplies x W_D^T
  const float* scale;
  const T* packed;
  T* out;
  int dstate;
  const std::int32_t* lengths;  // of y
  std::int64_t seqlen;
  // For dx only.
  const float* dy_scale = nullptr;
  const float* dA = nullptr;
  int small_panels = 0;
};

template <class T>
__device__ __forceinline__ void scale_fragment(std::uint32_t (&a)[4], float upper, float lower) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float factor = i % 2 == 0 ? upper : lower;
    if constexpr (sizeof(T) == 4)
      a[i] = __float_as_uint(round_tf32(__uint_as_float(a[i]) * factor));
    else
      a[i] = pack_bf16(__uint_as_float(a[i] << 16) * factor,
                       __uint_as_float(a[i] & 0xFFFF0000U) * factor);
  }
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

/// c += (factors x operand) times the next `panels` buffers, an even number.
template <class Z, bool kScaled, int kTiles>
__device__ __forceinline__ void mix(float (&c)[kTiles][4], Reader<Z>& in, const Seat& at,
                                    int panels, float upper, float lower) {
  using T = typename Z::T;
  const int row = at.group * 64 + at.warp * 16 + at.lane % 16;
  Fragments sets[2];
  const auto multiply = [&](Fragments& a, const Fragments& other, int panel) {
#pragma unroll
    for (int s = 0; s < kPanelSteps; ++s) {
      const int chunk = 2 * s + at.lane / 16;
      load_fragment(
          a[s], in.shared.base + static_cast<std::uint32_t>(panel * Z::kPanelBytes +
                                                            packed_at<T>(row, chunk * kWide<T>)));
      if constexpr (kScaled) scale_fragment<T>(a[s], upper, lower);
    }
    const std::uint64_t right = panel_descriptor(in.take(), 16);
    products_begin();
#pragma unroll
    for (int s = 0; s < kPanelSteps; ++s) multiply_step<T>(c, a[s], advance(right, s * kStepBytes));
    in.started();
    keep(other);
  };
  clear(sets[1]);
  for (int panel = 0; panel < panels; panel += 2) {
    multiply(sets[0], sets[1], panel);
    multiply(sets[1], sets[0], panel + 1);
  }
}

/// The passes of all states, each with its own factors of rows.
template <class Z, int kTiles>
__device__ __forceinline__ void mix_states(float (&c)[kTiles][4], Reader<Z>& in, const Seat& at,
                                           const float* scale, std::int64_t tokens, int dstate) {
  const auto factor = [&](int n, int half) {
    const std::int64_t token = at.token + half * 8;
    return n < dstate && token < tokens ? __ldg(scale + token * dstate + n) : 0.0F;
  };
  float upper = factor(0, 0);
  float lower = factor(0, 1);
  for (int n = 0; n < dstate; ++n) {
    const float next_upper = factor(n + 1, 0);
    const float next_lower = factor(n + 1, 1);
    mix<Z, true>(c, in, at, Z::kPanels, upper, lower);
    upper = next_upper;
    lower = next_lower;
  }
}

/// c *= skip, whose rows and columns beyond the last repeat it: loads under conditions would wait
/// for each other.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_skip(float (&c)[kTiles][4], const Seat& at,
                                              const Rows<T>& skip) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t token = min(at.token + half * 8, skip.tokens - 1);
    const T* const row = skip.data + token * skip.dim;
#pragma unroll
    for (int first = 0; first < kTiles; first += 16) {
      Packed<T, 2> v[16];
#pragma unroll
      for (int i = 0; i < 16; ++i)
        v[i].load_constant(row + min((first + i) * 8 + at.lane % 4 * 2, skip.dim - 2));
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        c[first + i][2 * half] *= v[i].get(0);
        c[first + i][2 * half + 1] *= v[i].get(1);
      }
    }
  }
}

/// What passes through W_D, W_A and W_bias to x: fragments of dy x and of [dA | g].
template <class Z, class T, int kTiles>
__device__ __forceinline__ void mix_small(float (&c)[kTiles][4], Reader<Z>& in, const Seat& at,
                                          const MixArgs<T>& a) {
  in.finish();
  group_wait(1 + at.group, kWarpgroup);
  load_operand(in.shared, at, Z::kPanels, [&](std::int64_t token, int column) {
    const auto x = a.x(token, column);
    const auto dy = a.skip(token, column);
    float product[kWide<T>];
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) product[i] = x.get(i) * dy.get(i);
    Packed<T, kWide<T>> v;
    v.set(product);
    return v;
  });
  mix<Z, false>(c, in, at, Z::kPanels, 1.0F, 1.0F);
  in.finish();
  group_wait(1 + at.group, kWarpgroup);
  load_operand(in.shared, at, a.small_panels, [&](std::int64_t token, int column) {
    float value[kWide<T>];
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      const int n = column + i;
      const bool exists = token < a.x.tokens && n < 2 * a.dstate;
      const float* const from = n < a.dstate ? a.dA + n : a.scale + (n - a.dstate);
      value[i] = exists ? from[token * a.dstate] : 0.0F;
    }
    Packed<T, kWide<T>> v;
    v.set(value);
    return v;
  });
  mix<Z, false>(c, in, at, a.small_panels, 1.0F, 1.0F);
}

/// Writes C tiles through the memory of the operand, in rows of 16 bytes a thread; 0 at padding.
template <class Z, class T, int kTiles>
__device__ __forceinline__ void store_operand(const Shared<Z>& shared, const Seat& at,
                                              const float (&c)[kTiles][4], const MixArgs<T>& a) {
  constexpr int kVec = kWide<T>;
  const int row = at.group * 64 + at.warp * 16 + at.lane / 4;
  group_wait(1 + at.group, kWarpgroup);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = i * 8 + at.lane % 4 * 2;
      const std::uint32_t to =
          shared.base +
          static_cast<std::uint32_t>(column / kPanelColumns<T> * Z::kPanelBytes +
                                     packed_at<T>(row + half * 8, column % kPanelColumns<T>));
      if constexpr (sizeof(T) == 4)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(c[i][2 * half]),
                     "f"(c[i][2 * half + 1])
                     : "memory");
      else
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to),
                     "r"(pack_bf16(c[i][2 * half], c[i][2 * half + 1]))
                     : "memory");
    }
  group_wait(1 + at.group, kWarpgroup);
  constexpr int kPerRow = kTiles * 8 / kVec;
#pragma unroll 4
  for (int i = at.thread; i < 64 * kPerRow; i += kWarpgroup) {
    const int r = i / kPerRow;
    const int chunk = i % kPerRow;
    const std::int64_t token = at.first_token() + r;
    if (token >= a.x.tokens || chunk * kVec >= a.x.dim) continue;
    const bool valid = a.lengths == nullptr || token % a.seqlen < a.lengths[token / a.seqlen];
    Packed<T, kVec> v = {};
    if (valid)
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                   : "r"(shared.base + static_cast<std::uint32_t>(
                                           chunk / 8 * Z::kPanelBytes +
                                           packed_at<T>(at.group * 64 + r, chunk % 8 * kVec))));
    v.store(a.out + token * a.x.dim + chunk * kVec);
  }
}

template <class T, int kWidth, bool kBackward>
__device__ __forceinline__ void mix_block(const MixArgs<T>& a,
                                          const Shared<MixTile<T, kWidth>>& shared) {
  using Z = MixTile<T, kWidth>;
  const Seat at;
  Reader<Z> in{shared};
  float c[kWidth / 8][4];
  clear(c);
  load_operand(shared, at, Z::kPanels, a.x);
  mix<Z, false>(c, in, at, Z::kPanels, 1.0F, 1.0F);
  in.finish();
  pin(c);
  multiply_skip(c, at, a.skip);
  mix_states(c, in, at, a.scale, a.x.tokens, a.dstate);
  if constexpr (kBackward) {
    in.finish();
    group_wait(1 + at.group, kWarpgroup);
    load_operand(shared, at, Z::kPanels, a.skip);
    mix_states(c, in, at, a.dy_scale, a.x.tokens, a.dstate);
    mix_small(c, in, at, a);
  }
  in.finish();
  pin(c);
  store_operand(shared, at, c, a);
}

template <class T, int kWidth, bool kBackward>
__global__ __launch_bounds__(kBlock, 1) void mix_kernel(const MixArgs<T> a) {
  using Z = MixTile<T, kWidth>;
  extern __shared__ unsigned char memory[];
  const Shared<Z> shared(memory);
  prepare(shared);
  if (copies())
    copy_buffers(
        shared, a.packed,
        kBackward ? Z::kPanels * (2 + 2 * a.dstate) + a.small_panels : Z::kPanels * (1 + a.dstate));
  else
    mix_block<T, kWidth, kBackward>(a, shared);
}

// ---- Gradients of the weights -------------------------------------------------------------------

constexpr int kPairRows = 64;     // rows of a warpgroup
constexpr int kPairStates = 2;    // states of a block, one of each warpgroup
constexpr int kSingleRows = 128;  // rows of a block without factors
constexpr int kMostStates = 64;
constexpr int kSmallPacked = 2 * kMostStates;  // rows of dA and g, filled up

/// A buffer: rows of the left operand, rows of x^T, factors of both states. With factors the
/// warpgroups share the rows of the left operand, else each has its own.
template <class T_, int kWidth_, bool kScaled_>
struct PairTile {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kScaled = kScaled_;
  static constexpr int kOperandBytes = 0;
  static constexpr int kLeftRows = kScaled ? kPairRows : kSingleRows;
  static constexpr int kLeftBytes = kLeftRows * kPanelRowBytes;
  static constexpr int kRightBytes = kWidth * kPanelRowBytes;
  static constexpr int kScaleBytes =
      kScaled ? kPanelColumns<T> * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kFilledBytes = kLeftBytes + kRightBytes + kPairStates * kScaleBytes;
  static constexpr int kBufferBytes = kLeftBytes + kRightBytes + (kScaled ? 1024 : 0);
  static constexpr int kBuffers = std::min(224 * 1024 / kBufferBytes, 8);
  static constexpr int kShared = 1024 + kBuffers * kBufferBytes + 16 * kBuffers;
};

constexpr int kTurn = 64;  // tokens and channels of a transposed tile

/// Left and right operands: activations transposed and packed in panels of tokens.
template <class T>
struct Turned {
  T* x;           // [panels, kWidth] rows of 128 bytes
  T* dy;          // the same
  T* dy_x;        // the same, of dy x
  T* small;       // [panels, kSmallPacked], of dA, then g
  float* scales;  // [kind, states, padded tokens], s and g
};

/// Writes a tile from shared memory, its tokens along rows of the packed panels.
template <class T, int kWidth>
__device__ __forceinline__ void write_turned(const float (&tile)[kTurn][kTurn + 1], T* packed,
                                             std::int64_t t0, int h0) {
  constexpr int kVec = kWide<T>;
  constexpr int kPerRow = kTurn / kVec;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kTurn * kPerRow; i += 256) {
    const int h = i / kPerRow;
    const int j = i % kPerRow * kVec;
    float values[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k)
      values[k] = sizeof(T) == 4 ? round_tf32(tile[j + k][h]) : tile[j + k][h];
    const std::int64_t panel = (t0 + j) / kPanelColumns<T>;
    const int column = static_cast<int>((t0 + j) % kPanelColumns<T>);
    auto* const to = reinterpret_cast<unsigned char*>(packed) + panel * kWidth * kPanelRowBytes +
                     packed_at<T>(h0 + h, column);
    store_packed<T, kVec>(reinterpret_cast<T*>(to), values);
  }
}

/// x, dy and their products; a block turns a tile of tokens and channels.
template <class T, int kWidth>
__global__ __launch_bounds__(256) void turn_rows_kernel(Rows<T> x, Rows<T> dy, Turned<T> out) {
  __shared__ float tile[kTurn][kTurn + 1];
  constexpr int kVec = kWide<T>;
  constexpr int kPerRow = kTurn / kVec;
  constexpr int kPerThread = kTurn * kPerRow / 256;
  const std::int64_t t0 = static_cast<std::int64_t>(blockIdx.x) * kTurn;
  const int h0 = static_cast<int>(blockIdx.y) * kTurn;
  Packed<T, kVec> in[2][kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = i * 256 + static_cast<int>(threadIdx.x);
    in[0][i] = x(t0 + at / kPerRow, h0 + at % kPerRow * kVec);
    in[1][i] = dy(t0 + at / kPerRow, h0 + at % kPerRow * kVec);
  }
#pragma unroll
  for (int which = 0; which < 3; ++which) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = i * 256 + static_cast<int>(threadIdx.x);
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        tile[at / kPerRow][at % kPerRow * kVec + k] =
            which < 2 ? in[which][i].get(k) : in[0][i].get(k) * in[1][i].get(k);
    }
    __syncthreads();
    write_turned<T, kWidth>(tile, which == 0 ? out.x : which == 1 ? out.dy : out.dy_x, t0, h0);
  }
}

/// Factors s and g and the rows of dA and g; a block turns kTurn tokens.
template <class T>
__global__ __launch_bounds__(256) void turn_states_kernel(const float* s, const float* g,
                                                          const float* dA, Turned<T> out,
                                                          std::int64_t tokens, std::int64_t padded,
                                                          int states, int dstate) {
  __shared__ float tile[kTurn][kMostStates + 1];
  const std::int64_t t0 = static_cast<std::int64_t>(blockIdx.x) * kTurn;
  const auto write_small = [&](int row, int t, float v) {
    auto* const to = reinterpret_cast<unsigned char*>(out.small) +
                     (t0 + t) / kPanelColumns<T> * kSmallPacked * kPanelRowBytes +
                     packed_at<T>(row, static_cast<int>((t0 + t) % kPanelColumns<T>));
    *reinterpret_cast<T*>(to) = from_float<T>(sizeof(T) == 4 ? round_tf32(v) : v);
  };
  for (int which = 0; which < 3; ++which) {
    const float* const from = which == 0 ? s : which == 1 ? g : dA;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTurn * dstate; i += 256)
      tile[i / dstate][i % dstate] = t0 + i / dstate < tokens ? from[t0 * dstate + i] : 0.0F;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTurn * states; i += 256) {
      const int n = i / kTurn;
      const int t = i % kTurn;
      const float v = n < dstate ? tile[t][n] : 0.0F;
      if (which < 2) out.scales[(which * states + n) * padded + t0 + t] = v;
      if (which > 0 && n < dstate) write_small(which == 1 ? dstate + n : n, t, v);
    }
  }
  for (int i = 2 * dstate * kTurn + static_cast<int>(threadIdx.x); i < kSmallPacked * kTurn;
       i += 256)
    write_small(i / kTurn, i % kTurn, 0.0F);
}

/// Rows of a left operand and where its sums go: [split, states, rows, kWidth] floats.
template <class T>
struct Left {
  const T* packed;
  std::int64_t panel_rows;  // of one panel
};

/// With factors: kinds are C (dy, s) and B (x, g). Without: dy x and the small rows.
template <class T>
struct PairArgs {
  Left<T> left[2];
  const T* right;  // packed x^T
  const float* scales;
  float* partial;  // [splits, blocks of a split, warpgroups, 64, kWidth]
  std::int64_t panels, panels_of_split;
  int states;      // padded to kPairStates
  int row_blocks;  // of the first kind
};

/// What a block works on: rows of a left operand and, with factors, a pair of states.
struct PairWork {
  int kind, row, state;

  template <class Z, class T>
  __device__ static PairWork of(const PairArgs<T>& a) {
    const int i = static_cast<int>(blockIdx.x);
    if (!Z::kScaled) {
      const int kind = i < a.row_blocks ? 0 : 1;
      return {kind, (i - kind * a.row_blocks) * kSingleRows, 0};
    }
    const int pairs = a.states / kPairStates;
    const int rest = i / a.row_blocks;
    return {rest / pairs, i % a.row_blocks * kPairRows, rest % pairs * kPairStates};
  }
};

template <class Z, class T>
__device__ __forceinline__ void copy_pairs(const PairArgs<T>& a, const PairWork& work,
                                           const Shared<Z>& shared, std::int64_t begin,
                                           std::int64_t end) {
  if (threadIdx.x % kWarpgroup != 0) return;
  constexpr std::int64_t kColumns = kPanelColumns<T>;
  const Left<T> left = a.left[work.kind];
  const auto* rows = reinterpret_cast<const unsigned char*>(left.packed);
  const auto* right = reinterpret_cast<const unsigned char*>(a.right);
  const float* scale = a.scales + (static_cast<std::int64_t>(work.kind) * a.states + work.state) *
                                      a.panels * kColumns;
  int at = 0;
  int parity = 1;
  for (std::int64_t p = begin; p < end; ++p) {
    barrier_wait(shared.free(at), parity);
    const std::uint32_t full = shared.full(at);
    const std::uint32_t to = shared.buffer(at);
    barrier_expect(full, Z::kFilledBytes);
    copy_bytes(to, rows + (p * left.panel_rows + work.row) * kPanelRowBytes, Z::kLeftBytes, full);
    copy_bytes(to + Z::kLeftBytes, right + p * Z::kRightBytes, Z::kRightBytes, full);
    if constexpr (Z::kScaled)
      for (int i = 0; i < kPairStates; ++i)
        copy_bytes(
            to + static_cast<std::uint32_t>(Z::kLeftBytes + Z::kRightBytes + i * Z::kScaleBytes),
            scale + (i * a.panels + p) * kColumns, Z::kScaleBytes, full);
    if (++at == Z::kBuffers) {
      at = 0;
      parity ^= 1;
    }
  }
}

/// Factors of the numbers of a fragment along its columns, from shared memory.
template <class T>
__device__ __forceinline__ void scale_columns(std::uint32_t (&a)[4], std::uint32_t scales,
                                              int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 4) {
      float factor;
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(factor)
                   : "r"(scales + static_cast<std::uint32_t>(4 * (lane % 4 + 4 * half))));
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        a[i] = __float_as_uint(round_tf32(__uint_as_float(a[i]) * factor));
    } else {
      float first;
      float second;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(first), "=f"(second)
                   : "r"(scales + static_cast<std::uint32_t>(4 * (lane % 4 * 2 + 8 * half))));
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i)
        a[i] = pack_bf16(__uint_as_float(a[i] << 16) * first,
                         __uint_as_float(a[i] & 0xFFFF0000U) * second);
    }
  }
}

template <class Z>
__device__ __forceinline__ void multiply_pairs(float* out, const Shared<Z>& shared, int count) {
  using T = typename Z::T;
  const Seat at;
  Reader<Z> in{shared};
  float c[Z::kWidth / 8][4];
  clear(c);
  pin(c);
  const int row = (Z::kScaled ? 0 : at.group * kPairRows) + at.warp * 16 + at.lane % 16;
  Fragments sets[2];
  const auto multiply = [&](Fragments& left, const Fragments& other) {
    const std::uint32_t buffer = in.take();
    const std::uint32_t scales =
        buffer +
        static_cast<std::uint32_t>(Z::kLeftBytes + Z::kRightBytes + at.group * Z::kScaleBytes);
#pragma unroll
    for (int s = 0; s < kPanelSteps; ++s) {
      load_fragment(left[s], buffer + static_cast<std::uint32_t>(
                                          packed_at<T>(row, (2 * s + at.lane / 16) * kWide<T>)));
      if constexpr (Z::kScaled)
        scale_columns<T>(
            left[s], scales + static_cast<std::uint32_t>(4 * s * kPanelColumns<T> / kPanelSteps),
            at.lane);
    }
    const std::uint64_t right = panel_descriptor(buffer + Z::kLeftBytes, 16);
    products_begin();
#pragma unroll
    for (int s = 0; s < kPanelSteps; ++s)
      multiply_step<T>(c, left[s], advance(right, s * kStepBytes));
    in.started();
    keep(other);
  };
  clear(sets[1]);
  for (int p = 0; p + 1 < count; p += 2) {
    multiply(sets[0], sets[1]);
    multiply(sets[1], sets[0]);
  }
  if (count % 2 == 1) multiply(sets[0], sets[1]);
  in.finish();
  pin(c);
  out += (at.group * kPairRows + at.warp * 16 + at.lane / 4) * Z::kWidth + at.lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < Z::kWidth / 8; ++i) {
      const float pair[2] = {c[i][2 * half], c[i][2 * half + 1]};
      store_vec<float, 2>(out + half * 8 * Z::kWidth + i * 8, pair);
    }
}

template <class T, int kWidth, bool kScaled>
__global__ __launch_bounds__(kBlock, 1) void pair_kernel(const __grid_constant__ PairArgs<T> a) {
  using Z = PairTile<T, kWidth, kScaled>;
  extern __shared__ unsigned char memory[];
  const Shared<Z> shared(memory);
  prepare(shared);
  const auto work = PairWork::of<Z>(a);
  const std::int64_t begin = blockIdx.y * a.panels_of_split;
  const std::int64_t end = max(begin, min(a.panels, begin + a.panels_of_split));
  if (copies()) {
    copy_pairs(a, work, shared, begin, end);
    return;
  }
  constexpr std::int64_t kOut = kGroups * kPairRows * kWidth;
  float* const out =
      a.partial + (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kOut;
  multiply_pairs(out, shared, static_cast<int>(end - begin));
}

/// Partial sums of one kind of pair_kernel.
struct Partial {
  const float* data;
  int splits;
  std::int64_t split_rows;  // of kWidth numbers
};

/// dweight += partial sums, in order. One block per row of the weight.
template <int kWidth>
__global__ __launch_bounds__(kWidth / 4) void add_partial_kernel(Partial scaled, Partial single,
                                                                 int states, int dim, int dstate,
                                                                 float* dweight) {
  const int k = static_cast<int>(threadIdx.x) * 4;
  if (k >= dim) return;
  const int B = dstate;
  const int C = B + dim * dstate;
  const int D = C + dim * dstate;
  const int row = static_cast<int>(blockIdx.x);
  const bool from_scaled = row >= B && row < D;
  std::int64_t at;
  if (from_scaled) {
    const int kind = row < C ? 1 : 0;
    const int n = (row - (kind == 1 ? B : C)) % dstate;
    const int h = (row - (kind == 1 ? B : C)) / dstate;
    const int block =
        (kind * (states / kPairStates) + n / kPairStates) * (kWidth / kPairRows) + h / kPairRows;
    at = (static_cast<std::int64_t>(block) * kGroups + n % kPairStates) * kPairRows + h % kPairRows;
  } else {
    const int bias = D + dim;
    at = row < B ? kWidth + row : row < bias ? row - D : kWidth + dstate + row - bias;
  }
  const Partial part = from_scaled ? scaled : single;
  float* const to = dweight + static_cast<std::int64_t>(row) * dim + k;
  float sum[4];
  load_vec<float, 4>(to, sum);
  for (int split = 0; split < part.splits; ++split) {
    float v[4];
    load_vec<float, 4>(part.data + (split * part.split_rows + at) * kWidth + k, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += v[i];
  }
  store_vec<float, 4>(to, sum);
}

// ---- Launches ----------------------------------------------------------------------------------

template <class T>
void launch(Context& ctx, void (*kernel)(T), int shared, dim3 blocks, const T& args) {
  LRNN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<blocks, kBlock, static_cast<std::size_t>(shared), ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

unsigned token_blocks(std::int64_t tokens) {
  return static_cast<unsigned>((tokens + kRows - 1) / kRows);
}

template <class F>
void visit_width(int dim, F&& f) {
  if (dim <= 128)
    f.template operator()<128>();
  else
    f.template operator()<256>();
}

/// Buffers of a contraction over channels, and the first one of a mix that is packed behind it.
template <class T, int kWidth, bool kDrive>
int contract_buffers(int dstate) {
  return (dstate + kStates - 1) / kStates * ChannelOrder<T, kWidth, kDrive>::kPerStates;
}
template <class T, int kWidth, bool kDrive>
int first_mix_buffer(int dstate) {
  constexpr int kRatio = ContractTile<T, kWidth>::kBufferBytes / MixTile<T, kWidth>::kBufferBytes;
  return contract_buffers<T, kWidth, kDrive>(dstate) * kRatio;
}
template <class T, int kWidth, bool kDrive>
const T* mix_weights(const Tensor& packed, int dstate) {
  constexpr std::int64_t kNumbers = MixTile<T, kWidth>::kBufferBytes / static_cast<int>(sizeof(T));
  return packed.view().template data<T>() + first_mix_buffer<T, kWidth, kDrive>(dstate) * kNumbers;
}

template <class T, int kWidth, bool kDrive>
void run_contract(Context& ctx, const Problem<T>& p, const Tensor& packed, ContractArgs<T> args) {
  args.packed = packed.view().template data<T>();
  args.dstate = p.dstate;
  launch(ctx, contract_kernel<T, kWidth, kDrive>, ContractTile<T, kWidth>::kShared,
         token_blocks(p.tokens), args);
}

}  // namespace

bool fits_sm90(const Context& ctx, DType dtype, std::int64_t tokens, std::int64_t dim,
               std::int64_t dstate, std::initializer_list<const void*> activations) {
  constexpr std::int64_t kLeastTokens = 2048;
  const bool half = dtype == DType::bfloat16;
  const std::int64_t wide = half ? kWide<bf16> : kWide<float>;
  const bool aligned = std::all_of(activations.begin(), activations.end(), [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  });
  return (half || ctx.allow_tf32()) && tokens >= kLeastTokens && dim >= 64 && dim <= 256 &&
         dim % wide == 0 && dstate <= kMostStates && aligned && compute_capability() == 90;
}

template <class T>
Tensor pack_forward_sm90(Context& ctx, const Problem<T>& p) {
  Tensor packed;
  visit_width(p.dim, [&]<int kWidth>() {
    const int N = p.dstate;
    const int blocks = (N + kStates - 1) / kStates;
    const int mix = first_mix_buffer<T, kWidth, true>(N);
    constexpr int kPanels = MixTile<T, kWidth>::kPanels;
    packed = pack<T, kWidth>(ctx, p, mix + (1 + N) * kPanels,
                             {{Source::Triangle, 0, blocks * kStates},
                              {Source::Small, 0, blocks},
                              {Source::Skip, mix, 1},
                              {Source::StateRows, mix + kPanels, N}});
  });
  return packed;
}

template <class T>
Tensor pack_backward_sm90(Context& ctx, const Problem<T>& p) {
  Tensor packed;
  visit_width(p.dim, [&]<int kWidth>() {
    const int N = p.dstate;
    const int blocks = (N + kStates - 1) / kStates;
    const int mix = first_mix_buffer<T, kWidth, false>(N);
    constexpr int kPanels = MixTile<T, kWidth>::kPanels;
    packed = pack<T, kWidth>(ctx, p, mix + (2 + 2 * N) * kPanels + small_panels<T>(N),
                             {{Source::ChannelRows, 0, blocks * kStates},
                              {Source::Skip, mix, 1},
                              {Source::BothRows, mix + kPanels, N},
                              {Source::TransposedRows, mix + (1 + N) * kPanels, N},
                              {Source::SkipTransposed, mix + (1 + 2 * N) * kPanels, 1},
                              {Source::SmallTransposed, mix + (2 + 2 * N) * kPanels, 1}});
  });
  return packed;
}

template <class T>
void project_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                  const float* base, float* A, float* drive) {
  const Rows<T> rows{x, p.tokens, p.dim};
  visit_width(p.dim, [&]<int kWidth>() {
    run_contract<T, kWidth, true>(ctx, p, packed,
                                  {.x = rows, .weights = rows, .out = drive, .base = base, .A = A});
  });
}

template <class T>
void state_gradients_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                          const T* dy, float* ds) {
  visit_width(p.dim, [&]<int kWidth>() {
    run_contract<T, kWidth, false>(
        ctx, p, packed, {.x = {x, p.tokens, p.dim}, .weights = {dy, p.tokens, p.dim}, .out = ds});
  });
}

template <class T>
void read_out_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                   const float* s, T* y) {
  const Rows<T> rows{x, p.tokens, p.dim};
  visit_width(p.dim, [&]<int kWidth>() {
    launch(ctx, mix_kernel<T, kWidth, false>, MixTile<T, kWidth>::kShared, token_blocks(p.tokens),
           MixArgs<T>{.x = rows,
                      .skip = rows,
                      .scale = s,
                      .packed = mix_weights<T, kWidth, true>(packed, p.dstate),
                      .out = y,
                      .dstate = p.dstate,
                      .lengths = p.lengths,
                      .seqlen = p.seqlen});
  });
}

template <class T>
void input_gradients_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                          const T* dy, const float* s, const float* g, const float* dA, T* dx) {
  visit_width(p.dim, [&]<int kWidth>() {
    launch(ctx, mix_kernel<T, kWidth, true>, MixTile<T, kWidth>::kShared, token_blocks(p.tokens),
           MixArgs<T>{.x = {x, p.tokens, p.dim},
                      .skip = {dy, p.tokens, p.dim},
                      .scale = g,
                      .packed = mix_weights<T, kWidth, false>(packed, p.dstate),
                      .out = dx,
                      .dstate = p.dstate,
                      .lengths = nullptr,
                      .seqlen = p.seqlen,
                      .dy_scale = s,
                      .dA = dA,
                      .small_panels = small_panels<T>(p.dstate)});
  });
}

namespace {

/// Runs pair_kernel over `blocks` row blocks, tokens split so that about `target` blocks run.
template <class T, int kWidth, bool kScaled>
Tensor run_pairs(Context& ctx, PairArgs<T> args, int blocks, int target, Partial& partial) {
  using Z = PairTile<T, kWidth, kScaled>;
  const std::int64_t splits = std::clamp<std::int64_t>((target + blocks - 1) / blocks, 1,
                                                       std::max<std::int64_t>(1, args.panels / 4));
  const std::int64_t rows = std::int64_t{blocks} * kGroups * kPairRows;
  Tensor sums = ctx.empty({splits, rows, kWidth}, DType::float32);
  args.partial = sums.view().template data<float>();
  args.panels_of_split = (args.panels + splits - 1) / splits;
  partial = {args.partial, static_cast<int>(splits), rows};
  launch(ctx, pair_kernel<T, kWidth, kScaled>, Z::kShared,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), args);
  return sums;
}

template <class T, int kWidth>
void weight_gradients(Context& ctx, const Problem<T>& p, const T* x, const T* dy, const float* s,
                      const float* g, const float* dA, float* dweight) {
  const cudaStream_t stream = ctx.stream().handle;
  const std::int64_t padded = (p.tokens + kTurn - 1) / kTurn * kTurn;
  const std::int64_t panels = padded / kPanelColumns<T>;
  const int states = (p.dstate + kPairStates - 1) / kPairStates * kPairStates;
  Tensor packed = ctx.empty({padded, 3 * kWidth + kSmallPacked}, dtype_of<T>::value);
  Tensor scales = ctx.empty({2, states, padded}, DType::float32);
  T* const first = packed.view().template data<T>();
  const Turned<T> turned{first, first + padded * kWidth, first + 2 * padded * kWidth,
                         first + 3 * padded * kWidth, scales.view().template data<float>()};
  turn_rows_kernel<T, kWidth>
      <<<dim3(static_cast<unsigned>(padded / kTurn), kWidth / kTurn), 256, 0, stream>>>(
          {x, p.tokens, p.dim}, {dy, p.tokens, p.dim}, turned);
  LRNN_CUDA_CHECK_LAUNCH();
  turn_states_kernel<T><<<static_cast<unsigned>(padded / kTurn), 256, 0, stream>>>(
      s, g, dA, turned, p.tokens, padded, states, p.dstate);
  LRNN_CUDA_CHECK_LAUNCH();
  PairArgs<T> args{.left = {{turned.dy, kWidth}, {turned.x, kWidth}},
                   .right = turned.x,
                   .scales = turned.scales,
                   .partial = nullptr,
                   .panels = panels,
                   .panels_of_split = panels,
                   .states = states,
                   .row_blocks = kWidth / kPairRows};
  Partial scaled{};
  Partial single{};
  const Tensor scaled_sums = run_pairs<T, kWidth, true>(
      ctx, args, 2 * args.row_blocks * (states / kPairStates), 128, scaled);
  args.left[0] = {turned.dy_x, kWidth};
  args.left[1] = {turned.small, kSmallPacked};
  args.row_blocks = kWidth / kSingleRows;
  const Tensor single_sums =
      run_pairs<T, kWidth, false>(ctx, args, args.row_blocks + 1, 64, single);
  const int rows = 2 * p.dim * p.dstate + p.dim + 2 * p.dstate;
  add_partial_kernel<kWidth><<<static_cast<unsigned>(rows), kWidth / 4, 0, stream>>>(
      scaled, single, states, p.dim, p.dstate, dweight);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

template <class T>
void weight_gradients_sm90(Context& ctx, const Problem<T>& p, const T* x, const T* dy,
                           const float* s, const float* g, const float* dA, float* dweight) {
  visit_width(p.dim,
              [&]<int kWidth>() { weight_gradients<T, kWidth>(ctx, p, x, dy, s, g, dA, dweight); });
}

#define LRNN_S7_INSTANTIATE(T)                                                                   \
  template Tensor pack_forward_sm90<T>(Context&, const Problem<T>&);                             \
  template Tensor pack_backward_sm90<T>(Context&, const Problem<T>&);                            \
  template void project_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,            \
                                const float*, float*, float*);                                   \
  template void read_out_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,           \
                                 const float*, T*);                                              \
  template void state_gradients_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,    \
                                        const T*, float*);                                       \
  template void input_gradients_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,    \
                                        const T*, const float*, const float*, const float*, T*); \
  template void weight_gradients_sm90<T>(Context&, const Problem<T>&, const T*, const T*,        \
                                         const float*, const float*, const float*, float*);
LRNN_S7_INSTANTIATE(float)
LRNN_S7_INSTANTIATE(bf16)
#undef LRNN_S7_INSTANTIATE

}  // namespace lrnn::cuda::s7
