// Backward. Steps and ownership: common/dplr_scan.cuh.
//
// By whole chunks, adjoints are walked as states are forward, and sums over tokens follow from
// both: dplr_scan_chunk_sums.cu. Else a group takes the chunks of its segment from the right, each
// in two halves of 16 tokens. Of a half it first recomputes the states, which stay in shared
// memory, then walks back: nothing but sums over tokens and adjoints lives in registers. The first
// half of a chunk is walked twice, since the states of a whole one would not fit. Bound by issue
// slots: per state and token 26 instructions of the adjoint and its products, 18 of the states.
#include "lrnn/ops/dplr_scan.hpp"

#include "common/check.cuh"
#include "common/dplr_scan.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda {
namespace dplr {
namespace {

constexpr int kThreads = 64;
constexpr int kHalf = kChunk / 2;
constexpr int kPitch = kChunk + 2;  // groups of a warp in different banks

enum Field { kE, kB, kW, kK, kC };  // rows of the partial sums; w, k and C have R, R and C of them

template <class T>
struct BackwardArgs {
  Sizes sizes;
  Parameters parameters;
  const T* u;
  const std::int32_t* lengths;
  const T* dy;
  const float* chunk_states;
  const float* dstate_out;
  const float* carries;  // [B, segments, 2, H, N] adjoints that enter from the right; null: none
  T* du;
  float* dstate_in;
  float* partial;       // [B segments, fields, 2, H, N]
  float* partial_skip;  // [B segments, C, H] or null
};

// <w, q>
template <int kLanes, int kPer>
__device__ __forceinline__ float adjoint_product(const Transition<kPer>& m, const Pairs<kPer>& q) {
  return 2.0F * group_sum<kLanes>(partial_product(m.w, q));
}
// q becomes M^* q, given product = <w, q>.
template <int kPer>
__device__ __forceinline__ void retreat(const Transition<kPer>& m, float product, Pairs<kPer>& q) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const float2 q0 = q.v[i];
    const float re = fmaf(m.e.v[i].x, q0.x, fmaf(m.e.v[i].y, q0.y, -m.k.v[i].x * product));
    const float im = fmaf(m.e.v[i].x, q0.y, fmaf(-m.e.v[i].y, q0.x, -m.k.v[i].y * product));
    q.v[i] = {q0.x + re, q0.y + im};
  }
}

// q += 2 conj(C) g, given 2 g, which is 0 at padding.
template <int kPer>
__device__ __forceinline__ void add_direct(const Pairs<kPer>& C, float g, Pairs<kPer>& q) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    q.v[i].x = fmaf(C.v[i].x, g, q.v[i].x);
    q.v[i].y = fmaf(-C.v[i].y, g, q.v[i].y);
  }
}

// Step 3 of one group.
template <class T, int kLanes, int kPer>
class WalkBack {
 public:
  __device__ WalkBack(const BackwardArgs<T>& args, const Place<kLanes>& place, float2* history,
                      float2* tokens, float* products)
      : a_(args),
        s_(args.sizes),
        p_(place),
        history_(history + threadIdx.x),
        products_(products + threadIdx.x / kLanes * kPitch),
        tokens_(tokens + threadIdx.x / kLanes * kPitch),
        m_(load_transition<kLanes, kPer>(args.parameters, s_, place)),
        b_(load_planes<kLanes, kPer>(args.parameters.b, s_, place)),
        C_(load_interleaved<kLanes, kPer>(args.parameters.C, s_, place)),
        D_(args.parameters.D == nullptr ? 0.0F : args.parameters.D[place.head]) {
    const float* start = nullptr;
    if (a_.carries != nullptr)
      start = a_.carries + p_.row * 2 * s_.plane;
    else if (a_.dstate_out != nullptr && p_.holds_last)
      start = a_.dstate_out + p_.batch * 2 * s_.plane;
    q_ = load_planes<kLanes, kPer>(start, s_, p_);
  }

