// Two launches of the product of few rows. In the first, the thread that has the sums of a lane, a
// real drive or both parts of a complex one, moves its state on. In the second it adds D x: a
// factor per column, or a product that other warps of the block do beside that with C. Bound by
// reading the projections. More rows than these kernels take go through the ops one by one.
#include "lrnn/ops/projected_diagonal.hpp"

#include "common/diagonal_scan.cuh"
#include "common/linear_two_products.cuh"
#include "common/norm_in_front.cuh"
#include "ops/projected_diagonal_parts.hpp"

namespace lrnn::cuda {
namespace {

/// What becomes of the drive of a lane.
template <class T>
struct Lane {
  diagonal::Sizes sizes;
  diagonal::MultiplierArgs multiplier;
  const float* gamma;
  float* state;  // [B, 2, N]
  T* states;     // [B, 2, N], rounded

  __device__ __forceinline__ void prefetch(int row, int lane) const {
    const std::int64_t at = static_cast<std::int64_t>(row) * 2 * sizes.lanes + lane;
    prefetch_to_l2(state + at);
    prefetch_to_l2(state + at + sizes.lanes);
  }
  struct Operands {
    diagonal::Multiplier<diagonal::Form::Fixed> multiplier;
    float2 gamma, x;
  };
  __device__ __forceinline__ Operands load(int row, int lane) const {
    return {{multiplier, sizes, lane},
            diagonal::load_pair(gamma, 0, sizes, lane),
            diagonal::load_pair(state, row, sizes, lane)};
  }
  __device__ __forceinline__ void operator()(int row, int lane, float re, float im,
                                             const Operands& o) const {
    const float2 v{to_float(from_float<T>(re)), to_float(from_float<T>(im))};
    const float2 x = o.multiplier.advance(o.x, diagonal::multiply(o.gamma, v));
    diagonal::store_pair(state, row, sizes, lane, x);
    diagonal::store_pair(states, row, sizes, lane, x);
  }
  __device__ __forceinline__ void operator()(int row, int lane, float re, const Operands& o) const {
    (*this)(row, lane, re, 0.0F, o);
  }
};

/// y = read-out + D x, D a factor per column.
template <class T>
struct AddScaled {
  DeviceRows<const T> x;
  const float* D;
  DeviceRows<T> y;

  struct Operands {
    float D, x;
  };
  __device__ __forceinline__ Operands load(int r, int c) const {
    return {D[c], to_float(x.row(r)[c])};
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, const Operands& o) const {
    y.row(r)[c] = from_float<T>(fmaf(o.D, o.x, sum));
  }
};
/// The same where the first product took in a norm of x.
template <class T, class Residual>
struct AddScaledNormed {
  DeviceRows<const T> x;  // before the norm
  few_rows::RmsNorm<Residual> norm;
  std::int64_t width;
  const float* D;
  DeviceRows<T> y;

  struct Operands {
    float D, x;
  };
  __device__ __forceinline__ Operands load(int r, int c) const {
    float sum = to_float(x.row(r)[c]);
    if (norm.residual != nullptr) sum += to_float(norm.residual[r * width + c]);
    return {D[c], to_float(from_float<T>(sum * norm.rstd[r] * norm.weight[c]))};
  }
  __device__ __forceinline__ void operator()(int r, int c, float sum, const Operands& o) const {
    y.row(r)[c] = from_float<T>(fmaf(o.D, o.x, sum));
  }
};
/// y = read-out + D x, both of them products.
template <class T>
struct AddProducts {
  DeviceRows<T> y;

  __device__ __forceinline__ void operator()(int r, int c, float read_out, float skip) const {
    y.row(r)[c] = from_float<T>(read_out + skip);
  }
};

template <class T>
few_rows::Args<T> product_of(TensorView x, TensorView weight) {
  return {.x = device_rows<T>(x),
          .weight = device_rows<T>(weight),
          .rows = static_cast<int>(x.dim(0)),
          .columns = static_cast<int>(weight.dim(0)),
          .depth = static_cast<int>(x.dim(1)),
          .stable_weight = true};
}

/// Views of the projections as matrices.
struct Matrices {
  TensorView B[2];  // the second: of the imaginary parts, if any
  TensorView C;

