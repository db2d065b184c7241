// x of many sequences and one token of the scan behind it, two kernels.
//
// The product is that of common/linear_sm90_product.cuh, or for more than 64 sequences that of
// projected_selective_scan_inputs_sm90.cu. The scan may read its states at once: the product lets
// it start only when the kernels before it have ended, or those up to the last that wrote the
// states are known to have ended already, which saves 1.1 us of a layer of 4096 channels. In the
// first case it reads u and z as well: with 40 sequences of 1536 channels 0.4 us less.
//
// A block of the scan owns 64 channels of up to 64 sequences, four lanes a channel, four states
// each. One more thread copies the states, four sequences at a time, through buffers in shared
// memory; the lanes write the new ones from registers. Few are asked for at once, since queues full
// of states hold up the product. dt comes from tensor cores, 16 sequences at a time by the eight
// channels of a warp; a lane prepares and finishes one of four sequences.
//
// Bound by HBM, the states in and out. On an H200 a recorded layer of 128 sequences took 53.6 us
// where the ops one by one took 61.8 (4096 channels, 67 MB of states), or 23.1 in place of 26.1
// (1536 channels, 25 MB); with what has changed around it since 52.2 and 22.7.
#include "common/launch.cuh"
#include "common/linear_sm90.cuh"
#include "common/projected_selective_scan.cuh"
#include "common/selective_scan.cuh"
#include "common/wgmma.cuh"

namespace lrnn::cuda::linear_sm90 {
namespace {

constexpr int kWarps = 8;  // that scan
constexpr int kThreads = 32 * kWarps + 32;
constexpr int kCopier = 32 * kWarps;  // the thread that copies states
constexpr int kLanes = 4;
constexpr int kStates = 4;                    // of a lane
constexpr int kN = kLanes * kStates;          // of a channel
constexpr int kPerWarp = 32 / kLanes;         // channels
constexpr int kChannels = kWarps * kPerWarp;  // of a block
constexpr int kSequenceBytes = kChannels * kN * 4;
constexpr int kBuffers = 5;       // each of four sequences
constexpr int kProductRows = 16;  // of a product on tensor cores, and its depth
constexpr int kMostSteps = 8;     // of the rank
constexpr int kMostRows = 64;     // sequences of a block

struct ScanArgs {
  DeviceRows<const bf16> u, z;  // z.data may be null
  const bf16* x;                // rows of dt_low, B, C
  int rank, batch, channels;
  int per_block;  // sequences
  int ahead;      // fours of them that a block asks for at once
  const bf16* dt_weight;
  const float *dt_bias, *A_log, *D;  // D may be null
  DeviceRows<bf16> y;
  float* state;

  [[nodiscard]] __host__ __device__ int width() const { return rank + 2 * kN; }
};

/// Shared addresses. Of u and z each warp has its own channels, sequence by sequence.
struct Shared {
  static constexpr int kTokenBytes = kPerWarp * 2;  // of a warp and a sequence
  static constexpr int kDtBytes = kProductRows * kPerWarp * 4;  // of a warp
  std::uint32_t states, x, u, z, dt, barriers, end;

