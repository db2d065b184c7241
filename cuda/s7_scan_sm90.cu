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
// One warp copies weights through a ring of buffers, each of which feeds both warpgroups.
//
// Bound by the tensor cores. 16384 tokens, H 256, N 16 on an H200, caches warm: drive 38.8 us (TF32
// 63.6), ds 47.8 (96.5), y 53.8 (97.8), dx 108.7 (193.9); ds, y and dx are 680 to 720 TFLOP/s
// (356 to 382), 88 to 93 % of the rate of a bfloat16 GEMM of 8192^3 (92 to 99 % of half of it).
// The drive reaches 550: its tiles near the end of the triangle sum over few k, and their sums over
// channels show.
#include <algorithm>

#include "common/capability.cuh"
#include "common/s7_pack.cuh"

namespace lrnn::cuda::s7 {
namespace {

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

/// Copies `count` buffers of packed weights, one after another.
template <class Z>
__device__ __forceinline__ void copy_weights(const Shared<Z>& shared, const void* packed,
                                             int count) {
  const auto* const from = static_cast<const unsigned char*>(packed);
  fill_buffers(shared, count, Z::kBufferBytes,
               [&](int i, std::uint32_t buffer, std::uint32_t barrier) {
                 copy_bytes(buffer, from + static_cast<std::int64_t>(i) * Z::kBufferBytes,
                            Z::kBufferBytes, barrier);
               });
}

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
    copy_weights(shared, a.packed, blocks * ChannelOrder<T, kWidth, kDrive>::kPerStates);
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

/// c += (factors x operand) times the next `panels` buffers, an even number.
template <class Z, bool kScaled, int kTiles>
__device__ __forceinline__ void mix(float (&c)[kTiles][4], Fragments (&sets)[2], Reader<Z>& in,
                                    const Seat& at, int panels, float upper, float lower) {
  using T = typename Z::T;
  const int row = at.group * 64 + at.warp * 16 + at.lane % 16;
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
  for (int panel = 0; panel < panels; panel += 2) {
    multiply(sets[0], sets[1], panel);
    multiply(sets[1], sets[0], panel + 1);
  }
}

/// The passes of all states, each with its own factors of rows.
template <class Z, int kTiles>
__device__ __forceinline__ void mix_states(float (&c)[kTiles][4], Fragments (&sets)[2],
                                           Reader<Z>& in, const Seat& at, const float* scale,
                                           std::int64_t tokens, int dstate) {
  const auto factor = [&](int n, int half) {
    const std::int64_t token = at.token + half * 8;
    return n < dstate && token < tokens ? __ldg(scale + token * dstate + n) : 0.0F;
  };
  float upper = factor(0, 0);
  float lower = factor(0, 1);
  for (int n = 0; n < dstate; ++n) {
    const float next_upper = factor(n + 1, 0);
    const float next_lower = factor(n + 1, 1);
    mix<Z, true>(c, sets, in, at, Z::kPanels, upper, lower);
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
__device__ __forceinline__ void mix_small(float (&c)[kTiles][4], Fragments (&sets)[2],
                                          Reader<Z>& in, const Seat& at, const MixArgs<T>& a) {
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
  mix<Z, false>(c, sets, in, at, Z::kPanels, 1.0F, 1.0F);
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
  mix<Z, false>(c, sets, in, at, a.small_panels, 1.0F, 1.0F);
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
  Fragments sets[2];
  clear(c);
  clear(sets[1]);
  load_operand(shared, at, Z::kPanels, a.x);
  mix<Z, false>(c, sets, in, at, Z::kPanels, 1.0F, 1.0F);
  in.finish();
  pin(c);
  multiply_skip(c, at, a.skip);
  mix_states(c, sets, in, at, a.scale, a.x.tokens, a.dstate);
  if constexpr (kBackward) {
    in.finish();
    group_wait(1 + at.group, kWarpgroup);
    load_operand(shared, at, Z::kPanels, a.skip);
    mix_states(c, sets, in, at, a.dy_scale, a.x.tokens, a.dstate);
    mix_small(c, sets, in, at, a);
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
    copy_weights(
        shared, a.packed,
        kBackward ? Z::kPanels * (2 + 2 * a.dstate) + a.small_panels : Z::kPanels * (1 + a.dstate));
  else
    mix_block<T, kWidth, kBackward>(a, shared);
}

// ---- Launches ----------------------------------------------------------------------------------

unsigned token_blocks(std::int64_t tokens) {
  return static_cast<unsigned>((tokens + kRows - 1) / kRows);
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

#define LRNN_S7_INSTANTIATE(T)                                                                \
  template Tensor pack_forward_sm90<T>(Context&, const Problem<T>&);                          \
  template Tensor pack_backward_sm90<T>(Context&, const Problem<T>&);                         \
  template void project_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,         \
                                const float*, float*, float*);                                \
  template void read_out_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*,        \
                                 const float*, T*);                                           \
  template void state_gradients_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*, \
                                        const T*, float*);                                    \
  template void input_gradients_sm90<T>(Context&, const Problem<T>&, const Tensor&, const T*, \
                                        const T*, const float*, const float*, const float*, T*);
LRNN_S7_INSTANTIATE(float)
LRNN_S7_INSTANTIATE(bf16)
#undef LRNN_S7_INSTANTIATE

}  // namespace lrnn::cuda::s7
