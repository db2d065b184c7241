// What enters the segments of a sequence: step 1 of common/selective_scan.cuh.
//
// A block owns 32 channels of one segment, a warp kStates states of each of them, a lane a channel.
// Unlike a scan, the end of a segment is a weighted sum over its steps,
//   states     sum_t w_t k_t u_t B_t,   w_t the product of the multipliers behind t,
//   gradients  sum_t w_t C_t dy_t,      w_t the product of the multipliers up to t,
// whose weights exp(A (sum of alpha)) only fall from one end of the segment to the other. A warp
// walks from the end where they are largest and stops once all are below 2^-64: what is left is
// less than a rounding error of the sum unless its inputs are 2^40 times those that were added. So
// segments longer than the memory of the states cost little. While a tile of steps is added, the
// next one is prepared (softplus, gate).
//
// Bound by the unit of exponentials, 77 % busy on an H200 (480 blocks are not a whole number for
// every multiprocessor) if nothing is forgotten. At B1 L65536 D1536 N16 in bfloat16 the forward
// pass takes 1.19 ms then, 0.707 if weights are below 2^-64 within a tenth of a segment.
#include "common/selective_scan.cuh"

namespace lrnn::cuda::selective {
namespace {

/// Layout of warps that hold kStates states each of the same 32 channels: kWarps x kStates >= N.
template <int kWarps_, int kStates_>
struct WarpLayout {
  static constexpr int kStates = kStates_;
  static constexpr int kChannels = 32;
  static constexpr int kWarps = kWarps_;
  static constexpr int kN = kWarps * kStates;
  static constexpr int kThreads = 32 * kWarps;

  static __device__ int part_of(int thread) { return thread / 32; }
  static __device__ int channel_of(int thread) { return thread % 32; }
};
/// Calls f.operator()<L>(). The general rule has fewer layouts: more warps hold no state.
template <bool kGeneral, class F>
void visit_warps(std::int64_t dstate, F&& f) {
  if (dstate <= 16) return f.template operator()<WarpLayout<4, 4>>();
  if constexpr (!kGeneral) {
    if (dstate <= 32) return f.template operator()<WarpLayout<4, 8>>();
  }
  if (dstate <= 64) return f.template operator()<WarpLayout<8, 8>>();
  if constexpr (!kGeneral) {
    if (dstate <= 128) return f.template operator()<WarpLayout<8, 16>>();
  }
  return f.template operator()<WarpLayout<8, 32>>();
}

template <class L>
constexpr int kTileSteps = std::min(32, 1024 / L::kN);
/// Blocks of a multiprocessor to leave registers for.
template <class L>
constexpr int kEndsBlocks = std::max(1, (L::kStates > 8 ? 512 : 768) / L::kThreads);

/// Takes tiles of kRows rows and kWidth columns to shared memory, one after the other. kShift: the
/// first thread with work, if there is not enough for all.
template <int kRows, int kWidth, int kThreads, int kShift, class T>
class TileStream {
  static constexpr int kVec = kWide<T>;
  static constexpr int kPerRow = kWidth / kVec;
  static constexpr int kStep = kThreads / kPerRow;  // rows that a block copies at once
  static_assert(kWidth % kVec == 0 && kThreads % kPerRow == 0);

 public:
  __device__ TileStream(const DeviceRows<const T>& rows, std::int64_t row, int column, int columns,
                        bool wide)
      : rows_(rows), row_(row), column_(column), columns_(columns), wide_(wide) {
    const int own = column + thread() % kPerRow * kVec;
    inside_ = own < columns;
    from_ = rows.row(row + thread() / kPerRow) + own;
  }
  /// Rows from `rows` on and columns that do not exist are zero.
  __device__ __forceinline__ void load(T* to, int rows) const {
    if (wide_) {
#pragma unroll
      for (int k = 0; k < (kRows + kStep - 1) / kStep; ++k) {
        const int row = thread() / kPerRow + k * kStep;
        if (kRows % kStep == 0 || row < kRows)
          copy_16_bytes_async(to + (thread() + k * kThreads) * kVec,
                              from_ + k * kStep * rows_.stride, inside_ && row < rows);
      }
    } else {
      load_tile<kRows, kWidth, kThreads>(to, rows_, row_, rows, column_, columns_, false);
    }
  }
  __device__ __forceinline__ void move(int rows) {
    from_ += rows * rows_.stride;
    row_ += rows;
  }

 private:
  static __device__ __forceinline__ int thread() {
    return (static_cast<int>(threadIdx.x) + kThreads - kShift) % kThreads;
  }

