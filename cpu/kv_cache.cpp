#include "lrnn/ops/kv_cache.hpp"

#include <algorithm>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

// Calls f(row of the chunk, row of the cache) for every valid token; f(row, -1) for padding.
template <class F>
void for_tokens(TensorView chunk, TensorView cache, TensorView positions, TensorView lengths,
                F&& f) {
  const std::int64_t seqlen = chunk.dim(1);
  const std::int64_t slots = cache.dim(1);
  for (std::int64_t b = 0; b < chunk.dim(0); ++b) {
    const std::int64_t length = lengths ? lengths.data<std::int32_t>()[b] : seqlen;
    for (std::int64_t t = 0; t < seqlen; ++t) {
      const std::int64_t slot = positions.data<std::int32_t>()[b] + t;
      f(b * seqlen + t, t < length && slot < slots ? b * slots + slot : -1);
    }
  }
}

}  // namespace

void kv_cache_append(Context&, const KvCacheAppend& a) {
  visit_float("kv_cache_append", a.src.dtype(), [&]<class T>() {
    const auto src = rows_of<T>(a.src);
    const auto cache = rows_of<T>(a.cache);
    for_tokens(a.src, a.cache, a.positions, a.lengths, [&](std::int64_t r, std::int64_t slot) {
      if (slot >= 0) std::copy_n(src[r], src.width, cache[slot]);
    });
  });
}

void kv_cache_read(Context&, const KvCacheRead& a) {
  visit_float("kv_cache_read", a.dst.dtype(), [&]<class T>() {
    const auto dst = rows_of<T>(a.dst);
    const auto cache = rows_of<T>(a.cache);
    for_tokens(a.dst, a.cache, a.positions, a.lengths, [&](std::int64_t r, std::int64_t slot) {
      for (std::int64_t c = 0; c < dst.width; ++c) {
        const T value = slot >= 0 ? cache[slot][c] : T(0);
        dst[r][c] = a.accumulate ? dst[r][c] + value : value;
      }
    });
  });
}

void advance_positions(Context&, const AdvancePositions& a) {
  std::int32_t* const positions = a.positions.data<std::int32_t>();
  for (std::int64_t b = 0; b < a.positions.numel(); ++b)
    positions[b] +=
        a.lengths ? a.lengths.data<std::int32_t>()[b] : static_cast<std::int32_t>(a.seqlen);
}

}  // namespace lrnn::cpu
