// The maps of a chunk: common/dplr_scan_chunk.cuh.
//
// One block owns one head. Its first three warps follow one vector each through the Q powers of
// the transition, lane n its state n, in double; then all threads add up R. Bound by latency and
// double-precision FMA.
#include "common/check.cuh"
#include "common/dplr_ahead.cuh"
#include "common/dplr_scan_chunk.cuh"

namespace lrnn::cuda::dplr {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;

__device__ double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}
__device__ Wide conjugate(Wide v) {
  return {v.x, -v.y};
}
__device__ Wide minus_scaled(Wide v, double factor, Wide w) {
  return {v.x - factor * w.x, v.y - factor * w.y};
}
// Re conj(p) q, over the warp.
__device__ double real_product(Wide p, Wide q) {
  return warp_sum(p.x * q.x + p.y * q.y);
}

/// State of one head, 0 past the last.
struct WideState {
  Wide d{0.0, 0.0};
  Wide e{0.0, 0.0};
  Wide w{0.0, 0.0};
  Wide k{0.0, 0.0};
  Wide b{0.0, 0.0};
  Wide C{0.0, 0.0};

  __device__ WideState(const Parameters& a, const Sizes& s, std::int64_t head, int n) {
    if (n >= s.states) return;
    const std::int64_t at = head * s.states + n;
    const auto plane = [&](const float* p) { return wide({p[at], p[s.plane + at]}); };
    e = plane(a.e);
    if (a.e_low != nullptr) {
      const Wide low = plane(a.e_low);
      e = {e.x + low.x, e.y + low.y};
    }
    d = {1.0 + e.x, e.y};
    w = plane(a.w);
    k = plane(a.k);
    b = plane(a.b);
    C = wide({a.C[2 * at], a.C[2 * at + 1]});
  }
};

// One element of each real row or column of R.
template <int kStates>
struct Factors {
  double left[kChunk][2 * kStates];   // d^(Q-1-j) w
  double right[kChunk][2 * kStates];  // <k, M^j .>
  float taps[kChunk];                 // T_j0
};

template <int kStates>
struct Head {
  static constexpr int kRows = kMapRows<kStates>;
  static constexpr int kPitch = kRows + 1;  // columns in different banks

  const WideState& state;
  Factors<kStates>& factors;
  float* maps;
  int n;
  bool transposed;

  static __device__ int place(int row, int column, bool transposed) {
    return transposed ? column * kPitch + row : row * kPitch + column;
  }
  static __device__ int row_of(int n, int part) {
    return kChunk + n / kTileStates * 16 + part * kTileStates + n % kTileStates;
  }
  __device__ void write_row(int row, Wide v) const {
    if (n >= kStates) return;
    maps[place(row, row_of(n, 0), transposed)] = static_cast<float>(v.x);
    maps[place(row, row_of(n, 1), transposed)] = static_cast<float>(v.y);
  }
  __device__ void write_column(int column, Wide v) const {
    if (n >= kStates) return;
    maps[place(row_of(n, 0), column, transposed)] = static_cast<float>(v.x);
    maps[place(row_of(n, 1), column, transposed)] = static_cast<float>(v.y);
  }
  __device__ void write_factor(double (&row)[2 * kStates], Wide v) const {
    if (n >= kStates) return;
    row[n] = v.x;
    row[kStates + n] = v.y;
  }
  // p such that Re conj(p') x = Re conj(p) M x.
  __device__ Wide through_transition(Wide p) const {
    const double product = 2.0 * real_product(p, state.w);
    return minus_scaled(conjugate(state.d) * p, product, state.k);
  }

  // <k, M^j .> and d^(Q-1-j) w.
  __device__ void follow_product() const {
    Wide p{2.0 * state.k.x, 2.0 * state.k.y};
    Wide w = state.w;
    for (int j = 0; j < kChunk; ++j) {
      write_factor(factors.right[j], p);
      write_factor(factors.left[kChunk - 1 - j], w);
      p = through_transition(p);
      w = state.d * w;
    }
  }
  // G and the taps of T.
  __device__ void follow_read_out(float D) const {
    Wide p{2.0 * state.C.x, -2.0 * state.C.y};
    for (int j = 0; j < kChunk; ++j) {
      const double tap = real_product(p, state.b);
      if (n == 0) factors.taps[j] = static_cast<float>(tap) + (j == 0 ? D : 0.0F);
      p = through_transition(p);
      write_row(j, p);
    }
  }
  // E.
  __device__ void follow_drive() const {
    Wide x = state.b;
    for (int i = kChunk - 1; i >= 0; --i) {
      write_column(i, x);
      x = minus_scaled(state.d * x, 2.0 * real_product(state.k, x), state.w);
    }
  }
  // d^Q - 1 by squaring of 1 + e, whose products are not rounded to the size of 1.
  __device__ void write_diagonal(float4* diagonal) const {
    if (n >= kStates) return;
    Wide power = state.e;
    for (int i = 1; i < kChunk; i *= 2) {
      const Wide square = power * power;
      power = {2.0 * power.x + square.x, 2.0 * power.y + square.y};
    }
    const float2 high = narrow(power);
    const Wide rounded = wide(high);
    const float2 low = narrow({power.x - rounded.x, power.y - rounded.y});
    const float sign = transposed ? -1.0F : 1.0F;
    diagonal[n] = {high.x, sign * high.y, low.x, sign * low.y};
  }
};

