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

/// Heads of a section, of `heads` in all: as many as have their streamed operands, `bytes` of each,
/// in two thirds of the L2 cache; sections of about one size.
inline int heads_of_section(std::int64_t heads, std::int64_t bytes) {
  constexpr std::int64_t kBytes = 34 << 20;
  const std::int64_t most = std::max<std::int64_t>(1, kBytes / std::max<std::int64_t>(1, bytes));
  const std::int64_t sections = (heads + most - 1) / most;
  return static_cast<int>((heads + sections - 1) / sections);
}

struct SectionItem {
  int tile, head, b;
};

/// The items of a resident block. Heads are taken by sections that share the L2 cache, in a section
/// the tiles by their work, which causal tiles have more of the later their queries, the earlier
/// their keys: in the last section the most first, and in every other one in the opposite order of
/// the next, so that work never jumps. Rows of the grid alternate in direction, so that blocks get
/// equal sums: the fullest has 0.1 % more than the mean at 8192 positions of 32 heads, where
/// sections that all begin with the most leave 20 %.
class ItemWalk {
 public:
  __device__ __forceinline__ ItemWalk(int heads, int batch, int tiles, int section, bool last_first)
      : heads_(heads),
        pairs_(heads * batch),
        tiles_(tiles),
        section_(section),
        last_section_((pairs_ - 1) / section),
        last_first_(last_first) {}
  __device__ __forceinline__ bool valid() const { return index() < pairs_ * tiles_; }
  __device__ __forceinline__ void next() { ++round_; }
  __device__ __forceinline__ SectionItem item() const {
    const int section = index() / (section_ * tiles_);
    const int first = section * section_;
    const int within = index() - first * tiles_;
    const int size = min(section_, pairs_ - first);
    const int pair = first + within % size;
    const int order = within / size;
    const bool reversed = last_first_ == ((last_section_ - section) % 2 == 0);
    return {reversed ? tiles_ - 1 - order : order, pair % heads_, pair / heads_};
  }

 private:
  __device__ __forceinline__ int index() const {
    const int grid = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    return round_ * grid + (round_ % 2 == 0 ? block : grid - 1 - block);
  }

  int heads_, pairs_, tiles_, section_, last_section_;
  bool last_first_;
  int round_ = 0;
};

/// Queries whose statistics lie together.
constexpr int kStatRows = 64;

void forward_sm90(Context& ctx, const ForwardArgs<__nv_bfloat16>& args);
/// Needs no delta.
void backward_sm90(Context& ctx, const BackwardArgs<__nv_bfloat16>& args);

}  // namespace lrnn::cuda::attention