  __device__ void run() {
    for (int chunk = (p_.longest - 1) / kChunk; chunk >= 0; --chunk) walk_chunk(chunk);
    if (a_.dstate_in != nullptr && p_.first)
      store_planes(a_.dstate_in + p_.batch * 2 * s_.plane, s_, p_, q_);
    store_sums();
  }

 private:
  __device__ __forceinline__ void walk_chunk(int chunk) {
    const int t = p_.begin + chunk * kChunk;
    load_tokens(t);
    const int left = p_.left(t, kChunk);
    const float* const states =
        left > 0 ? a_.chunk_states + (p_.batch * s_.chunks + t / kChunk) * 2 * s_.plane : nullptr;
    if (__all_sync(kAll, left == kChunk))
      walk_halves<true>(t, kChunk, states);
    else
      walk_halves<false>(t, left, states);
  }

  // kFull: all tokens are valid, in all groups of the warp. Without branches the sums of one token
  // fill the time in which the reduction of the next one is waited for.
  template <bool kFull>
  __device__ __forceinline__ void walk_halves(int t, int left, const float* states) {
#pragma unroll 1
    for (int half = 1; half >= 0; --half) {
      Pairs<kPer> x = load_planes<kLanes, kPer>(states, s_, p_);
      if (half == 1) {
#pragma unroll 4
        for (int j = 0; j < kHalf; ++j)
          keep_product(j, advance<kLanes>(m_, b_, token(j).x, kFull || j < left, x));
      }
      walk_half<kFull>(t, left, half * kHalf, x);
    }
  }

  // Eight lanes of the group hold (u, g) of every eighth token each.
  __device__ __forceinline__ void load_tokens(int t) {
    const std::int64_t column = p_.column(s_);
    __syncwarp();  // the group has read the chunk before
#pragma unroll
    for (int i = 0; i < kChunk / kBlock; ++i) {
      const int at = t + i * kBlock + p_.sub;
      const bool valid = p_.exists && at < p_.end;
      const float u = valid ? to_float(a_.u[column + at * s_.heads]) : 0.0F;
      const float g = valid ? to_float(a_.dy[column + at * s_.heads]) : 0.0F;
      if (p_.lane < kBlock) {
        tokens_[i * kBlock + p_.sub] = {u, g};
        dskip_ = fmaf(g, u, dskip_);
      }
    }
    __syncwarp();
  }
  [[nodiscard]] __device__ __forceinline__ float2 token(int j) const { return tokens_[j]; }

