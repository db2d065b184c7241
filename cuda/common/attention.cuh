/// What the attention kernels share: sizes, masks, tiles, and the choice of a kernel.
#pragma once

#include <climits>
#include <initializer_list>

#include "lrnn/ops/attention.hpp"

#include "common/capability.cuh"
#include "common/dtype.cuh"
#include "common/vec.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda::attention {

/// Largest head dimension of the CUDA backend; a row of a tile must fit in shared memory.
constexpr int kMaxHeadDim = 256;

/// Sizes and masks of one call.
struct Sizes {
  int batch, heads, heads_kv, head_dim;
  int seqlen, slots;  // queries, key rows
  const std::int32_t* lengths;
  const std::int32_t* positions;
  bool causal;
  bool vectors;  // every row of every operand may be walked in 16-byte steps
  float scale;

  __host__ __device__ int group() const { return heads / heads_kv; }
  __device__ int length(int b) const { return lengths != nullptr ? lengths[b] : seqlen; }
  __device__ int offset(int b) const { return positions != nullptr ? positions[b] : 0; }
};

/// The part of a call that concerns one sequence.
struct Sequence {
  int length;  // valid queries
  int offset;  // key index of query 0
  int keys;    // valid keys
  bool causal;

  __device__ Sequence(const Sizes& z, int b)
      : length(z.length(b)),
        offset(z.offset(b)),
        keys(min(z.slots, offset + length)),
        causal(z.causal) {}
  /// Number of leading keys that query i sees.
  __device__ int visible(int i) const { return causal ? min(keys, offset + i + 1) : keys; }
};

/// Which (tile, head, sequence) a block owns. Tiles of all sequences with the most work come first,
/// so that the last blocks to start are short.
struct Item {
  int tile, head, b;

  __device__ Item(int block, int heads, int batch, int tiles, bool last_first) {
    const int pairs = heads * batch;
    const int order = block / pairs;
    tile = last_first ? tiles - 1 - order : order;
    head = block % pairs % heads;
    b = block % pairs / heads;
  }
};

template <class T>
struct ForwardArgs {
  Sizes z;
  DeviceRows<const T> q, k, v;
  DeviceRows<T> o;
  float* lse;  // [B, Hq, L], may be null
};

template <class T>
struct BackwardArgs {
  Sizes z;
  DeviceRows<const T> q, k, v, o, d_o;
  const float* lse;    // [B, Hq, L]
  const float* delta;  // [B, Hq, L]
  DeviceRows<T> dq, dk, dv;
};

template <class T>
DeviceRows<const T> rows_of(TensorView t) {
  return {t.data<T>(), detail::row_stride(t)};
}
template <class T>
DeviceRows<T> rows_of(MutableTensorView t) {
  return {t.data<T>(), detail::row_stride(t)};
}

/// Columns of head `head` from row (b, 0) on.
template <class T>
__device__ __forceinline__ DeviceRows<T> head_of(const DeviceRows<T>& rows, int b, int seqlen,
                                                 int head, int head_dim) {
  return {
      rows.row(static_cast<std::int64_t>(b) * seqlen) + static_cast<std::int64_t>(head) * head_dim,
      rows.stride};
}

/// Sizes of a call whose operands in T are `operands`. @throws InvalidArgument
template <class T>
Sizes sizes_of(const char* op, const AttentionInputs& in,
               std::initializer_list<TensorView> operands) {
  const std::int64_t head_dim = in.q.dim(2) / in.num_heads;
  LRNN_CHECK(head_dim <= kMaxHeadDim, InvalidArgument, op, ": q: heads of at most ", kMaxHeadDim,
             " elements on CUDA, got ", head_dim);
  LRNN_CHECK(in.softmax_scale > 0, InvalidArgument, op,
             ": softmax_scale: expected a positive number, got ", in.softmax_scale);
  bool vectors = true;
  for (const TensorView& t : operands)
    vectors = vectors && allows_vectors(t.data<T>(), head_dim, detail::row_stride(t), kWide<T>);
  return {.batch = static_cast<int>(in.q.dim(0)),
          .heads = static_cast<int>(in.num_heads),
          .heads_kv = static_cast<int>(in.num_heads_kv),
          .head_dim = static_cast<int>(head_dim),
          .seqlen = static_cast<int>(in.q.dim(1)),
          .slots = static_cast<int>(in.k.dim(1)),
          .lengths = in.lengths ? in.lengths.data<std::int32_t>() : nullptr,
          .positions = in.positions ? in.positions.data<std::int32_t>() : nullptr,
          .causal = in.causal,
          .vectors = vectors,
          .scale = static_cast<float>(in.softmax_scale)};
}

inline int tiles_of(std::int64_t rows, int per_tile) {
  return static_cast<int>((rows + per_tile - 1) / per_tile);
}

/// Launches `kernel` with one block per item and `shared` bytes of dynamic shared memory.
template <class Args>
void launch(Context& ctx, void (*kernel)(Args), std::int64_t blocks, int threads,
            std::size_t shared, const Args& args) {
  LRNN_CHECK(blocks <= INT_MAX, InvalidArgument, "attention: too many tiles: ", blocks);
  if (shared > 48 * 1024)
    LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared,
           ctx.stream().handle>>>(args);
  LRNN_CUDA_CHECK_LAUNCH();
}

/// Plain float32 arithmetic: float32 operands, and bfloat16 where there are no tensor cores for it.
template <class T>
void forward_fma(Context& ctx, const ForwardArgs<T>& args);
template <class T>
void backward_fma(Context& ctx, const BackwardArgs<T>& args);
/// One query per sequence against a cache.
template <class T>
void forward_decode(Context& ctx, const ForwardArgs<T>& args);

}  // namespace lrnn::cuda::attention