  __host__ __device__ __forceinline__ Shared(std::uint32_t base, const ScanArgs& p) : states(base) {
    const auto rows =
        static_cast<std::uint32_t>((p.per_block + kProductRows - 1) / kProductRows * kProductRows);
    x = states + kBuffers * 4 * kSequenceBytes;
    u = x + rows * static_cast<std::uint32_t>(p.width()) * 2U;
    z = u + kWarps * rows * kTokenBytes;
    dt = z + kWarps * rows * kTokenBytes;
    barriers = dt + kWarps * kDtBytes;
    end = barriers + 8 * (1 + 2 * kBuffers);
  }
  [[nodiscard]] __device__ __forceinline__ std::uint32_t buffer(int i) const {
    return states + static_cast<std::uint32_t>(i * 4 * kSequenceBytes);
  }
  /// From u or z to the tokens of a warp.
  [[nodiscard]] __device__ __forceinline__ std::uint32_t tokens(int warp) const {
    return static_cast<std::uint32_t>(warp) * ((z - u) / kWarps);
  }
  /// Barrier of x.
  [[nodiscard]] __device__ __forceinline__ std::uint32_t inputs() const { return barriers; }
  [[nodiscard]] __device__ __forceinline__ std::uint32_t full(int i) const {
    return barriers + 8U * static_cast<std::uint32_t>(1 + i);
  }
  [[nodiscard]] __device__ __forceinline__ std::uint32_t free(int i) const {
    return full(kBuffers + i);
  }
  __device__ void init_barriers() const {
    barrier_init(inputs(), 1);
    for (int i = 0; i < kBuffers; ++i) {
      barrier_init(full(i), 1);
      barrier_init(free(i), 32 * kWarps);
    }
    barrier_init_done();
  }
};

/// The channels and sequences of a block.
struct Block {
  int channel, first, count;
  std::int64_t stride;  // of the states of sequences

