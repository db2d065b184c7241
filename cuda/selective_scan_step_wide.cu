// One token of the selective scan with 32 to 128 states of Mamba's rule, of eight and more
// sequences.
//
// A block owns kThreads / kLanes channels of kRows sequences. kLanes neighbouring lanes share a
// channel, four neighbouring states each; A and the weight that projects dt are read while the
// kernel before still runs, the states of all sequences are in flight together behind it. Each lane
// prepares and finishes one of the sequences. Bound by the states, in and out: 32 sequences, 1536
// channels, 64 states (12.6 MB, in L2) take 7.6 us in a recorded step on an H200.
#include "common/selective_scan.cuh"
#include "common/selective_scan_step_wide.cuh"
#include "common/transpose_add.cuh"

namespace lrnn::cuda::selective {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;
constexpr int kStates = 4;  // of a lane
constexpr int kRank = 4;    // elements of the projection of dt that a lane reads at a time

template <class T>
struct WideArgs {
  Operands<T> in;
  DeviceRows<T> y;
  float* state;
  // The projection of dt, if the step does it.
  DeviceRows<const T> dt_low;
  const T* dt_weight;  // null: in.dt
  int rank;
};

/// Where a lane is. Lanes of no channel repeat the last one, those of no sequence the last one, and
/// store nothing.
template <int kLanes>
struct Seat {
  int part;     // which states
  int own_row;  // the sequence that the lane prepares and finishes
  int first, last;
  int channel;
  bool exists;
  bool finishes;

  __device__ __forceinline__ explicit Seat(const Sizes& s) {
    part = static_cast<int>(threadIdx.x) % kLanes;
    own_row = part * kRows / kLanes;
    first = static_cast<int>(blockIdx.y) * kRows;
    last = s.batch - 1;
    const int wanted =
        static_cast<int>(blockIdx.x) * (kThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
    channel = min(wanted, s.channels - 1);
    exists = wanted < s.channels;
    finishes = exists && part % (kLanes / kRows) == 0 && first + own_row <= last;
  }
  [[nodiscard]] __device__ __forceinline__ int row(int r) const { return min(first + r, last); }
};

/// dt of the lane's own sequence, as if it had been stored.
template <class T, int kLanes>
struct Projection {
  Packed<T, kRank> weight{};

  __device__ __forceinline__ void load_weight(const WideArgs<T>& p, const Seat<kLanes>& seat) {
    if (p.dt_weight != nullptr && seat.part * kRank < p.rank)
      weight.load(p.dt_weight + std::int64_t{seat.channel} * p.rank + seat.part * kRank);
  }
  __device__ __forceinline__ float run(const WideArgs<T>& p, const Seat<kLanes>& seat) const {
    float sum[kRows] = {};
    Packed<T, kRank> w = weight;
    for (int k = seat.part * kRank; k < p.rank;) {
      Packed<T, kRank> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r].load(p.dt_low.row(seat.row(r)) + k);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kRank; ++j) sum[r] = fmaf(x[r].get(j), w.get(j), sum[r]);
      k += kLanes * kRank;
      if (k < p.rank) w.load(p.dt_weight + std::int64_t{seat.channel} * p.rank + k);
    }
    transpose_add<kRows, kLanes, 1>(sum, seat.part);
    return to_float(from_float<T>(sum[0]));
  }
};

/// B and C of the sequences of a block, which all its channels share.
template <class T, int kN>
struct SharedRows {
  T B[kRows][kN];
  T C[kRows][kN];

  template <int kLanes>
  __device__ __forceinline__ void load(const Operands<T>& in, const Seat<kLanes>& seat) {
    constexpr int kPerRow = kN / kStates;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kRows * kPerRow; i += kThreads) {
      const int r = i / kPerRow % kRows;
      const int n = i % kPerRow * kStates;
      const bool is_C = i >= kRows * kPerRow;
      Packed<T, kStates> v;
      v.load((is_C ? in.C : in.B).row(seat.row(r)) + n);
      *reinterpret_cast<Packed<T, kStates>*>(is_C ? &C[r][n] : &B[r][n]) = v;
    }
  }
  static __device__ __forceinline__ Packed<T, kStates> read(const T* p) {
    return *reinterpret_cast<const Packed<T, kStates>*>(p);
  }
};

