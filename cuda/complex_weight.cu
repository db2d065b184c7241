// One thread owns one complex element; bound by latency, the matrices are small.
#include "lrnn/ops/complex_weight.hpp"

#include "common/check.cuh"
#include "common/dtype.cuh"
#include "ops/dispatch.hpp"

namespace lrnn::cuda {
namespace {

constexpr int kThreads = 256;

// Where element i of the planes lies in the weight.
struct Layout {
  std::int64_t numel;
  std::int64_t cols;
  bool drive;
  std::int64_t re_stride;
  std::int64_t im_stride;

  __device__ std::int64_t re(std::int64_t i) const { return drive ? i : i + i / cols * cols; }
  __device__ std::int64_t im(std::int64_t i) const { return re(i) + (drive ? numel : cols); }
};

template <class T>
__global__ __launch_bounds__(kThreads) void complex_weight_forward_kernel(
    const float* __restrict__ re, const float* __restrict__ im, T* __restrict__ weight,
    Layout layout) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= layout.numel) return;
  const float imaginary = im[i * layout.im_stride];
  weight[layout.re(i)] = from_float<T>(re[i * layout.re_stride]);
  weight[layout.im(i)] = from_float<T>(layout.drive ? imaginary : -imaginary);
}

__global__ __launch_bounds__(kThreads) void complex_weight_backward_kernel(
    const float* __restrict__ dweight, float* __restrict__ dre, float* __restrict__ dim,
    Layout layout) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= layout.numel) return;
  const float imaginary = dweight[layout.im(i)];
  dre[i * layout.re_stride] += dweight[layout.re(i)];
  dim[i * layout.im_stride] += layout.drive ? imaginary : -imaginary;
}

Layout layout_of(ComplexProduct product, const TensorView& re, const TensorView& im) {
  const auto stride = [](const TensorView& t) {
    return t.rank() == 3 ? detail::row_stride(t) : std::int64_t{1};
  };
  return {re.numel(), re.dim(1), product == ComplexProduct::Drive, stride(re), stride(im)};
}

unsigned blocks_for(const Layout& layout) {
  return static_cast<unsigned>((layout.numel + kThreads - 1) / kThreads);
}

}  // namespace

void complex_weight_forward(Context& ctx, const ComplexWeightForward& args) {
  const Layout layout = layout_of(args.product, args.re, args.im);
  visit_float("complex_weight_forward", args.weight.dtype(), [&]<class T>() {
    complex_weight_forward_kernel<T><<<blocks_for(layout), kThreads, 0, ctx.stream().handle>>>(
        args.re.data<float>(), args.im.data<float>(), args.weight.data<T>(), layout);
    LRNN_CUDA_CHECK_LAUNCH();
  });
}

void complex_weight_backward(Context& ctx, const ComplexWeightBackward& args) {
  const Layout layout = layout_of(args.product, args.dre, args.dim);
  complex_weight_backward_kernel<<<blocks_for(layout), kThreads, 0, ctx.stream().handle>>>(
      args.dweight.data<float>(), args.dre.data<float>(), args.dim.data<float>(), layout);
  LRNN_CUDA_CHECK_LAUNCH();
}

}  // namespace lrnn::cuda