  __device__ __forceinline__ explicit Block(const ScanArgs& p)
      : channel(static_cast<int>(blockIdx.x) * kChannels),
        first(static_cast<int>(blockIdx.y) * p.per_block),
        count(min(p.per_block, p.batch - first)),
        stride(std::int64_t{p.channels} * kN) {}
  [[nodiscard]] __device__ __forceinline__ float* states(const ScanArgs& p) const {
    return p.state + first * stride + std::int64_t{channel} * kN;
  }
  /// Bytes of x.
  [[nodiscard]] __device__ __forceinline__ int input_bytes(const ScanArgs& p) const {
    return count * 2 * p.width();
  }
};

/// Copies all states of a block, by one thread.
__device__ __forceinline__ void copy_states(const ScanArgs& p, const Shared& mem, const Block& b) {
  const float* from = b.states(p);
#pragma unroll 1
  for (int q = 0; 4 * q < b.count; ++q) {
    const int to = q % kBuffers;
    const int before = q - p.ahead;
    if (before >= 0) barrier_wait(mem.full(before % kBuffers), before / kBuffers % 2);
    if (q >= kBuffers) barrier_wait(mem.free(to), q / kBuffers % 2 ^ 1);
    const int count = min(4, b.count - 4 * q);
    barrier_expect(mem.full(to), count * kSequenceBytes);
#pragma unroll 1
    for (int j = 0; j < count; ++j, from += b.stride)
      copy_bytes(mem.buffer(to) + static_cast<std::uint32_t>(j * kSequenceBytes), from,
                 kSequenceBytes, mem.full(to));
  }
}
/// Copies u and z of a warp's channels, which are behind copies_async_wait() and __syncwarp().
__device__ __forceinline__ void copy_tokens(const ScanArgs& p, const Shared& mem, const Block& b) {
  static_assert(Shared::kTokenBytes == 16);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t channel = b.channel + warp * kPerWarp;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < b.count; i += 32) {
    const std::uint32_t place =
        mem.tokens(warp) + static_cast<std::uint32_t>(i * Shared::kTokenBytes);
    copy_async(mem.u + place, p.u.row(b.first + i) + channel);
    if (p.z.data != nullptr) copy_async(mem.z + place, p.z.row(b.first + i) + channel);
  }
}

__device__ __forceinline__ void load_words(std::uint32_t (&w)[2], std::uint32_t at) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_four(float (&v)[4], std::uint32_t at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ float load_float(std::uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ float load_bf16(std::uint32_t at) {
  unsigned short v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
  return __uint_as_float(static_cast<unsigned>(v) << 16);
}
__device__ __forceinline__ void store_pair(std::uint32_t at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}

/// A lane of a channel, and of it what does not change with the sequence.
template <int kSteps>
struct Lane {
  int part, local, warp;  // of the states, of the channels of the warp, of the block
  int channel;
  Packed<bf16, 4> dt_weight[kSteps];
  Packed<float, kStates> A_log;
  float dt_bias, D;

  /// The loads stay where they are, before the kernels before this one have ended: the compiler
  /// puts those of constants where they are used.
  __device__ __forceinline__ Lane(const ScanArgs& p, const Block& b, int thread)
      : part(thread % kLanes),
        local(thread % 32 / kLanes),
        warp(thread / 32),
        channel(b.channel + thread / kLanes) {
    const bf16* const w = p.dt_weight + std::int64_t{channel} * p.rank + 4 * part;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      dt_weight[s] = {};
      if (s * kProductRows < p.rank) dt_weight[s].load(w + s * kProductRows);
    }
    A_log.load(p.A_log + std::int64_t{channel} * kN + part * kStates);
    dt_bias = p.dt_bias[channel];
    D = p.D != nullptr ? p.D[channel] : 0.0F;
  }
  /// dt of kProductRows sequences, from those of x at shared address `x`, by the channels of the
  /// warp to [kProductRows][kPerWarp] at `to`. The order of a sum is free, so a lane takes four
  /// neighbouring elements of both operands.
  __device__ __forceinline__ void project(const ScanArgs& p, std::uint32_t x,
                                          std::uint32_t to) const {
    const auto pitch = 2U * static_cast<std::uint32_t>(p.width());
    const std::uint32_t at = x + static_cast<std::uint32_t>(local) * pitch + 8U * part;
    float sum[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s * kProductRows >= p.rank) break;
      std::uint32_t upper[2];
      std::uint32_t lower[2];
      load_words(upper, at + 32U * s);
      load_words(lower, at + 8 * pitch + 32U * s);
      const std::uint32_t rows[4] = {upper[0], lower[0], upper[1], lower[1]};
      multiply_add(sum, rows, dt_weight[s].words[0], dt_weight[s].words[1]);
    }
    const std::uint32_t mine = to + 4U * static_cast<std::uint32_t>(local * kPerWarp + 2 * part);
    __syncwarp();  // until all have read those before
    store_pair(mine, sum[0], sum[1]);
    store_pair(mine + 8 * kPerWarp * 4, sum[2], sum[3]);
    __syncwarp();
  }
};

/// Moves a lane's states of four sequences, `count` of which exist, on: from shared address
/// `states` to `to`. B of the first is at `B`, C behind it, those of the next `pitch` bytes further
/// on. Returns C h of the lane's own sequence, whose delta and drive are given.
__device__ __forceinline__ float advance(const float (&A)[kStates], std::uint32_t states,
                                         std::uint32_t B, std::uint32_t pitch, float own_delta,
                                         float own_drive, int part, int count, float* to,
                                         std::int64_t stride) {
  float y[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float h[kStates];
    Packed<bf16, kStates> b;
    Packed<bf16, kStates> c;
    load_four(h, states + static_cast<std::uint32_t>(j * kSequenceBytes));
    load_words(b.words, B + j * pitch);
    load_words(c.words, B + j * pitch + 2 * kN);
    const float delta = __shfl_sync(0xFFFFFFFFU, own_delta, j, kLanes);
    const float drive = __shfl_sync(0xFFFFFFFFU, own_drive, j, kLanes);
    y[j] = 0.0F;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      h[k] = fmaf(selective::decay(delta, A[k]), h[k], drive * b.get(k));
      y[j] = fmaf(c.get(k), h[k], y[j]);
    }
    if (j < count) __stcs(reinterpret_cast<float4*>(to), make_float4(h[0], h[1], h[2], h[3]));
    to += stride;
  }
  transpose_add<4, kLanes, 1>(y, part);
  return y[0];
}

