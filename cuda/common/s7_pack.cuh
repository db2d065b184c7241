/// Weights of S7 packed for the contractions on Hopper: panels in the order in which a block reads
/// them, filled up with zeros.
#pragma once

#include "common/s7_wgmma.cuh"

namespace lrnn::cuda::s7 {

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

}  // namespace lrnn::cuda::s7