  const DeviceRows<const T>& rows_;
  std::int64_t row_;
  int column_;
  int columns_;
  bool wide_;
  bool inside_;
  const T* from_;
};

template <class T>
struct EndsArgs {
  Operands<T> in;
  DeviceRows<const T> dy;  // gradients
  // As in Starts.
  const float* first;
  float* ends;
  float* multipliers;
};

/// A tile as it comes from memory.
template <class T, class L, bool kGradients>
struct RawTile {
  alignas(16) T dt[kTileSteps<L>][L::kChannels];
  alignas(16) T x[kTileSteps<L>][L::kChannels];  // u; gradients: dy
  alignas(16) T z[kGradients ? kTileSteps<L> : 1][L::kChannels];
  alignas(16) T row[kTileSteps<L>][L::kN];  // B; gradients: C
};
/// A tile as it is used.
template <class L, bool kGeneral>
struct UsedTile {
  // delta, and the scalar that drives the states or their gradients.
  alignas(16) float2 delta_and_drive[kTileSteps<L>][L::kChannels];
  alignas(16) float row[kTileSteps<L>][L::kN];
  float alpha[kGeneral ? kTileSteps<L> : 1][L::kChannels];
};
template <class T, class L, bool kGeneral, bool kGradients>
struct EndsShared {
  RawTile<T, L, kGradients> raw[2];
  UsedTile<L, kGeneral> used[2];
};

/// The work of one block. Tiles count from where the walk begins.
template <class T, class L, bool kGeneral, bool kGradients>
struct Ends {
  using Shared = EndsShared<T, L, kGeneral, kGradients>;
  using Raw = RawTile<T, L, kGradients>;
  using Used = UsedTile<L, kGeneral>;
  static constexpr int kSteps = kTileSteps<L>;
  using ChannelStream = TileStream<kSteps, L::kChannels, L::kThreads, 0, T>;
  using RowStream = TileStream<kSteps, L::kN, L::kThreads, L::kThreads / 2, T>;
  // A tile is prepared by pairs of channels in rounds, in which kRoundSteps steps are added.
  static constexpr int kPairs = L::kChannels / 2;
  static constexpr int kRows = L::kThreads / kPairs;
  static constexpr int kRounds = std::max(1, kSteps / kRows);
  static constexpr int kRoundSteps = kSteps / kRounds;
  static constexpr int kUnroll = kGeneral ? 1 : std::min(kRoundSteps, 64 / L::kStates);
  static_assert(kSteps % kRounds == 0 && kRounds * kRows >= kSteps);

  const EndsArgs<T>& p;
  const Place<L>& at;
  Shared& s;
  int stop;  // positions of the segment from here on are padding
  int tiles;
  // Of a pair of channels.
  float bias[2];
  float rate[kGeneral ? 2 : 1] = {};
  bool owns;            // whether a state of the thread exists
  float slowest;        // of the multipliers of the thread: its A
  float A[L::kStates];  // times log2(e) unless general
  float sum[L::kStates] = {};
  float alpha_sum = 0.0F;
  float weight[kGeneral ? L::kStates : 1];
  bool done = false;  // all weights of the warp have become nothing

  __device__ Ends(const EndsArgs<T>& args, const Place<L>& place, Shared& shared)
      : p(args), at(place), s(shared), stop(min(place.length, place.stop)) {
    const Operands<T>& in = p.in;
    read_A<L>(in.A_log, at, in.sizes.dstate, kGeneral ? 1.0F : kLog2e, A);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = at.tile * L::kChannels + pair_column() + i;
      const bool exists = channel < in.sizes.channels;
      bias[i] = exists ? in.dt_bias[channel] : 0.0F;
      if constexpr (kGeneral)
        if (in.tau != nullptr) rate[i] = exists ? softplus(in.dtA_bias[channel]) : 0.0F;
    }
    tiles = stop > at.begin ? (stop - at.begin + kSteps - 1) / kSteps : 0;
    const int first = at.part * L::kStates;
    owns = at.active && first < in.sizes.dstate;
    slowest = A[0];
#pragma unroll
    for (int n = 1; n < L::kStates; ++n)
      if (first + n < in.sizes.dstate) slowest = fmaxf(slowest, A[n]);
    for (float& v : weight) v = 1.0F;
  }

  static __device__ __forceinline__ int pair_column() {
    return static_cast<int>(threadIdx.x) % kPairs * 2;
  }
  __device__ __forceinline__ int first_of(int tile) const {
    return at.begin + (kGradients ? tile : tiles - 1 - tile) * kSteps;
  }

