/// S7's contractions on Hopper: products with H N x H weights whose result is summed where it is
/// formed, so that nothing of H N numbers per token reaches memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "lrnn/core/context.hpp"

#include "ops/s7_scan.hpp"

namespace lrnn::cuda::s7 {

/// Blocks of rows of x_proj's weight, each row of H numbers.
template <class T>
struct Weights {
  const T* A;     // [N]
  const T* B;     // [H, N]
  const T* C;     // [H, N]
  const T* D;     // [H]
  const T* bias;  // [N]
};
template <class T>
struct Problem {
  std::int64_t tokens, seqlen;
  int dim, dstate;
  Weights<T> weights;
  const std::int32_t* lengths;
};

template <class T>
Problem<T> problem_of(TensorView x, TensorView weight, std::int64_t dstate,
                      const std::int32_t* lengths) {
  const detail::S7Rows rows{x.dim(2), dstate};
  const T* const D = rows.D_bias(weight).template data<T>();
  return {.tokens = x.dim(0) * x.dim(1),
          .seqlen = x.dim(1),
          .dim = static_cast<int>(x.dim(2)),
          .dstate = static_cast<int>(dstate),
          .weights = {rows.A(weight).template data<T>(), rows.B(weight).template data<T>(),
                      rows.C(weight).template data<T>(), D, D + x.dim(2) * x.dim(2)},
          .lengths = lengths};
}

/// Whether this device, these sizes and these addresses of activations are served here. A block
/// walks all weights for its tokens; where only few blocks would, the work is better divided by a
/// GEMM over all channels.
bool fits_sm90(const Context& ctx, DType dtype, std::int64_t tokens, std::int64_t dim,
               std::int64_t dstate, std::initializer_list<const void*> activations);

/// Weights in the order in which the contractions of a pass read them.
template <class T>
Tensor pack_forward_sm90(Context& ctx, const Problem<T>& p);
template <class T>
Tensor pack_backward_sm90(Context& ctx, const Problem<T>& p);

/// A = x W_A^T + base and drive = sum_h x[h] (x W_B^T)[h] + x W_bias^T, both [tokens, N].
template <class T>
void project_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                  const float* base, float* A, float* drive);
/// y = (x W_D^T) x + sum_n s[n] (x W_C^T)[n], and 0 at padding.
template <class T>
void read_out_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                   const float* s, T* y);

/// ds = sum_h dy[h] (x W_C^T)[h].
template <class T>
void state_gradients_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                          const T* dy, float* ds);
/// What reaches x through all five projections and through the products with it.
template <class T>
void input_gradients_sm90(Context& ctx, const Problem<T>& p, const Tensor& packed, const T* x,
                          const T* dy, const float* s, const float* g, const float* dA, T* dx);
/// dweight, of all of x_proj, += what the tokens give.
template <class T>
void weight_gradients_sm90(Context& ctx, const Problem<T>& p, const T* x, const T* dy,
                           const float* s, const float* g, const float* dA, float* dweight);

}  // namespace lrnn::cuda::s7
