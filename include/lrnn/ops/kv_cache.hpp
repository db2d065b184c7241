/// Rows of a key/value cache, addressed by the position of each sequence in device memory.
///
/// A cache is [B, S, C]; positions[b] counts the rows of sequence b that hold something. Rows
/// beyond S are neither read nor written: keeping positions + L <= S is the caller's duty.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

/// cache[b, positions[b] + t] = src[b, t] for t < lengths[b].
struct KvCacheAppend {
  TensorView src;           ///< [B, L, C], rows may be column slices
  TensorView positions;     ///< [B] int32
  TensorView lengths = {};  ///< [B] int32
  MutableTensorView cache;  ///< [B, S, C], dtype of src
};

/// dst[b, t] = (or +=) cache[b, positions[b] + t] for t < lengths[b]; 0 (or unchanged) elsewhere.
struct KvCacheRead {
  TensorView cache;         ///< [B, S, C]
  TensorView positions;     ///< [B] int32
  TensorView lengths = {};  ///< [B] int32
  MutableTensorView dst;    ///< [B, L, C], rows may be column slices; dtype of cache
  bool accumulate = false;
};

/// positions[b] += lengths[b], or += seqlen without lengths.
struct AdvancePositions {
  MutableTensorView positions;  ///< [B] int32
  TensorView lengths = {};      ///< [B] int32
  std::int64_t seqlen;
};

/// @throws ShapeError, DTypeError, DeviceError
void kv_cache_append(Context& ctx, const KvCacheAppend& args);
void kv_cache_read(Context& ctx, const KvCacheRead& args);
void advance_positions(Context& ctx, const AdvancePositions& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void kv_cache_append(Context& ctx, const KvCacheAppend& args);
void kv_cache_read(Context& ctx, const KvCacheRead& args);
void advance_positions(Context& ctx, const AdvancePositions& args);
}  // namespace cpu
namespace cuda {
void kv_cache_append(Context& ctx, const KvCacheAppend& args);
void kv_cache_read(Context& ctx, const KvCacheRead& args);
void advance_positions(Context& ctx, const AdvancePositions& args);
}  // namespace cuda

}  // namespace lrnn