  /// One pair of channels of one step of a tile.
  __device__ __forceinline__ void prepare(int tile, int round) {
    const int j = static_cast<int>(threadIdx.x) / kPairs + round * kRows;
    if (kRows > kSteps && j >= kSteps) return;
    const Raw& from = s.raw[tile & 1];
    Used& to = s.used[tile & 1];
    const bool gated = kGradients && p.in.z.data != nullptr;
    const int column = pair_column();
    const int position = first_of(tile) + j;
    const bool exists = position >= at.begin && position < stop;
    Packed<T, 2> dt, x, z{};
    dt.load(&from.dt[j][column]);
    x.load(&from.x[j][column]);
    if (gated) z.load(&from.z[j][column]);
    float out[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float step = softplus_of_step<T>(dt.get(i) + bias[i]);
      const float delta = exists ? step : 0.0F;
      const float gate = gated ? z.get(i) * fast_sigmoid(z.get(i)) : 1.0F;
      out[2 * i] = delta;
      out[2 * i + 1] = x.get(i) * (kGradients ? gate : kGeneral ? 1.0F : delta);
      if constexpr (kGeneral)
        to.alpha[j][column + i] = p.in.tau == nullptr ? delta
                                  : exists            ? p.in.tau[at.first_row + position] * rate[i]
                                                      : 0.0F;
    }
    write_shared<4>(&to.delta_and_drive[j][column].x, out);
  }
  __device__ __forceinline__ void widen_rows(int tile) {
    widen_tile<kSteps * L::kN, L::kThreads>(s.raw[tile & 1].row[0], s.used[tile & 1].row[0]);
  }

  /// Adds some steps of a tile, those of the largest weights first.
  __device__ __forceinline__ void add_steps(const Used& from, int first) {
#pragma unroll kUnroll
    for (int k = 0; k < kRoundSteps; ++k) {
      const int j = kGradients ? first + k : kSteps - 1 - first - k;
      const float2 v = from.delta_and_drive[j][at.local];
      float row[L::kStates];
      read_shared<L::kStates>(from.row[j] + at.part * L::kStates, row);
      if constexpr (kGeneral) {
        add_general(from.alpha[j][at.local], v.x, v.y, row);
      } else {
        if constexpr (kGradients) alpha_sum += v.x;
#pragma unroll
        for (int n = 0; n < L::kStates; ++n)
          sum[n] = fmaf(exp2_approx(alpha_sum * A[n]), v.y * row[n], sum[n]);
        if constexpr (!kGradients) alpha_sum += v.x;
      }
    }
  }
  __device__ __forceinline__ void add_general(float alpha, float delta, float drive,
                                              const float (&row)[L::kStates]) {
    const GeneralRule rule{p.in.discretization};
#pragma unroll
    for (int n = 0; n < L::kStates; ++n) {
      const float behind = weight[n];
      weight[n] *= rule.multiplier(alpha, A[n]);
      sum[n] = kGradients ? fmaf(weight[n], drive * row[n], sum[n])
                          : fmaf(behind, rule.factor(delta, A[n]) * drive * row[n], sum[n]);
    }
  }

  /// Whether all weights of the warp are below 2^-64.
  [[nodiscard]] __device__ __forceinline__ bool forgotten() const {
    bool zero = true;
    if constexpr (kGeneral) {
      for (const float w : weight) zero = zero && fabsf(w) < 0x1p-64F;
    } else {
      zero = alpha_sum * slowest < -64.0F;
    }
    return __all_sync(0xFFFFFFFFU, zero || !owns);
  }

  /// Adds a tile, unless all is forgotten, and prepares the next one.
  template <bool kAdd>
  __device__ __forceinline__ void turn(int tile) {
    widen_rows(tile + 1);
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      if constexpr (kAdd) add_steps(s.used[tile & 1], round * kRoundSteps);
      prepare(tile + 1, round);
    }
  }

