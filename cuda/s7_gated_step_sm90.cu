// All of s7_gated_step behind the projections, on Hopper.
//
// A cluster owns kTeam tokens: each of its blocks takes one of them as common/s7_gated_step.cuh
// tells, sends GELU of the outputs to all blocks and the outputs to the block of their columns, and
// then multiplies all tokens with its columns of the gate on tensor cores: warps share columns and
// halves of the depth, with the weight in registers, read while the kernel before still runs. A row
// of a product does not depend on the others. Bound by latency: 32 tokens of 256 channels and 16
// states take 2.6 us in a recorded step on an H200.
#include "common/capability.cuh"
#include "common/cluster.cuh"
#include "common/s7_gated_step.cuh"

namespace lrnn::cuda::s7 {
namespace {

constexpr int kTeam = 4;         // tokens and blocks of a cluster
constexpr int kMostDim = 256;    // H
constexpr int kTileColumns = 8;  // of a warp
constexpr int kTiles = 8;        // of a block
constexpr int kHalves = kStepWarps / kTiles;
constexpr int kColumns = kTiles * kTileColumns;
constexpr int kDepthStep = 32;  // of two products: four lanes read 16 bytes each
constexpr int kSteps = kMostDim / kHalves / kDepthStep;
static_assert(kTeam * kColumns >= kMostDim);

struct GateArgs {
  const bf16* weight;
  const bf16* hid;
  bf16* y;
  int tokens;
  int columns;  // of a block, a multiple of kTileColumns
};

/// What a block receives from its cluster and leaves to its own threads.
struct Exchange {
  static constexpr int kPitch =
      kMostDim + 8;  // rows that a warp reads together, on different banks
  __align__(16) bf16 gelu[kTeam][kPitch];
  __align__(16) bf16 v[kTeam][kColumns];
  __align__(16) bf16 own_gelu[kMostDim];
  __align__(16) bf16 own_v[kMostDim];
  float sums[kHalves][kTeam][kColumns];
  Mailbox mailbox;
};

/// A block's columns of the gate.
class GateProduct {
 public:
  /// Before the kernels before this one have ended.
  __device__ __forceinline__ GateProduct(const GateArgs& a, int dim, int first_column)
      : dim_(dim), lane_(static_cast<int>(threadIdx.x) % 32) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    tile_ = warp % kTiles;
    half_ = warp / kTiles;
    const int column = first_column + tile_ * kTileColumns + lane_ / 4;
    const bf16* const row = a.weight + static_cast<std::int64_t>(min(column, dim - 1)) * dim;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      weight_[s] = {};
      if (depth(s) < dim_) weight_[s] = load_weight(row + depth(s));
    }
  }
  /// A k step of mma wants elements 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 from lane 4 g + c; it gets
  /// neighbours, of both operands alike.
  __device__ __forceinline__ void run(Exchange& mem) const {
    float sums[2][4] = {};
    const int token = lane_ / 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Packed<bf16, 8> x{};
      if (token < kTeam && depth(s) < dim_)
        x = *reinterpret_cast<const Packed<bf16, 8>*>(&mem.gelu[token][depth(s)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t rows[4] = {x.words[2 * i], 0, x.words[2 * i + 1], 0};
        multiply_add(sums[i], rows, weight_[s].words[2 * i], weight_[s].words[2 * i + 1]);
      }
    }
    if (token >= kTeam) return;
    float* const to = &mem.sums[half_][token][tile_ * kTileColumns + lane_ % 4 * 2];
    to[0] = sums[0][0] + sums[1][0];
    to[1] = sums[0][1] + sums[1][1];
  }

 private:
  [[nodiscard]] __device__ __forceinline__ int depth(int s) const {
    return (half_ * kSteps + s) * kDepthStep + lane_ % 4 * 8;
  }

  int dim_, lane_, tile_, half_;
  Packed<bf16, 8> weight_[kSteps];
};

