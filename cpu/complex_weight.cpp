#include "lrnn/ops/complex_weight.hpp"

#include "common/eigen.hpp"
#include "ops/dispatch.hpp"

namespace lrnn::cpu {
namespace {

std::int64_t element_stride(const TensorView& plane) {
  return plane.rank() == 3 ? detail::row_stride(plane) : 1;
}

// Calls f(index in the planes, index of Re, index of Im in the weight).
template <class F>
void for_each_element(ComplexProduct product, const TensorView& plane, F&& f) {
  const std::int64_t rows = plane.dim(0);
  const std::int64_t cols = plane.dim(1);
  const bool drive = product == ComplexProduct::Drive;
#pragma omp parallel for
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::int64_t re = (drive ? r : 2 * r) * cols + c;
      f(r * cols + c, re, re + (drive ? rows * cols : cols));
    }
}

}  // namespace

void complex_weight_forward(Context&, const ComplexWeightForward& args) {
  visit_float("complex_weight_forward", args.weight.dtype(), [&]<class T>() {
    const T* const re = args.re.data<T>();
    const T* const im = args.im.data<T>();
    T* const weight = args.weight.data<T>();
    const std::int64_t re_stride = element_stride(args.re);
    const std::int64_t im_stride = element_stride(args.im);
    const T sign = args.product == ComplexProduct::Drive ? T(1) : T(-1);
    for_each_element(args.product, args.re,
                     [&](std::int64_t i, std::int64_t at_re, std::int64_t at_im) {
                       weight[at_re] = re[i * re_stride];
                       weight[at_im] = sign * im[i * im_stride];
                     });
  });
}

void complex_weight_backward(Context&, const ComplexWeightBackward& args) {
  visit_float("complex_weight_backward", args.dweight.dtype(), [&]<class T>() {
    const T* const dweight = args.dweight.data<T>();
    T* const dre = args.dre.data<T>();
    T* const dim = args.dim.data<T>();
    const std::int64_t re_stride = element_stride(args.dre);
    const std::int64_t im_stride = element_stride(args.dim);
    const T sign = args.product == ComplexProduct::Drive ? T(1) : T(-1);
    for_each_element(args.product, args.dre,
                     [&](std::int64_t i, std::int64_t at_re, std::int64_t at_im) {
                       dre[i * re_stride] += dweight[at_re];
                       dim[i * im_stride] += sign * dweight[at_im];
                     });
  });
}

}  // namespace lrnn::cpu