  // The half of a chunk that begins at its token `first`, which x enters. The products of the first
  // half are known from the walk to the second one.
  template <bool kFull>
  __device__ __forceinline__ void walk_half(int t, int left, int first, Pairs<kPer>& x) {
    if (first == 0) {
#pragma unroll 4
      for (int j = 0; j < kHalf; ++j) {
        keep(j, x);
        advance_by(m_, b_, token(j).x, products_[j], kFull || j < left, x);
      }
    } else {
#pragma unroll 4
      for (int j = 0; j < kHalf; ++j) {
        keep(j, x);
        keep_product(first + j,
                     advance<kLanes>(m_, b_, token(first + j).x, kFull || first + j < left, x));
      }
    }
    __syncwarp();  // the group reads the products
#pragma unroll 1
    for (int four = kHalf - 4; four >= 0; four -= 4) {
      float du[4];
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        const float2 own = token(first + four + j);
        du[j] = walk_token(four + j, products_[first + four + j], kFull || first + four + j < left,
                           own.x, 2.0F * own.y, x);
      }
      const float sum = transposed_sum_of_four<kLanes>(du, p_.lane);
      const int at = first + four + p_.lane % 4;
      if (p_.exists && p_.lane < 4 && t + at < p_.size_end)
        a_.du[p_.column(s_) + (t + at) * s_.heads] =
            from_float<T>(at < left ? fmaf(D_, token(at).y, sum) : 0.0F);
    }
  }

  // <k, x_{t-1}> of a token, which all lanes of the group know.
  __device__ __forceinline__ void keep_product(int j, float product) const {
    if (p_.lane == 0) products_[j] = product;
  }
  __device__ __forceinline__ void keep(int j, const Pairs<kPer>& x) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) history_[(j * kPer + i) * kThreads] = x.v[i];
  }

  // x is x_t on entry and x_{t-1} on return. Returns this lane's part of du. Past the last valid
  // token u and g are 0 and the states equal, but the adjoint must neither move nor be counted.
  __device__ __forceinline__ float walk_token(int j, float product, bool valid, float u, float g,
                                              Pairs<kPer>& x) {
    Pairs<kPer> before;
#pragma unroll
    for (int i = 0; i < kPer; ++i) before.v[i] = history_[(j * kPer + i) * kThreads];
    add_direct(C_, g, q_);
    const float back = adjoint_product<kLanes>(m_, q_);
    float du = 0.0F;
    if (valid) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const float2 q = q_.v[i];
        const float2 x0 = before.v[i];
        add_scaled(dC_.v[i], g, x.v[i].x, -x.v[i].y);
        de_.v[i].x = fmaf(q.x, x0.x, fmaf(q.y, x0.y, de_.v[i].x));
        de_.v[i].y = fmaf(q.y, x0.x, fmaf(-q.x, x0.y, de_.v[i].y));
        add_scaled(db_.v[i], u, q.x, q.y);
        add_scaled(dw_.v[i], -product, q.x, q.y);
        add_scaled(dk_.v[i], -back, x0.x, x0.y);
        du = fmaf(b_.v[i].x, q.x, fmaf(b_.v[i].y, q.y, du));
      }
      retreat(m_, back, q_);
    }
    x = before;
    return du;
  }
  __device__ __forceinline__ static void add_scaled(float2& sum, float factor, float re, float im) {
    sum.x = fmaf(factor, re, sum.x);
    sum.y = fmaf(factor, im, sum.y);
  }

  __device__ void store_sums() const {
    float* const row = a_.partial + p_.row * 5 * 2 * s_.plane;
    store_planes(row + kE * 2 * s_.plane, s_, p_, de_);
    store_planes(row + kB * 2 * s_.plane, s_, p_, db_);
    store_planes(row + kW * 2 * s_.plane, s_, p_, dw_);
    store_planes(row + kK * 2 * s_.plane, s_, p_, dk_);
    store_planes(row + kC * 2 * s_.plane, s_, p_, dC_);
    const float skip = group_sum<kLanes>(dskip_);
    if (a_.partial_skip != nullptr && p_.exists && p_.lane == 0)
      a_.partial_skip[p_.row * s_.heads + p_.head] = skip;
  }

  const BackwardArgs<T>& a_;
  const Sizes& s_;
  const Place<kLanes> p_;  // by value: fewer registers
  float2* history_;        // of this thread, [kHalf, kPer] at distance kThreads
  float* products_;        // of this group, [kChunk]: <k, x_{t-1}>
  float2* tokens_;         // of this group, (u, g) [kChunk]
  Transition<kPer> m_;
  Pairs<kPer> b_;
  Pairs<kPer> C_;
  float D_;
  Pairs<kPer> q_;
  Pairs<kPer> de_{};
  Pairs<kPer> db_{};
  Pairs<kPer> dw_{};
  Pairs<kPer> dk_{};
  Pairs<kPer> dC_{};
  float dskip_ = 0.0F;
};

// kTail: what follows the whole chunks.
template <class T, int kLanes, int kPer, bool kTail>
__global__ __launch_bounds__(kThreads, kLanes == 8
                                           ? 6
                                           : 4) void dplr_scan_backward_kernel(BackwardArgs<T> a) {
  __shared__ float2 history[kHalf * kPer * kThreads];
  __shared__ float2 tokens[kThreads / kLanes * kPitch];
  __shared__ float products[kThreads / kLanes * kPitch];
  Place<kLanes> p(a.sizes, a.lengths, {0, a.sizes.segments});
  if constexpr (kTail) p.skip_whole_chunks();
  WalkBack<T, kLanes, kPer>(a, p, history, tokens, products).run();
}