/// Sends what the block has of its token.
__device__ __forceinline__ void send_token(Exchange& mem, int rank, int dim, int columns) {
  constexpr int kPairs = kMostDim / 2;
  static_assert(kStepThreads == kTeam * kPairs);
  const int to = static_cast<int>(threadIdx.x) / kPairs;
  const int k = static_cast<int>(threadIdx.x) % kPairs * 2;
  if (k >= dim) return;
  const auto pair = [&](const bf16* p) { return *reinterpret_cast<const std::uint32_t*>(p + k); };
  send(&mem.gelu[rank][k], mem.mailbox, to, pair(mem.own_gelu));
  const int column = k - to * columns;
  if (column >= 0 && column < columns) send(&mem.v[rank][column], mem.mailbox, to, pair(mem.own_v));
}

template <int kPer>
__global__ __launch_bounds__(kStepThreads) void s7_gated_step_kernel(TokenArgs<bf16> a,
                                                                     GateArgs gate) {
  using Step = TokenStep<bf16, kPer>;
  __shared__ typename Step::Shared shared;
  __shared__ Exchange mem;
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t token = blockIdx.x;
  const int rank = static_cast<int>(blockIdx.x) % kTeam;
  const std::int64_t first_token = token - rank;
  const int tokens = static_cast<int>(min(gate.tokens - first_token, std::int64_t{kTeam}));
  const int first_column = rank * gate.columns;
  const int columns = max(0, min(gate.columns, a.dim - first_column));
  if (thread == 0) {
    mem.mailbox.init();
    mem.mailbox.expect(tokens * (a.dim + columns) * static_cast<int>(sizeof(bf16)));
  }
  cluster_meet();
  const GateProduct product(gate, a.dim, first_column);
  Step step(a);
  wait_for_previous_kernel();
  const int row = thread / kColumns;
  const int column = thread % kColumns;
  const bool finishes = row < tokens && column < columns;
  const std::int64_t at = (first_token + row) * a.dim + first_column + column;
  const float hid = finishes ? to_float(gate.hid[at]) : 0.0F;
  if (rank < tokens) {
    step.run(token, shared, [&](int channel, bf16 v) {
      mem.own_v[channel] = v;
      mem.own_gelu[channel] = activated(v);
    });
    __syncthreads();
    send_token(mem, rank, a.dim, gate.columns);
  }
  mem.mailbox.wait(0);
  product.run(mem);
  __syncthreads();
  if (!finishes) return;
  const float sum = mem.sums[0][row][column] + mem.sums[1][row][column];
  gate.y[at] = gated<bf16>(sum, to_float(mem.v[row][column]), hid);
}
static_assert(kHalves == 2 && kStepThreads >= kTeam * kColumns);

}  // namespace

bool takes_sm90(const S7GatedStep& a) {
  const std::int64_t dim = a.x.dim(2);
  return a.x.dtype() == DType::bfloat16 && compute_capability() == 90 && dim <= kMostDim &&
         allows_vectors(a.gate.data<bf16>(), dim, dim, 8);
}

void step_sm90(Context& ctx, const S7GatedStep& a, TensorView P) {
  const int tokens = static_cast<int>(a.x.dim(0));
  const int dim = static_cast<int>(a.x.dim(2));
  constexpr int kUnit = kTeam * kTileColumns;
  const GateArgs gate{.weight = a.gate.data<bf16>(),
                      .hid = a.hid.data<bf16>(),
                      .y = a.y.data<bf16>(),
                      .tokens = tokens,
                      .columns = (dim + kUnit - 1) / kUnit * kTileColumns};
  const auto clusters = static_cast<unsigned>((tokens + kTeam - 1) / kTeam);
  visit_states<bf16>(dim, a.base.dim(0), [&]<int kPer>() {
    launch_clusters(s7_gated_step_kernel<kPer>, kTeam, kTeam * clusters, kStepThreads, 0,
                    ctx.stream().handle, token_args<bf16>(a, P), gate);
  });
}

}  // namespace lrnn::cuda::s7
