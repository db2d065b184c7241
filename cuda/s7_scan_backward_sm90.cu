// Gradients of the weights of S7's projections on Hopper, for H up to 256.
//
//   dW_C[(h, n), k] += sum_t (dy_t[h] s_t[n]) x_t[k],  dW_B[(h, n), k] += sum_t (x_t[h] g_t[n])
//   x_t[k]
// are products over tokens whose left operand has a factor of each token for each state.
// Activations are transposed once, in panels of tokens; a warpgroup owns 64 rows h of one state and
// all k, and multiplies fragments of its rows by the factors of its state in registers. Blocks
// split the tokens where there are few of them; their sums are added in order. The rows of D, A and
// bias are plain products with (dy x), dA and g.
#include <algorithm>

#include "common/s7_wgmma.cuh"

namespace lrnn::cuda::s7 {
namespace {

constexpr int kPairRows = 64;                  // rows of a warpgroup
constexpr int kPairStates = 2;                 // states of a block, one of each warpgroup
constexpr int kSingleRows = 128;               // rows of a block without factors
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
                                           const Shared<Z>& shared, std::int64_t begin, int count) {
  constexpr std::int64_t kColumns = kPanelColumns<T>;
  const Left<T> left = a.left[work.kind];
  const auto* const rows = reinterpret_cast<const unsigned char*>(left.packed);
  const auto* const right = reinterpret_cast<const unsigned char*>(a.right);
  const float* const scale =
      a.scales +
      (static_cast<std::int64_t>(work.kind) * a.states + work.state) * a.panels * kColumns;
  fill_buffers(
      shared, count, Z::kFilledBytes, [&](int i, std::uint32_t buffer, std::uint32_t barrier) {
        const std::int64_t p = begin + i;
        copy_bytes(buffer, rows + (p * left.panel_rows + work.row) * kPanelRowBytes, Z::kLeftBytes,
                   barrier);
        copy_bytes(buffer + Z::kLeftBytes, right + p * Z::kRightBytes, Z::kRightBytes, barrier);
        if constexpr (Z::kScaled)
          for (int n = 0; n < kPairStates; ++n)
            copy_bytes(buffer + static_cast<std::uint32_t>(Z::kLeftBytes + Z::kRightBytes +
                                                           n * Z::kScaleBytes),
                       scale + (n * a.panels + p) * kColumns, Z::kScaleBytes, barrier);
      });
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
  const auto count =
      static_cast<int>(max(std::int64_t{0}, min(a.panels - begin, a.panels_of_split)));
  if (copies()) {
    copy_pairs(a, work, shared, begin, count);
    return;
  }
  constexpr std::int64_t kOut = kGroups * kPairRows * kWidth;
  float* const out =
      a.partial + (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kOut;
  multiply_pairs(out, shared, count);
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

template void weight_gradients_sm90<float>(Context&, const Problem<float>&, const float*,
                                           const float*, const float*, const float*, const float*,
                                           float*);
template void weight_gradients_sm90<bf16>(Context&, const Problem<bf16>&, const bf16*, const bf16*,
                                          const float*, const float*, const float*, float*);

}  // namespace lrnn::cuda::s7