/// Moves all sequences of a block on, behind the arrival of the inputs.
template <int kSteps>
__device__ __forceinline__ void scan(const ScanArgs& p, const Shared& mem, const Block& b,
                                     const Lane<kSteps>& lane) {
  float A[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) A[k] = -expf(lane.A_log.get(k)) * selective::kLog2e;
  copies_async_wait();
  __syncwarp();
  barrier_wait(mem.inputs(), 0);
  const auto pitch = 2U * static_cast<std::uint32_t>(p.width());
  const std::uint32_t dt_of_warp = mem.dt + static_cast<std::uint32_t>(lane.warp * mem.kDtBytes);
  std::uint32_t x = mem.x;
  std::uint32_t own_dt = 0;
  std::uint32_t token = mem.tokens(lane.warp) +
                        static_cast<std::uint32_t>(lane.part * mem.kTokenBytes + lane.local * 2);
  float* to = b.states(p) + 4 * threadIdx.x;
  bf16* y_at = p.y.row(b.first + lane.part) + lane.channel;
  int buffer = 0;
  int turn = 0;
#pragma unroll 1
  for (int i = 0; i < b.count; i += 4) {
    if (i % kProductRows == 0) {
      lane.project(p, x, dt_of_warp);
      own_dt = dt_of_warp + 4U * static_cast<std::uint32_t>(lane.part * kPerWarp + lane.local);
    }
    // A projected dt is rounded as if it had been stored.
    const float dt = to_float(from_float<bf16>(load_float(own_dt)));
    const float u = load_bf16(mem.u + token);
    const float delta = selective::softplus(dt + lane.dt_bias);
    barrier_wait(mem.full(buffer), turn);
    float y = advance(A, mem.buffer(buffer) + 16U * threadIdx.x,
                      x + 2U * static_cast<std::uint32_t>(p.rank + lane.part * kStates), pitch,
                      delta, delta * u, lane.part, b.count - i, to, b.stride);
    // Each lane for what it has read: racecheck does not follow another lane's arrival.
    barrier_arrive(mem.free(buffer));
    y = fmaf(lane.D, u, y);
    if (p.z.data != nullptr) {
      const float z = load_bf16(mem.z + token);
      y *= z * selective::fast_sigmoid(z);
    }
    if (i + lane.part < b.count) *y_at = from_float<bf16>(y);
    if (++buffer == kBuffers) {
      buffer = 0;
      turn ^= 1;
    }
    x += 4 * pitch;
    own_dt += 4 * kPerWarp * 4;
    token += 4 * mem.kTokenBytes;
    to += 4 * b.stride;
    y_at += 4 * p.y.stride;
  }
}

/// kSteps: of the rank, most. kEarly: u and z are not there yet when the kernel starts.
template <int kSteps, bool kEarly>
__global__ __launch_bounds__(kThreads, 2) void scan_step_kernel(ScanArgs p) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_kernel_start();
  const Shared mem(shared_address(shared), p);
  const Block block(p);
  if (threadIdx.x == kCopier) {
    mem.init_barriers();
    barrier_expect(mem.inputs(), block.input_bytes(p));
  }
  // Before the states, which fill the queues.
  if (!kEarly && threadIdx.x < kCopier) copy_tokens(p, mem, block);
  const Lane<kSteps> lane(p, block, min(static_cast<int>(threadIdx.x), kCopier - 1));
  __syncthreads();
  if (threadIdx.x >= kCopier) {
    if (threadIdx.x == kCopier) copy_states(p, mem, block);
    return;
  }
  wait_for_previous_kernel();
  if (threadIdx.x == 0)
    copy_bytes(mem.x, p.x + std::int64_t{block.first} * p.width(), block.count * p.width() * 2,
               mem.inputs());
  if (kEarly) copy_tokens(p, mem, block);
  scan(p, mem, block, lane);
}

/// Sequences of a block: few enough that the blocks fill a device, whole fours.
int sequences_per_block(int batch, int tiles) {
  constexpr int kBlocks = 264;  // two for each multiprocessor of an H200
  const int groups = std::max(kBlocks / tiles, 1);
  return std::clamp(((batch + groups - 1) / groups + 3) / 4 * 4, 4, kMostRows);
}