template <class T, bool kTail>
void launch_backward(Context& ctx, const BackwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  visit_width(s.states, [&](auto lanes, auto per) {
    dplr_scan_backward_kernel<T, lanes(), per(), kTail>
        <<<group_blocks(s, {0, s.segments}, lanes(), kThreads), kThreads, 0, ctx.stream().handle>>>(
            args);
  });
  LRNN_CUDA_CHECK_LAUNCH();
}

// Whether tokens follow the whole chunks of a sequence.
template <class T>
bool has_tail(const BackwardArgs<T>& args) {
  return args.lengths != nullptr || args.sizes.seqlen % kChunk != 0;
}

template <class T>
std::int64_t partial_rows(const BackwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  if (!s.by_chunks) return s.rows();
  return chunk_sum_rows(s) + (has_tail(args) ? s.batch : 0);
}

// What follows the whole chunks, token by token. Returns the adjoints that enter them, [B, 2, H,
// N]; writes the partial sums from row `row` on.
template <class T>
Tensor backward_tail(Context& ctx, BackwardArgs<T> args, std::int64_t row) {
  Sizes& s = args.sizes;
  Tensor adjoints = ctx.empty({s.batch, 2, s.heads, s.states}, DType::float32);
  args.dstate_in = adjoints.view().template data<float>();
  args.partial += row * s.fields * 2 * s.plane;
  if (args.partial_skip != nullptr) args.partial_skip += row * s.heads;
  s.segments = 1;
  s.segment_chunks = s.chunks;
  launch_backward<T, true>(ctx, args);
  return adjoints;
}

template <class T>
void backward_by_chunks(Context& ctx, const BackwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  const std::int64_t rows = chunk_sum_rows(s);
  Tensor tail;
  const float* start = args.dstate_out;
  if (has_tail(args)) {
    tail = backward_tail(ctx, args, rows);
    start = tail.view().data<float>();
  }
  Tensor u = by_head(ctx, s, args.lengths, args.u);
  Tensor dy = by_head(ctx, s, args.lengths, args.dy);
  Tensor du = empty_by_head<T>(ctx, s);
  Tensor adjoints = ctx.empty({s.batch, s.chunks, 2, s.heads, s.states}, DType::float32);
  const T* const tokens = dy.view().template data<T>();
  walk_chunks<T>(ctx,
                 {s, args.parameters, tokens, args.lengths, start, du.view().template data<T>(),
                  adjoints.view().data<float>(), args.dstate_in},
                 true);
  by_token(ctx, s, args.lengths, du, args.du);
  sum_chunks<T>(ctx, {s, args.parameters, args.lengths, u.view().template data<T>(), tokens,
                      args.chunk_states, adjoints.view().data<float>(), rows, args.partial,
                      args.partial_skip});
}

template <class T>
void backward(Context& ctx, BackwardArgs<T> args) {
  const Sizes& s = args.sizes;
  if (s.by_chunks) return backward_by_chunks(ctx, args);
  Tensor carries;
  if (s.segments > 1) {
    carries = connect_segments<T>(ctx, {s, args.parameters, args.dy, args.lengths, args.dstate_out},
                                  true);
    args.carries = carries.view().template data<float>();
  }
  launch_backward<T, false>(ctx, args);
}

// Scratch of one warp of the general kernel.
struct GeneralMemory {
  float2* states;   // [chunk + 1, N] of a chunk
  float2* adjoint;  // [N]
  float* products;  // [chunk, R] of a chunk