template <class T, int kLanes>
__global__ __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2) void selective_scan_step_wide_kernel(
    WideArgs<T> p) {
  constexpr int kN = kLanes * kStates;
  __shared__ __align__(16) SharedRows<T, kN> rows;
  let_next_kernel_start();
  const Operands<T>& in = p.in;
  const Seat<kLanes> seat(in.sizes);
  const int n = seat.part * kStates;
  const std::int64_t channel = seat.channel;
  const auto state = [&](int r) {
    return p.state + (std::int64_t{seat.row(r)} * in.sizes.channels + channel) * kN + n;
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (n % 32 == 0) prefetch_to_l2(state(r));
  float A[kStates];
  load_vec<float, kStates>(in.A_log + channel * kN + n, A);
#pragma unroll
  for (float& v : A) v = -expf(v) * kLog2e;
  Projection<T, kLanes> projection;
  projection.load_weight(p, seat);
  const float dt_bias = in.dt_bias[channel];
  const float D = in.D != nullptr ? in.D[channel] : 0.0F;
  wait_for_previous_kernel();
  float h[kRows][kStates];
#pragma unroll
  for (int r = 0; r < kRows; ++r) load_vec<float, kStates>(state(r), h[r]);
  rows.load(in, seat);
  const int own = seat.row(seat.own_row);
  const float u = to_float(in.u.row(own)[channel]);
  const float z = in.z.data != nullptr ? to_float(in.z.row(own)[channel]) : 0.0F;
  const float dt =
      p.dt_weight != nullptr ? projection.run(p, seat) : to_float(in.dt.row(own)[channel]);
  const float own_delta = softplus(dt + dt_bias);
  const float own_drive = own_delta * u;
  __syncthreads();
  float y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const auto B = rows.read(&rows.B[r][n]);
    const auto C = rows.read(&rows.C[r][n]);
    constexpr int kShare = kLanes / kRows;
    const float delta = __shfl_sync(0xFFFFFFFFU, own_delta, r * kShare, kLanes);
    const float drive = __shfl_sync(0xFFFFFFFFU, own_drive, r * kShare, kLanes);
    y[r] = 0.0F;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      h[r][k] = fmaf(decay(delta, A[k]), h[r][k], drive * B.get(k));
      y[r] = fmaf(C.get(k), h[r][k], y[r]);
    }
    if (seat.exists && seat.first + r <= seat.last) store_vec<float, kStates>(state(r), h[r]);
  }
  transpose_add<kRows, kLanes, 1>(y, seat.part);
  if (!seat.finishes) return;
  float v = fmaf(D, u, y[0]);
  if (in.z.data != nullptr) v *= z * fast_sigmoid(z);
  p.y.row(own)[channel] = from_float<T>(v);
}

template <class T>
bool applies(const SelectiveScanStep& a) {
  constexpr std::int64_t kMostSequences = std::int64_t{kRows} * 65535;  // of a grid
  const std::int64_t batch = a.in.u.dim(0);
  const std::int64_t dstate = a.in.A_log.dim(1);
  if (is_general(a.in) || batch < kRows || batch > kMostSequences) return false;
  const auto allows = [&]<class U>(const U* p, std::int64_t width, std::int64_t stride) {
    return allows_vectors(p, width, stride, kStates);
  };
  if (a.dt_low && !(allows(a.dt_low.data<T>(), a.dt_low.dim(2), detail::row_stride(a.dt_low)) &&
                    allows(a.dt_weight.data<T>(), a.dt_low.dim(2), 0)))
    return false;
  return allows(a.state.data<float>(), dstate, 0) && allows(a.in.A_log.data<float>(), dstate, 0) &&
         allows(a.in.B.data<T>(), dstate, detail::row_stride(a.in.B)) &&
         allows(a.in.C.data<T>(), dstate, detail::row_stride(a.in.C));
}

template <class T, int kLanes>
void launch(Context& ctx, const SelectiveScanStep& a) {
  const Sizes sizes(a.in, kThreads / kLanes, kThreads / 32);
  WideArgs<T> p{.in = Operands<T>(a.in, sizes),
                .y = device_rows<T>(a.y),
                .state = a.state.data<float>(),
                .dt_low = {nullptr, 0},
                .dt_weight = nullptr,
                .rank = 0};
  if (a.dt_low) {
    p.dt_low = device_rows<T>(a.dt_low);
    p.dt_weight = a.dt_weight.data<T>();
    p.rank = static_cast<int>(a.dt_low.dim(2));
  }
  const dim3 blocks(static_cast<unsigned>(sizes.tiles),
                    static_cast<unsigned>((sizes.batch + kRows - 1) / kRows));
  launch_overlapped(selective_scan_step_wide_kernel<T, kLanes>, blocks, kThreads, 0,
                    ctx.stream().handle, p);
}

template <class T>
bool run(Context& ctx, const SelectiveScanStep& a) {
  if (!applies<T>(a)) return false;
  switch (a.in.A_log.dim(1)) {
    case 32:
      launch<T, 8>(ctx, a);
      return true;
    case 64:
      launch<T, 16>(ctx, a);
      return true;
    case 128:
      launch<T, 32>(ctx, a);
      return true;
    default:
      return false;
  }
}

}  // namespace

bool step_wide(Context& ctx, const SelectiveScanStep& a) {
  bool done = false;
  visit_float("selective_scan_step", a.in.u.dtype(), [&]<class T>() { done = run<T>(ctx, a); });
  return done;
}

}  // namespace lrnn::cuda::selective