template <int kStates>
__global__ __launch_bounds__(kThreads) void dplr_chunk_table_kernel(Sizes s, Parameters parameters,
                                                                    bool transposed,
                                                                    ChunkTable table) {
  constexpr int kRows = kMapRows<kStates>;
  constexpr int kSize = 2 * kStates;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& factors = *reinterpret_cast<Factors<kStates>*>(memory);
  auto* const maps = reinterpret_cast<float*>(memory + sizeof(Factors<kStates>));
  const std::int64_t head = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kLanes;
  if (warp < 4) {
    const int n = thread % kLanes;
    const WideState state(parameters, s, head, n);
    const Head<kStates> h{state, factors, maps, n, transposed};
    if (warp == 0) h.follow_product();
    if (warp == 1) h.follow_read_out(parameters.D == nullptr ? 0.0F : parameters.D[head]);
    if (warp == 2) h.follow_drive();
    if (warp == 3) h.write_diagonal(table.diagonal + head * kStates);
  }
  __syncthreads();
  for (int i = thread; i < kChunk * kChunk; i += kThreads) {
    const int row = i / kChunk;
    const int column = i % kChunk;
    maps[Head<kStates>::place(row, column, transposed)] =
        row < column ? 0.0F : factors.taps[row - column];
  }
  constexpr int kSide = 4;  // of the elements of R that a thread adds up at once
  for (int i = thread; i < kSize * kSize / (kSide * kSide); i += kThreads) {
    const int row = i / (kSize / kSide);
    const int column = i % (kSize / kSide);
    double sum[kSide][kSide] = {};
    for (int j = 0; j < kChunk; ++j)
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c)
          sum[r][c] -= factors.left[j][row + r * (kSize / kSide)] *
                       factors.right[j][column + c * (kSize / kSide)];
#pragma unroll
    for (int r = 0; r < kSide; ++r)
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        const int y = row + r * (kSize / kSide);
        const int x = column + c * (kSize / kSide);
        maps[Head<kStates>::place(Head<kStates>::row_of(y % kStates, y / kStates),
                                  Head<kStates>::row_of(x % kStates, x / kStates), transposed)] =
            static_cast<float>(sum[r][c]);
      }
  }
  __syncthreads();
  float* const out = table.maps + head * kRows * kRows;
  for (int i = thread; i < kRows * kRows; i += kThreads)
    out[i] = maps[i / kRows * Head<kStates>::kPitch + i % kRows];
}

// One block owns one head: its first warp the map to s, the second that to r, lane n the state n.
// The vectors of both are powers of the transition on k and w.
template <int kStates>
__global__ __launch_bounds__(2 * kLanes) void dplr_product_maps_kernel(Sizes s,
                                                                       Parameters parameters,
                                                                       float* maps) {
  constexpr int kColumnCount = kChunk + 2 * kStates;
  __shared__ float taps[2][kChunk];
  const std::int64_t head = blockIdx.x;
  const int n = static_cast<int>(threadIdx.x) % kLanes;
  const int which = static_cast<int>(threadIdx.x) / kLanes;
  const WideState state(parameters, s, head, n);
  float* const map = maps + (head * 2 + which) * kChunk * kColumnCount;
  const auto write = [&](int row, Wide v) {
    if (n >= kStates) return;
    map[row * kColumnCount + kChunk + n] = static_cast<float>(v.x);
    map[row * kColumnCount + kChunk + kStates + n] = static_cast<float>(v.y);
  };
  const auto keep = [&](int lag, double tap) {
    if (n == 0) taps[which][lag] = static_cast<float>(tap);
  };
  if (which == 0) {
    Wide p{2.0 * state.k.x, 2.0 * state.k.y};
    for (int j = 0; j < kChunk; ++j) {
      write(j, p);
      keep(j, real_product(p, state.b));
      p = minus_scaled(conjugate(state.d) * p, 2.0 * real_product(p, state.w), state.k);
    }
  } else {
    const Wide c{2.0 * state.C.x, -2.0 * state.C.y};
    Wide w = state.w;
    for (int j = 0; j < kChunk; ++j) {
      write(kChunk - 1 - j, {2.0 * w.x, 2.0 * w.y});
      keep(j, 2.0 * real_product(w, c));
      w = minus_scaled(state.d * w, 2.0 * real_product(state.k, w), state.w);
    }
  }
  __syncwarp();
  // s_j of earlier tokens, r_j of the own and later ones.
  for (int row = 0; row < kChunk; ++row) {
    const int lag = which == 0 ? row - 1 - n : n - row;
    map[row * kColumnCount + n] = lag < 0 ? 0.0F : taps[which][lag];
  }
}

// c += a b of tiles 8 x 4 and 4 x 8 in double: lane 4 i + j holds element (i, j) of a, (j, i) of b
// and (i, 2 j), (i, 2 j + 1) of c.
__device__ __forceinline__ void multiply_add_wide(double (&c)[2], double a, double b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
#endif
}

