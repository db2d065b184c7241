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
  const auto in_vectors = [&](TensorView t) {
    return depth % kWide<bf16> == 0 && reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;
  };
  return norm.kind == NormKind::Rms && !norm.rstd && norm.residual && norm.residual_out &&
         norm.residual.dtype() == norm.residual_out.dtype() &&
         norm.residual_out.raw() != norm.residual.raw() &&
         norm.residual_out.raw() != norm.x.raw() && depth <= warps * kNormedPart &&
         detail::row_count(norm.x) <= kNormedRows && in_vectors(norm.x) &&
         in_vectors(norm.residual) && in_vectors(norm.residual_out) && in_vectors(norm.weight);
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

/// Calls f(AsTheyAre or RmsNorm). rstd: [rows] float32 for what the norm divides by, or absent.
template <class T, class F>
void visit_norm(const Rows& rows, MutableTensorView rstd, F&& f) {
  if constexpr (std::is_same_v<T, bf16>) {
    const AddNormForward* const norm = rows.norm;
    const auto visit = [&]<class Residual>() {
      f(RmsNorm<Residual>{.residual = norm->residual.data<Residual>(),
                          .weight = norm->weight.data<float>(),
                          .residual_out = norm->residual_out.data<Residual>(),
                          .rstd = rstd ? rstd.data<float>() : nullptr,
                          .inverse_depth = 1.0F / static_cast<float>(rows.x.dim(-1)),
                          .eps = static_cast<float>(norm->eps)});
    };
    if (norm != nullptr && norm->residual.dtype() == DType::float32)
      return visit.template operator()<float>();
    if (norm != nullptr) return visit.template operator()<bf16>();
  }
  f(AsTheyAre{});
}

}  // namespace lrnn::cuda::few_rows