template <int kSteps, bool kEarly>
void launch_scan(cudaStream_t stream, const ScanArgs& p) {
  const auto kernel = scan_step_kernel<kSteps, kEarly>;
  const std::size_t bytes = Shared(0, p).end;
  allow_shared(kernel, bytes);
  const dim3 blocks(static_cast<unsigned>(p.channels / kChannels),
                    static_cast<unsigned>((p.batch + p.per_block - 1) / p.per_block));
  launch_overlapped(kernel, blocks, kThreads, bytes, stream, p);
}

ScanArgs scan_args(const ProjectedSelectiveScanStep& a, const bf16* x) {
  ScanArgs p{
      .u = device_rows<bf16>(a.in.u),
      .z = a.in.z ? device_rows<bf16>(a.in.z) : DeviceRows<const bf16>{nullptr, 0},
      .x = x,
      .rank = static_cast<int>(a.dt_weight.dim(1)),
      .batch = static_cast<int>(a.in.u.dim(0)),
      .channels = static_cast<int>(a.in.u.dim(2)),
      .per_block = 0,
      .ahead = 0,
      .dt_weight = a.dt_weight.data<bf16>(),
      .dt_bias = a.in.dt_bias.data<float>(),
      .A_log = a.in.A_log.data<float>(),
      .D = a.in.D ? a.in.D.data<float>() : nullptr,
      .y = device_rows<bf16>(a.y),
      .state = a.state.data<float>(),
  };
  p.per_block = sequences_per_block(p.batch, p.channels / kChannels);
  p.ahead = p.per_block > 16 ? 3 : 1;
  return p;
}

}  // namespace

// Sequences that neither one launch for all layers nor the product of few rows takes.
bool takes(const ProjectedSelectiveScanStep& a) {
  constexpr std::int64_t kFewest = 17;
  constexpr std::int64_t kMost = 256;
  const std::int64_t batch = a.in.u.dim(0);
  const std::int64_t channels = a.in.u.dim(2);
  const std::int64_t rank = a.dt_weight.dim(1);
  if (!applies(a.in.u, a.projection) || batch < kFewest || batch > kMost) return false;
  if (selective::is_general(a.in) || a.in.A_log.dim(1) != kN) return false;
  if (channels % kChannels != 0 || rank % kProductRows != 0 || rank > kMostSteps * kProductRows)
    return false;
  return (!a.in.z ||
          allows_vectors(a.in.z.data<bf16>(), channels, detail::row_stride(a.in.z), 8)) &&
         allows_vectors(a.state.data<float>(), kN, kN, 4) &&
         allows_vectors(a.in.A_log.data<float>(), kN, kN, 4) &&
         allows_vectors(a.dt_weight.data<bf16>(), rank, rank, 4);
}

namespace {

template <bool kEarly>
void step(Context& ctx, const ProjectedSelectiveScanStep& a) {
  const std::int64_t rank = a.dt_weight.dim(1);
  Tensor x = ctx.empty({a.in.u.dim(0), 1, rank + 2 * kN}, DType::bfloat16);
  constexpr std::int64_t kFewRows = 64;
  if (a.in.u.dim(0) <= kFewRows)
    forward(ctx, {.x = a.in.u, .weight = a.projection, .y = x, .stable_weight = true}, true);
  else
    project_inputs(ctx, a, x, kEarly);
  const ScanArgs p = scan_args(a, x.view().data<bf16>());
  const cudaStream_t stream = ctx.stream().handle;
  if (rank <= kMostSteps / 2 * kProductRows) return launch_scan<kMostSteps / 2, kEarly>(stream, p);
  launch_scan<kMostSteps, kEarly>(stream, p);
}

}  // namespace

void projected_selective_scan_step(Context& ctx, const ProjectedSelectiveScanStep& a) {
  step<false>(ctx, a);
}
void projected_selective_scan_step_early(Context& ctx, const ProjectedSelectiveScanStep& a) {
  step<true>(ctx, a);
}

}  // namespace lrnn::cuda::linear_sm90
