/// Hopper's attention kernels: when they apply, and the order of their items.
#pragma once

#include <algorithm>

#include "common/attention.cuh"

namespace lrnn::cuda::attention {

/// Whether the Hopper kernels take a problem: wide heads of rows that tensor copies can address.
inline bool fits_sm90(const Sizes& z) {
  return z.vectors && z.head_dim > 32 && z.head_dim <= 128 && z.slots > 0 &&
         compute_capability() == 90;
}

/// Query heads whose keys and values fill half of the L2 cache.
inline int heads_in_l2(const Sizes& z) {
  constexpr std::int64_t kBytes = 24 << 20;
  const std::int64_t per_head = std::int64_t{4} * z.slots * z.head_dim;
  const std::int64_t heads = std::max<std::int64_t>(1, kBytes / per_head) * z.group();
  return static_cast<int>(std::min<std::int64_t>(heads, std::int64_t{z.batch} * z.heads));
}

struct SectionItem {
  int tile, head, b;
};

/// The items of a resident block. Heads are taken by sections that share the L2 cache, in a section
/// the tiles with most work first: the last queries, the first keys. Rows of the grid alternate in
/// direction, so that blocks get equal sums of descending work.
class ItemWalk {
 public:
  __device__ __forceinline__ ItemWalk(int heads, int batch, int tiles, int section, bool last_first)
      : heads_(heads),
        pairs_(heads * batch),
        tiles_(tiles),
        section_(section),
        last_first_(last_first) {}
  __device__ __forceinline__ bool valid() const { return index() < pairs_ * tiles_; }
  __device__ __forceinline__ void next() { ++round_; }
  __device__ __forceinline__ SectionItem item() const {
    const int first = index() / (section_ * tiles_) * section_;
    const int within = index() - first * tiles_;
    const int size = min(section_, pairs_ - first);
    const int pair = first + within % size;
    const int order = within / size;
    return {last_first_ ? tiles_ - 1 - order : order, pair % heads_, pair / heads_};
  }

 private:
  __device__ __forceinline__ int index() const {
    const int grid = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    return round_ * grid + (round_ % 2 == 0 ? block : grid - 1 - block);
  }

  int heads_, pairs_, tiles_, section_;
  bool last_first_;
  int round_ = 0;
};

/// Queries whose statistics lie together.
constexpr int kStatRows = 64;

void forward_sm90(Context& ctx, const ForwardArgs<__nv_bfloat16>& args);
/// Needs no delta.
void backward_sm90(Context& ctx, const BackwardArgs<__nv_bfloat16>& args);

}  // namespace lrnn::cuda::attention