  static std::int64_t size(const Sizes& s) {
    return 2 * (kChunk + 2) * s.states + 2 * ((kChunk * s.rank + 1) / 2);
  }
  __device__ GeneralMemory(float* memory, const Sizes& s)
      : states(reinterpret_cast<float2*>(memory)),
        adjoint(states + (kChunk + 1) * s.states),
        products(memory + 2 * (kChunk + 2) * s.states) {}
};

template <class T>
class GeneralWalkBack {
 public:
  __device__ GeneralWalkBack(const BackwardArgs<T>& args, const GeneralPlace& place,
                             const GeneralMemory& memory, float* shared)
      : a_(args), s_(args.sizes), p_(place), x_(memory), back_(shared) {
    general_load(a_.dstate_out == nullptr ? nullptr : a_.dstate_out + p_.batch * 2 * s_.plane, s_,
                 p_, x_.adjoint);
    for (std::int64_t f = 0; f < s_.fields; ++f)
      for (std::int64_t n = p_.lane; n < s_.states; n += 32) add(f, n, 0.0F, 0.0F, true);
    if (a_.partial_skip != nullptr && p_.lane == 0)
      for (std::int64_t c = 0; c < s_.channels; ++c) *skip_of(c) = 0.0F;
  }

  __device__ void run() {
    const std::int64_t length = a_.lengths == nullptr ? s_.seqlen : a_.lengths[p_.batch];
    for (std::int64_t t = length + p_.lane; t < s_.seqlen; t += 32) *du(t) = from_float<T>(0.0F);
    for (std::int64_t chunk = (length - 1) / kChunk; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * kChunk;
      const int steps = static_cast<int>(min(length - begin, static_cast<std::int64_t>(kChunk)));
      general_load(a_.chunk_states + (p_.batch * s_.chunks + chunk) * 2 * s_.plane, s_, p_,
                   x_.states);
      for (int j = 0; j < steps; ++j)
        general_advance(a_.parameters, s_, p_, to_float(a_.u[place_of(begin + j)]),
                        x_.states + j * s_.states, x_.states + (j + 1) * s_.states,
                        x_.products + j * s_.rank);
      for (int j = steps - 1; j >= 0; --j) walk_token(begin + j, j);
    }
    if (a_.dstate_in != nullptr)
      general_store(a_.dstate_in + p_.batch * 2 * s_.plane, s_, p_, x_.adjoint);
  }

 private:
  [[nodiscard]] __device__ std::int64_t place_of(std::int64_t t) const {
    return (p_.batch * s_.seqlen + t) * s_.heads + p_.head;
  }
  [[nodiscard]] __device__ T* du(std::int64_t t) const { return a_.du + place_of(t); }
  [[nodiscard]] __device__ float* skip_of(std::int64_t c) const {
    return a_.partial_skip + (p_.batch * s_.channels + c) * s_.heads + p_.head;
  }
  // Every element belongs to one lane.
  __device__ void add(std::int64_t field, std::int64_t n, float re, float im,
                      bool first = false) const {
    float* const at =
        a_.partial + (p_.batch * s_.fields + field) * 2 * s_.plane + p_.head * s_.states + n;
    at[0] = first ? re : at[0] + re;
    at[s_.plane] = first ? im : at[s_.plane] + im;
  }