  __device__ void run() {
    const Operands<T>& in = p.in;
    const std::int64_t row = at.first_row + first_of(0);
    const auto stream = [&](const DeviceRows<const T>& rows) {
      return ChannelStream(rows, row, at.tile * L::kChannels, in.sizes.channels, in.wide_channels);
    };
    ChannelStream dt = stream(in.dt);
    ChannelStream x = stream(kGradients ? p.dy : in.u);
    ChannelStream z = stream(in.z);
    RowStream B_or_C(kGradients ? in.C : in.B, row, 0, in.sizes.dstate, in.wide_states);
    const auto request = [&](int tile) {
      if (tile >= tiles) return;
      Raw& to = s.raw[tile & 1];
      const int rows = stop - first_of(tile);
      constexpr int kPace = kGradients ? kSteps : -kSteps;
      dt.load(to.dt[0], rows);
      x.load(to.x[0], rows);
      if (kGradients && in.z.data != nullptr) z.load(to.z[0], rows);
      B_or_C.load(to.row[0], rows);
      commit_copies();
      dt.move(kPace);
      x.move(kPace);
      z.move(kPace);
      B_or_C.move(kPace);
    };
    request(0);
    wait_for_copies();
    __syncthreads();
    request(1);
    turn<false>(-1);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies();
      if (__syncthreads_and(static_cast<int>(done)) != 0) break;
      request(tile + 2);
      if (done) {
        turn<false>(tile);
      } else {
        turn<true>(tile);
        done = forgotten();
      }
    }
  }

  /// To the next segment; to the first one what enters it.
  __device__ void write() {
    const Sizes& z = p.in.sizes;
    float m[L::kStates];
#pragma unroll
    for (int n = 0; n < L::kStates; ++n)
      m[n] = done ? 0.0F : kGeneral ? weight[kGeneral ? n : 0] : exp2_approx(alpha_sum * A[n]);
    const std::int64_t next = at.state_row(z) + (kGradients ? -z.channels : z.channels);
    write_states<L>(p.ends, next, at, z.dstate, sum);
    write_states<L>(p.multipliers, next, at, z.dstate, m);
    if (at.segment != (kGradients ? z.segments - 1 : 0)) return;
    read_states<L>(p.first, std::int64_t{at.batch} * z.channels + at.channel, at, z.dstate, m);
    write_states<L>(p.ends, at.state_row(z), at, z.dstate, m);
  }
};

template <class T, class L, bool kGeneral, bool kGradients>
__global__ __launch_bounds__(L::kThreads,
                             kEndsBlocks<L>) void selective_scan_ends_kernel(EndsArgs<T> p) {
  extern __shared__ __align__(16) unsigned char bytes[];
  using Block = Ends<T, L, kGeneral, kGradients>;
  const Sizes& sizes = p.in.sizes;
  // Nothing follows the last segment, and for gradients the first one.
  Place<L> at(sizes, p.in.lengths, sizes.segments - 1);
  if constexpr (kGradients) at.move_to(sizes, at.segment + 1);
  Block block(p, at, *reinterpret_cast<typename Block::Shared*>(bytes));
  block.run();
  block.write();
}

template <class T, class L, bool kGeneral, bool kGradients>
void launch_ends(Context& ctx, EndsArgs<T> p) {
  Sizes& sizes = p.in.sizes;
  sizes.tiles = (sizes.channels + L::kChannels - 1) / L::kChannels;
  constexpr std::size_t kBytes = sizeof(EndsShared<T, L, kGeneral, kGradients>);
  static_assert(kBytes <= 64 * 1024);
  const auto kernel = selective_scan_ends_kernel<T, L, kGeneral, kGradients>;
  allow_shared(kernel, kBytes);
  kernel<<<sizes.blocks(sizes.segments - 1), L::kThreads, kBytes, ctx.stream().handle>>>(p);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace

template <class T, bool kGeneral>
SegmentEnds segment_ends(Context& ctx, const Operands<T>& in, DeviceRows<const T> dy,
                         const float* first) {
  SegmentEnds out{{}, {}, first};
  if (in.sizes.segments == 1) return out;
  out.ends = ctx.empty(in.sizes.carry_shape(), DType::float32);
  out.multipliers = ctx.empty(in.sizes.carry_shape(), DType::float32);
  const EndsArgs<T> p{in, dy, first, out.ends.view().template data<float>(),
                      out.multipliers.view().template data<float>()};
  visit_warps<kGeneral>(in.sizes.dstate, [&]<class L>() {
    if (dy.data != nullptr)
      launch_ends<T, L, kGeneral, true>(ctx, p);
    else
      launch_ends<T, L, kGeneral, false>(ctx, p);
  });
  return out;
}

#define LRNN_SEGMENT_ENDS(T, general)                                                              \
  template SegmentEnds segment_ends<T, general>(Context&, const Operands<T>&, DeviceRows<const T>, \
                                                const float*)
LRNN_SEGMENT_ENDS(float, false);
LRNN_SEGMENT_ENDS(float, true);
LRNN_SEGMENT_ENDS(__nv_bfloat16, false);
LRNN_SEGMENT_ENDS(__nv_bfloat16, true);
#undef LRNN_SEGMENT_ENDS

}  // namespace lrnn::cuda::selective