// Of every head, (M^Q)^(2^squarings), transposed, of (Re x, Im x): [H, 2 N, 2 N]. One block squares
// the matrix of a head in shared memory, in double: rounding would double with every squaring. A
// warp owns eight rows of the product, and all or a part of its columns. Bound by tensor cores.
template <int kStates>
__global__ __launch_bounds__(kThreads) void dplr_chunk_power_kernel(Sizes s, ChunkTable table,
                                                                    int squarings, float* out) {
  constexpr int kSize = 2 * kStates;
  constexpr int kPitch = kSize + 4;
  constexpr int kSide = kSize / 8;
  constexpr int kColumnTiles =
      kSide * kSide * kLanes / kThreads == 0 ? 1 : kSide * kSide * kLanes / kThreads;
  __shared__ double matrix[kSize * kPitch];
  const std::int64_t head = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes;
  const int row = thread / kLanes % kSide * 8;
  const int column = thread / kLanes / kSide * kColumnTiles * 8;
  const float* const maps = table.maps + head * kMapRows<kStates> * kMapRows<kStates>;
  for (int i = thread; i < kSize * kSize; i += kThreads) {
    const int y = i / kSize;
    const int x = i % kSize;
    const int n = y % kStates;
    const auto place = [](int j) { return Head<kStates>::row_of(j % kStates, j / kStates); };
    double v = static_cast<double>(maps[place(y) * kMapRows<kStates> + place(x)]);
    if (n == x % kStates) {
      const float4 d = table.diagonal[head * kStates + n];
      if (y == x)
        v += 1.0 + static_cast<double>(d.x) + static_cast<double>(d.z);
      else
        v += (y < x ? -1.0 : 1.0) * (static_cast<double>(d.y) + static_cast<double>(d.w));
    }
    matrix[y * kPitch + x] = v;
  }
  for (int step = 0; step < squarings; ++step) {
    double sum[kColumnTiles][2] = {};
    __syncthreads();
    if (column < kSize) {
      for (int k = 0; k < kSize; k += 4) {
        const double a = matrix[(row + lane / 4) * kPitch + k + lane % 4];
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c)
          multiply_add_wide(sum[c], a, matrix[(k + lane % 4) * kPitch + column + c * 8 + lane / 4]);
      }
    }
    __syncthreads();
    if (column >= kSize) continue;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        matrix[(row + lane / 4) * kPitch + column + c * 8 + lane % 4 * 2 + i] = sum[c][i];
  }
  __syncthreads();
  const int states = static_cast<int>(s.states);
  const int size = 2 * states;
  const auto place = [&](int j) { return j % states + j / states * kStates; };
  for (int i = thread; i < size * size; i += kThreads)
    out[head * size * size + i] =
        static_cast<float>(matrix[place(i % size) * kPitch + place(i / size)]);
}

}  // namespace

Tensor make_segment_powers(Context& ctx, const Sizes& s, const ChunkTable& table) {
  Tensor powers = ctx.empty({s.heads, 2 * s.states, 2 * s.states}, DType::float32);
  int squarings = 0;
  while ((std::int64_t{1} << squarings) < s.segment_chunks) ++squarings;
  visit_padded_states(s.states, [&](auto states) {
    dplr_chunk_power_kernel<states()>
        <<<static_cast<unsigned>(s.heads), kThreads, 0, ctx.stream().handle>>>(
            s, table, squarings, powers.view().data<float>());
  });
  LRNN_CUDA_CHECK_LAUNCH();
  return powers;
}

Tensor make_product_maps(Context& ctx, const Sizes& s, const Parameters& parameters) {
  Tensor maps;
  visit_padded_states(s.states, [&](auto states) {
    maps = ctx.empty({s.heads, 2 * kChunk, kChunk + 2 * states()}, DType::float32);
    dplr_product_maps_kernel<states()>
        <<<static_cast<unsigned>(s.heads), 2 * kLanes, 0, ctx.stream().handle>>>(
            s, parameters, maps.view().data<float>());
  });
  LRNN_CUDA_CHECK_LAUNCH();
  return maps;
}

ChunkMemory make_chunk_table(Context& ctx, const Sizes& s, const Parameters& parameters,
                             bool reverse) {
  ChunkMemory memory;
  visit_padded_states(s.states, [&](auto states) {
    memory.maps = ctx.empty({s.heads, kMapRows<states()>, kMapRows<states()>}, DType::float32);
    memory.diagonal = ctx.empty({s.heads, states(), 4}, DType::float32);
    constexpr auto kBytes = static_cast<int>(sizeof(Factors<states()>) +
                                             kMapRows<states()> * Head<states()>::kPitch * 4);
    const auto kernel = dplr_chunk_table_kernel<states()>;
    LRNN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    kernel<<<static_cast<unsigned>(s.heads), kThreads, kBytes, ctx.stream().handle>>>(
        s, parameters, reverse, memory.table());
  });
  LRNN_CUDA_CHECK_LAUNCH();
  return memory;
}

}  // namespace lrnn::cuda::dplr
