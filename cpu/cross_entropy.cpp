#include "lrnn/ops/cross_entropy.hpp"

#include <algorithm>
#include <cmath>

#include "common/eigen.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

template <class T>
T log_sum_exp(const T* z, std::int64_t n) {
  const Eigen::Map<const RowVector<T>> row(z, n);
  const T top = row.maxCoeff();
  return top + std::log((row - top).exp().sum());
}

// dz may be z.
template <class T>
void gradient_row(const T* z, std::int32_t target, T lse, T factor, std::int64_t vocab,
                  std::int64_t width, T* dz) {
  if (target == kIgnoreIndex) {
    std::fill(dz, dz + width, T(0));
    return;
  }
  Eigen::Map<RowVector<T>>(dz, vocab) =
      factor * (Eigen::Map<const RowVector<T>>(z, vocab) - lse).exp();
  dz[target] -= factor;
  std::fill(dz + vocab, dz + width, T(0));
}

void check_target(std::int32_t target, std::int64_t vocab) {
  LRNN_CHECK(target == kIgnoreIndex || (target >= 0 && target < vocab), InvalidArgument,
             "cross_entropy: targets: expected values in [0, ", vocab, ") or ", kIgnoreIndex,
             ", got ", target);
}

}  // namespace

void prepare_targets(Context&, const PrepareTargets& a) {
  const std::int32_t* const targets = a.targets.data<std::int32_t>();
  std::int32_t* const counted = a.counted.data<std::int32_t>();
  const std::int64_t seqlen = a.targets.dim(1);
  std::int64_t count = 0;
  for (std::int64_t b = 0; b < a.targets.dim(0); ++b) {
    const std::int64_t length = a.lengths ? a.lengths.data<std::int32_t>()[b] : seqlen;
    for (std::int64_t t = 0; t < seqlen; ++t) {
      const std::int64_t i = b * seqlen + t;
      counted[i] = t < length ? targets[i] : kIgnoreIndex;
      count += counted[i] == kIgnoreIndex ? 0 : 1;
    }
  }
  visit_float("prepare_targets", a.scale.dtype(), [&]<class T>() {
    *a.scale.data<T>() = count == 0 ? T(0) : T(1) / static_cast<T>(count);
  });
}

void cross_entropy_forward(Context&, const CrossEntropyForward& a) {
  visit_float("cross_entropy_forward", a.logits.dtype(), [&]<class T>() {
    const auto logits = rows_of<T>(a.logits);
    const std::int32_t* const targets = a.targets.data<std::int32_t>();
    for (std::int64_t t = 0; t < logits.count; ++t) check_target(targets[t], a.vocab_size);
    const T scale = a.scale ? *a.scale.data<T>() : T(1);
    const auto dlogits = a.dlogits ? rows_of<T>(a.dlogits) : Rows<T>{};
    T* const losses = a.losses.data<T>();
#pragma omp parallel for
    for (std::int64_t t = 0; t < logits.count; ++t) {
      const T* const z = logits[t];
      const T lse = log_sum_exp(z, a.vocab_size);
      losses[t] = targets[t] == kIgnoreIndex ? T(0) : lse - z[targets[t]];
      if (a.lse) a.lse.data<T>()[t] = lse;
      if (a.dlogits)
        gradient_row(z, targets[t], lse, scale, a.vocab_size, logits.width, dlogits[t]);
    }
  });
}

void cross_entropy_backward(Context&, const CrossEntropyBackward& a) {
  visit_float("cross_entropy_backward", a.logits.dtype(), [&]<class T>() {
    const auto logits = rows_of<T>(a.logits);
    const auto dlogits = rows_of<T>(a.dlogits);
    const std::int32_t* const targets = a.targets.data<std::int32_t>();
#pragma omp parallel for
    for (std::int64_t t = 0; t < logits.count; ++t)
      gradient_row(logits[t], targets[t], a.lse.data<T>()[t], a.dlosses.data<T>()[t], a.vocab_size,
                   logits.width, dlogits[t]);
  });
}

void mean_loss(Context&, const MeanLoss& a) {
  visit_float("mean_loss", a.losses.dtype(), [&]<class T>() {
    double sum = 0;
    for (std::int64_t t = 0; t < a.losses.numel(); ++t)
      sum += static_cast<double>(a.losses.data<T>()[t]);
    *a.loss.data<T>() = *a.scale.data<T>() * static_cast<T>(sum);
  });
}

}  // namespace lrnn::cpu