  explicit Matrices(const ProjectedDiagonalStep& a) : C(a.C.reshape({a.C.dim(0), 2 * a.C.dim(2)})) {
    const std::int64_t lanes = a.a.dim(1);
    if (a.B.rank() == 2) {
      B[0] = a.B;
      return;
    }
    const TensorView planes = a.B.reshape({2 * lanes, a.x.dim(1)});
    for (int part = 0; part < 2; ++part) B[part] = planes.slice(0, part * lanes, lanes);
  }
};

template <class T>
void first_product(cudaStream_t stream, TensorView x, const Matrices& m, const Lane<T>& lane,
                   const auto& norm) {
  if (m.B[1])
    few_rows::launch_two(stream, product_of<T>(x, m.B[0]), product_of<T>(x, m.B[1]), lane, norm);
  else
    few_rows::launch(stream, product_of<T>(x, m.B[0]), lane, norm);
}

/// y = states C^T + D x, of x or of the rows that `norm` makes x of.
template <class T>
void second_product(cudaStream_t stream, const ProjectedDiagonalStep& a, TensorView x,
                    const few_rows::Args<T>& read_out, few_rows::AsTheyAre) {
  const auto y = device_rows<T>(a.y);
  if (a.D.rank() == 1)
    few_rows::launch(stream, read_out, AddScaled<T>{device_rows<T>(x), a.D.data<float>(), y});
  else
    few_rows::launch_two(stream, read_out, product_of<T>(x, a.D), AddProducts<T>{y});
}
template <class T, class Residual>
void second_product(cudaStream_t stream, const ProjectedDiagonalStep& a, TensorView x,
                    const few_rows::Args<T>& read_out, const few_rows::RmsNorm<Residual>& norm) {
  few_rows::launch(stream, read_out,
                   AddScaledNormed<T, Residual>{device_rows<T>(x), norm, x.dim(1),
                                                a.D.data<float>(), device_rows<T>(a.y)});
}

/// Rows of the first product. A matrix D, another product with x, needs it normalised.
template <class T>
few_rows::Rows rows_of(Context& ctx, const ProjectedDiagonalStep& a, const Matrices& m) {
  const int depth = static_cast<int>(a.x.dim(1));
  const int warps = a.D.rank() == 2 ? 0
                    : m.B[1]        ? few_rows::warps_of_two<T>(depth)
                                    : few_rows::warps_of<T>(depth);
  return few_rows::rows_of<T>(ctx, a.x, a.norm, warps);
}

template <class T>
void step(Context& ctx, const ProjectedDiagonalStep& a, const Matrices& m,
          MutableTensorView states) {
  const cudaStream_t stream = ctx.stream().handle;
  const Lane<T> lane{diagonal::Sizes(a.x.dim(0), 1, a.a.dim(1)),
                     diagonal::MultiplierArgs({.a = a.a, .a_low = a.a_low}), a.gamma.data<float>(),
                     a.state.data<float>(), states.data<T>()};
  const few_rows::Rows rows = rows_of<T>(ctx, a, m);
  Tensor rstd;
  if (rows.norm != nullptr) rstd = ctx.empty({a.x.dim(0)}, DType::float32);
  few_rows::visit_norm<T>(rows, rstd ? rstd.view() : MutableTensorView(), [&](const auto& norm) {
    first_product(stream, rows.x, m, lane, norm);
    second_product<T>(stream, a, rows.x, product_of<T>(states, m.C), norm);
  });
}

}  // namespace

void projected_diagonal_step(Context& ctx, const ProjectedDiagonalStep& a) {
  visit_float("projected_diagonal_step", a.x.dtype(), [&]<class T>() {
    const Matrices m(a);
    Tensor states = ctx.empty({a.x.dim(0), 2 * a.a.dim(1)}, a.x.dtype());
    if (few_rows::fuses<T>(a.x, m.B[0]) && (!m.B[1] || few_rows::fuses<T>(a.x, m.B[1])) &&
        few_rows::fuses<T>(states, m.C) && (a.D.rank() == 1 || few_rows::fuses<T>(a.x, a.D)))
      return step<T>(ctx, a, m, states);
    lrnn::detail::projected_diagonal_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