  __device__ void walk_token(std::int64_t t, int j) const {
    const float2* const before = x_.states + j * s_.states;
    const float2* const after = before + s_.states;
    const float u = to_float(a_.u[place_of(t)]);
    float direct = 0.0F;
    for (std::int64_t c = 0; c < s_.channels; ++c) {
      const float g =
          to_float(a_.dy[((p_.batch * s_.seqlen + t) * s_.channels + c) * s_.heads + p_.head]);
      if (a_.parameters.D != nullptr)
        direct = fmaf(a_.parameters.D[c * s_.heads + p_.head], g, direct);
      if (a_.partial_skip != nullptr && p_.lane == 0) *skip_of(c) += g * u;
      for (std::int64_t n = p_.lane; n < s_.states; n += 32) {
        const float2 C = general_read_out(a_.parameters, s_, p_, c, n);
        float2& q = x_.adjoint[n];
        q = {fmaf(2.0F * g, C.x, q.x), fmaf(-2.0F * g, C.y, q.y)};
        add(2 + 2 * s_.rank + c, n, 2.0F * g * after[n].x, -2.0F * g * after[n].y);
      }
    }
    float through = 0.0F;
    for (std::int64_t n = p_.lane; n < s_.states; n += 32) {
      const float2 q = x_.adjoint[n];
      const float2 x = before[n];
      const float2 b = general_pair(a_.parameters.b, s_, p_, 0, n);
      through = fmaf(b.x, q.x, fmaf(b.y, q.y, through));
      add(0, n, fmaf(q.x, x.x, q.y * x.y), fmaf(q.y, x.x, -q.x * x.y));
      add(1, n, u * q.x, u * q.y);
      for (std::int64_t r = 0; r < s_.rank; ++r) {
        const float product = x_.products[j * s_.rank + r];
        add(2 + r, n, -product * q.x, -product * q.y);
      }
    }
    through = general_sum(through);
    if (p_.lane == 0) *du(t) = from_float<T>(direct + through);
    general_products(a_.parameters.w, s_, p_, x_.adjoint, back_);
    for (std::int64_t n = p_.lane; n < s_.states; n += 32) retreat_state(n, before[n]);
  }
  __device__ void retreat_state(std::int64_t n, float2 before) const {
    const float2 q = x_.adjoint[n];
    const float2 e = general_pair(a_.parameters.e, s_, p_, 0, n);
    float re = fmaf(e.x, q.x, e.y * q.y);
    float im = fmaf(e.x, q.y, -e.y * q.x);
    for (std::int64_t r = 0; r < s_.rank; ++r) {
      const float2 k = general_pair(a_.parameters.k, s_, p_, r, n);
      re = fmaf(-k.x, back_[r], re);
      im = fmaf(-k.y, back_[r], im);
      add(2 + s_.rank + r, n, -back_[r] * before.x, -back_[r] * before.y);
    }
    x_.adjoint[n] = {q.x + re, q.y + im};
  }

  const BackwardArgs<T>& a_;
  const Sizes& s_;
  const GeneralPlace& p_;
  GeneralMemory x_;
  float* back_;  // [R]
};

template <class T>
__global__ __launch_bounds__(kGeneralThreads) void dplr_scan_backward_general_kernel(
    BackwardArgs<T> a, float* memory, std::int64_t size) {
  extern __shared__ float shared[];
  const GeneralPlace p(a.sizes);
  if (!p.exists) return;  // the whole warp
  GeneralWalkBack<T>(a, p, GeneralMemory(memory + p.index * size, a.sizes),
                     shared + threadIdx.x / 32 * a.sizes.rank)
      .run();
}

template <class T>
void backward_general(Context& ctx, const BackwardArgs<T>& args) {
  const Sizes& s = args.sizes;
  const std::int64_t size = GeneralMemory::size(s);
  Tensor memory = ctx.empty({s.batch, s.heads, size}, DType::float32);
  const auto shared = static_cast<std::size_t>(kGeneralWarps * s.rank) * sizeof(float);
  dplr_scan_backward_general_kernel<T>
      <<<general_blocks(s), kGeneralThreads, shared, ctx.stream().handle>>>(
          args, memory.view().data<float>(), size);
  LRNN_CUDA_CHECK_LAUNCH();
}

constexpr int kSumThreads = 512;

struct SumArgs {
  Sizes sizes;
  std::int64_t rows;
  const float* partial;
  float* de;
  float* db;
  float* dw;
  float* dk;
  float* dC;
};

