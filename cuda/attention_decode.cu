// Attention of one query per sequence against a KV cache.
//
// The keys of a head are cut into splits of kSplit; a block owns one split of one head of one
// sequence and leaves the maximum, the sum and the weighted values of its part. A second kernel
// joins the splits in order. Their number depends on the size of the cache alone, so the same bits
// come out at every position. Bound by HBM: the keys and values in use are read once per head.
#include "common/attention.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace lrnn::cuda::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kSplit = 256;
constexpr int kLanes = 8;  // of a key
constexpr float kLog2e = 1.44269504088896340736F;
constexpr float kLn2 = 0.69314718055994530942F;

template <class T>
struct DecodeArgs {
  ForwardArgs<T> in;
  int splits;
  float2* parts;   // [B, Hq, splits]: maximum in units of log2, sum
  float* outputs;  // [B, Hq, splits, d]
};

__device__ __forceinline__ float block_max(float v, float* slots) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFU, v, offset));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  float top = slots[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; ++w) top = fmaxf(top, slots[w]);
  return top;
}

/// <q, key> of this lane: every kLanes-th group of elements.
template <class T>
__device__ __forceinline__ float partial_dot(const float* q, const T* key, int lane, int dim,
                                             bool vectors) {
  constexpr int N = kWide<T>;
  float sum = 0.0F;
  if (vectors) {
    for (int c = lane * N; c < dim; c += kLanes * N) {
      float x[N];
      load_vec<T, N>(key + c, x);
#pragma unroll
      for (int e = 0; e < N; ++e) sum = fmaf(q[c + e], x[e], sum);
    }
  } else {
    for (int c = lane; c < dim; c += kLanes) sum = fmaf(q[c], to_float(key[c]), sum);
  }
  return sum;
}

template <class T>
__global__ __launch_bounds__(kThreads) void attention_decode_kernel(DecodeArgs<T> a) {
  __shared__ float q[kMaxHeadDim];
  __shared__ float scores[kSplit];
  __shared__ float sums[kThreads / 32][kMaxHeadDim];
  __shared__ float slots[2][32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Sizes& z = a.in.z;
  const int split = static_cast<int>(blockIdx.x) % a.splits;
  const int head = static_cast<int>(blockIdx.x) / a.splits % z.heads;
  const int b = static_cast<int>(blockIdx.x) / a.splits / z.heads;
  const Sequence seq(z, b);
  const int dim = z.head_dim;
  const int begin = split * kSplit;
  const int visible = seq.length > 0 ? seq.visible(0) : 0;
  const int count = min(kSplit, visible - begin);
  const std::int64_t part = (static_cast<std::int64_t>(b) * z.heads + head) * a.splits + split;
  if (count <= 0) {
    if (threadIdx.x == 0) a.parts[part] = {-INFINITY, 0.0F};
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const auto query = head_of(a.in.q, b, 1, head, dim);
  const auto k = head_of(a.in.k, b, z.slots, head / z.group(), dim);
  const auto v = head_of(a.in.v, b, z.slots, head / z.group(), dim);
  for (int c = thread; c < dim; c += kThreads) q[c] = to_float(query.row(0)[c]) * z.scale * kLog2e;
  __syncthreads();
  float top = -INFINITY;
  for (int j0 = 0; j0 < count; j0 += kThreads / kLanes) {
    const int j = j0 + thread / kLanes;
    float score = 0.0F;
    if (j < count) score = partial_dot(q, k.row(begin + j), thread % kLanes, dim, z.vectors);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      score += __shfl_xor_sync(0xFFFFFFFFU, score, offset);
    if (j >= count) continue;
    top = fmaxf(top, score);
    if (thread % kLanes == 0) scores[j] = score;
  }
  top = block_max(top, slots[0]);  // its barrier publishes the scores
  float total = 0.0F;
  for (int j = thread; j < count; j += kThreads) {
    scores[j] = exp2f(scores[j] - top);
    total += scores[j];
  }
  total = block_sum(total, slots[1]);  // its barrier publishes the weights
  // A warp takes every fourth key, a lane every 32nd column.
  const int warp = thread / 32;
  for (int c = thread % 32; c < dim; c += 32) {
    float sum = 0.0F;
#pragma unroll 4
    for (int j = warp; j < count; j += kThreads / 32)
      sum = fmaf(scores[j], to_float(v.row(begin + j)[c]), sum);
    sums[warp][c] = sum;
  }
  __syncthreads();
  for (int c = thread; c < dim; c += kThreads) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += sums[w][c];
    a.outputs[part * dim + c] = sum;
  }
  if (thread == 0) a.parts[part] = {top, total};
}

// A warp owns one head of one sequence.
template <class T>
__global__ __launch_bounds__(kThreads) void attention_join_kernel(DecodeArgs<T> a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Sizes& z = a.in.z;
  const int item = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / 32);
  if (item >= z.batch * z.heads) return;
  const int head = item % z.heads;
  const int b = item / z.heads;
  const std::int64_t part = static_cast<std::int64_t>(item) * a.splits;
  float top = -INFINITY;
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, a.parts[part + s].x);
  float total = 0.0F;
  for (int s = 0; s < a.splits; ++s) {
    const float2 p = a.parts[part + s];
    if (p.y > 0.0F) total = fmaf(p.y, exp2f(p.x - top), total);
  }
  const bool any = total > 0.0F;  // an empty sequence has none
  const auto o = head_of(a.in.o, b, 1, head, z.head_dim);
  for (int c = static_cast<int>(threadIdx.x) % 32; c < z.head_dim; c += 32) {
    float sum = 0.0F;
    for (int s = 0; s < a.splits; ++s) {
      const float2 p = a.parts[part + s];
      if (p.y > 0.0F) sum = fmaf(a.outputs[(part + s) * z.head_dim + c], exp2f(p.x - top), sum);
    }
    o.row(0)[c] = from_float<T>(any ? sum / total : 0.0F);
  }
  if (a.in.lse != nullptr && threadIdx.x % 32 == 0)
    a.in.lse[item] = any ? (top + log2f(total)) * kLn2 : 0.0F;
}

}  // namespace

template <class T>
void forward_decode(Context& ctx, const ForwardArgs<T>& args) {
  const Sizes& z = args.z;
  const int splits = tiles_of(z.slots, kSplit);
  const std::int64_t heads = std::int64_t{z.batch} * z.heads;
  Tensor parts = ctx.empty({heads, splits, 2}, DType::float32);
  Tensor outputs = ctx.empty({heads, splits, z.head_dim}, DType::float32);
  const DecodeArgs<T> a{args, splits,
                        reinterpret_cast<float2*>(parts.view().template data<float>()),
                        outputs.view().template data<float>()};
  const cudaStream_t stream = ctx.stream().handle;
  launch_overlapped(attention_decode_kernel<T>, static_cast<unsigned>(heads * splits), kThreads, 0,
                    stream, a);
  launch_overlapped(attention_join_kernel<T>,
                    static_cast<unsigned>((heads * 32 + kThreads - 1) / kThreads), kThreads, 0,
                    stream, a);
}

template void forward_decode(Context&, const ForwardArgs<float>&);
template void forward_decode(Context&, const ForwardArgs<__nv_bfloat16>&);

}  // namespace lrnn::cuda::attention
