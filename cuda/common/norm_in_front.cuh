/// An add_norm in front of products of few rows: part of them where it can be, else run before.
#pragma once

#include <type_traits>

#include "lrnn/ops/add_norm.hpp"

#include "common/linear_few_rows.cuh"

namespace lrnn::cuda::few_rows {

/// Whether a product that has `warps` for a row of W takes the norm in. The residual that it leaves
/// must not be one of its operands, which all blocks read.
template <class T>
bool takes_in(const AddNormForward& norm, int warps) {
  if constexpr (!std::is_same_v<T, bf16>) return false;
  const std::int64_t depth = norm.x.dim(-1);
  const TensorView residual = norm.residual;
  const TensorView out = norm.residual_out;
  const auto in_vectors = [](TensorView t) {
    return reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;  // so is an absent one
  };
  const bool one_dtype = !residual || !out || residual.dtype() == out.dtype();
  const bool apart = !out || (out.raw() != residual.raw() && out.raw() != norm.x.raw());
  return norm.kind == NormKind::Rms && !norm.rstd && one_dtype && apart &&
         detail::row_count(norm.x) <= kNormedRows && depth <= warps * kNormedPart &&
         depth % kWide<bf16> == 0 && in_vectors(norm.x) && in_vectors(residual) &&
         in_vectors(out) && in_vectors(norm.weight);
}

/// Rows that a product reads, and the norm that it takes in, if any.
struct Rows {
  TensorView x;
  const AddNormForward* norm;
};

/// Those of x, which `norm`, if there is one, makes.
template <class T>
Rows rows_of(Context& ctx, TensorView x, const AddNormForward* norm, int warps) {
  if (norm == nullptr) return {x, nullptr};
  if (takes_in<T>(*norm, warps)) return {norm->x.reshape(x.shape()), norm};
  cuda::add_norm_forward(ctx, *norm);
  return {x, nullptr};
}

/// Calls f(AsTheyAre or RmsNorm). rstd: [rows] float32, where a norm's is left, or absent.
template <class T, class F>
void visit_norm(const Rows& rows, MutableTensorView rstd, F&& f) {
  if constexpr (std::is_same_v<T, bf16>) {
    const AddNormForward* const norm = rows.norm;
    const auto visit = [&]<class Residual>() {
      const TensorView residual = norm->residual;
      const MutableTensorView out = norm->residual_out;
      f(RmsNorm<Residual>{.residual = residual ? residual.data<Residual>() : nullptr,
                          .weight = norm->weight.data<float>(),
                          .residual_out = out ? out.data<Residual>() : nullptr,
                          .rstd = rstd ? rstd.data<float>() : nullptr,
                          .inverse_depth = 1.0F / static_cast<float>(rows.x.dim(-1)),
                          .eps = static_cast<float>(norm->eps)});
    };
    if (norm != nullptr) {
      const TensorView either = norm->residual ? norm->residual : norm->residual_out;
      const bool wide = either && either.dtype() == DType::float32;
      return wide ? visit.template operator()<float>() : visit.template operator()<bf16>();
    }
  }
  f(AsTheyAre{});
}

}  // namespace lrnn::cuda::few_rows