// A block owns the elements of one plane, blockIdx.y, of the partial sums that kSumRows threads
// each leave room for; thread (column, row) sums rows row, row + kSumRows, ...
template <int kSumRows>
__global__ __launch_bounds__(kSumThreads) void dplr_scan_sum_kernel(SumArgs a) {
  constexpr int kSumColumns = kSumThreads / kSumRows;
  __shared__ double sums[kSumRows][kSumColumns];
  const Sizes& s = a.sizes;
  const int column = static_cast<int>(threadIdx.x) % kSumColumns;
  const int first = static_cast<int>(threadIdx.x) / kSumColumns;
  const std::int64_t offset = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + column;
  const auto plane = static_cast<std::int64_t>(blockIdx.y);
  const bool exists = offset < s.plane;
  double sum = 0.0;
  for (std::int64_t row = first; exists && row < a.rows; row += kSumRows)
    sum += static_cast<double>(a.partial[(row * 2 * s.fields + plane) * s.plane + offset]);
  sums[first][column] = sum;
  __syncthreads();
  if (first != 0 || !exists) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][column];
  const std::int64_t field = plane / 2;
  if (field >= 2 + 2 * s.rank) {
    if (a.dC == nullptr) return;
    const std::int64_t c = field - 2 - 2 * s.rank;
    a.dC[2 * (c * s.plane + offset) + plane % 2] += static_cast<float>(sum);
    return;
  }
  float* out = field == 0 ? a.de : field == 1 ? a.db : field < 2 + s.rank ? a.dw : a.dk;
  if (out == nullptr) return;
  const std::int64_t r = field < 2 ? 0 : (field - 2) % s.rank;
  out[(2 * r + plane % 2) * s.plane + offset] += static_cast<float>(sum);
}

template <int kSumRows>
void sum_rows(Context& ctx, const SumArgs& args) {
  constexpr int kSumColumns = kSumThreads / kSumRows;
  const dim3 blocks(static_cast<unsigned>((args.sizes.plane + kSumColumns - 1) / kSumColumns),
                    static_cast<unsigned>(2 * args.sizes.fields));
  dplr_scan_sum_kernel<kSumRows><<<blocks, kSumThreads, 0, ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace
}  // namespace dplr

void dplr_scan_backward(Context& ctx, const DplrScanBackward& a) {
  using namespace dplr;  // NOLINT(google-build-using-namespace)
  const Sizes s(detail::DplrScanSizes(a.w, a.C, a.u), can_sum_chunks(a.w.dim(3)));
  Tensor partial;
  Tensor partial_skip;
  std::int64_t rows = 0;
  visit_float("dplr_scan_backward", a.u.dtype(), [&]<class T>() {
    BackwardArgs<T> args{s,
                         parameters_of(a),
                         a.u.data<T>(),
                         data_or_null<const std::int32_t>(a.lengths),
                         a.dy.data<T>(),
                         a.chunk_states.data<float>(),
                         data_or_null<const float>(a.dstate_out),
                         nullptr,
                         a.du.data<T>(),
                         data_or_null<float>(a.dstate_in),
                         nullptr,
                         nullptr};
    rows = partial_rows(args);
    partial = ctx.empty({rows, s.fields, 2, s.heads, s.states}, DType::float32);
    args.partial = partial.view().data<float>();
    if (a.dD) {
      partial_skip = ctx.empty({rows, s.channels, s.heads}, DType::float32);
      args.partial_skip = partial_skip.view().data<float>();
    }
    if (s.in_registers())
      backward(ctx, args);
    else
      backward_general(ctx, args);
  });
  const SumArgs sums{s,
                     rows,
                     partial.view().data<float>(),
                     data_or_null<float>(a.de),
                     data_or_null<float>(a.db),
                     data_or_null<float>(a.dw),
                     data_or_null<float>(a.dk),
                     data_or_null<float>(a.dC)};
  if (rows < 8)
    sum_rows<1>(ctx, sums);
  else
    sum_rows<16>(ctx, sums);
  if (a.dD)
    fold_partials(ctx.stream().handle, partial_skip.view().data<float>(), static_cast<int>(rows),
                  s.channels * s.heads, a.dD.data<float>());
}

}  // namespace lrnn::cuda
