// One work item is (sequence, key/value head): it owns its part of dK and dV and walks the query
// heads of its group and blocks of queries in order.
#include "lrnn/ops/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kQueries = 32;  // of one block

template <class T>
using Dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using Strided = Eigen::Map<Dense<T>, 0, Eigen::OuterStride<>>;
template <class T>
using ConstStrided = Eigen::Map<const Dense<T>, 0, Eigen::OuterStride<>>;

/// Sizes of a problem and the visible keys of a query.
struct Sizes {
  std::int64_t batch, seqlen, slots, heads, heads_kv, head_dim;
  const std::int32_t* lengths;
  const std::int32_t* positions;
  bool causal;

  explicit Sizes(const AttentionInputs& in)
      : batch(in.q.dim(0)),
        seqlen(in.q.dim(1)),
        slots(in.k.dim(1)),
        heads(in.num_heads),
        heads_kv(in.num_heads_kv),
        head_dim(in.q.dim(2) / in.num_heads),
        lengths(in.lengths ? in.lengths.data<std::int32_t>() : nullptr),
        positions(in.positions ? in.positions.data<std::int32_t>() : nullptr),
        causal(in.causal) {}
  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
  [[nodiscard]] std::int64_t offset(std::int64_t b) const {
    return positions != nullptr ? positions[b] : 0;
  }
  [[nodiscard]] std::int64_t keys(std::int64_t b) const {
    return std::min(slots, offset(b) + length(b));
  }
  // Number of leading keys that query t sees.
  [[nodiscard]] std::int64_t visible(std::int64_t b, std::int64_t t) const {
    return causal ? std::min(keys(b), offset(b) + t + 1) : keys(b);
  }
};

// Rows [first, first + count) of sequence b, columns of one head.
template <class T>
ConstStrided<T> head(const Rows<const T>& r, std::int64_t row, std::int64_t count,
                     std::int64_t index, std::int64_t head_dim) {
  return {r[row] + index * head_dim, count, head_dim, Eigen::OuterStride<>(r.stride)};
}
template <class T>
Strided<T> head(const Rows<T>& r, std::int64_t row, std::int64_t count, std::int64_t index,
                std::int64_t head_dim) {
  return {r[row] + index * head_dim, count, head_dim, Eigen::OuterStride<>(r.stride)};
}

// Calls f(b, key/value head, query head, first query, count), in parallel over the first two.
template <class F>
void for_blocks(const Sizes& z, F&& f) {
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < z.batch; ++b)
    for (std::int64_t kv = 0; kv < z.heads_kv; ++kv) {
      const std::int64_t group = z.heads / z.heads_kv;
      for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (std::int64_t t = 0; t < z.length(b); t += kQueries)
          f(b, kv, h, t, std::min(kQueries, z.length(b) - t));
    }
}

template <class T>
void forward(const AttentionForward& a) {
  const Sizes z(a.in);
  const auto q = rows_of<T>(a.in.q);
  const auto k = rows_of<T>(a.in.k);
  const auto v = rows_of<T>(a.in.v);
  const auto o = rows_of<T>(a.o);
  for (std::int64_t r = 0; r < o.count; ++r)
    if (r % z.seqlen >= z.length(r / z.seqlen)) std::fill_n(o[r], o.width, T(0));
  for_blocks(
      z, [&](std::int64_t b, std::int64_t kv, std::int64_t h, std::int64_t t, std::int64_t count) {
        const std::int64_t keys = z.visible(b, t + count - 1);
        Dense<T> S = head<T>(q, b * z.seqlen + t, count, h, z.head_dim) *
                     head<T>(k, b * z.slots, keys, kv, z.head_dim).transpose();
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t n = z.visible(b, t + i);
          auto row = S.row(i).head(n);
          row *= static_cast<T>(a.in.softmax_scale);
          const T top = row.maxCoeff();
          row = (row.array() - top).exp().matrix();
          const T sum = row.sum();
          row /= sum;
          S.row(i).tail(keys - n).setZero();
          if (a.lse) a.lse.data<T>()[(b * z.heads + h) * z.seqlen + t + i] = top + std::log(sum);
        }
        // Row by row, so that a value beyond the visible keys cannot reach the sum, not even as 0 *
        // inf.
        auto out = head<T>(o, b * z.seqlen + t, count, h, z.head_dim);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t n = z.visible(b, t + i);
          out.row(i).noalias() = S.row(i).head(n) * head<T>(v, b * z.slots, n, kv, z.head_dim);
        }
      });
}

template <class T>
void backward(const AttentionBackward& a) {
  const Sizes z(a.in);
  const auto q = rows_of<T>(a.in.q);
  const auto k = rows_of<T>(a.in.k);
  const auto v = rows_of<T>(a.in.v);
  const auto o = rows_of<T>(a.o);
  const auto d_o = rows_of<T>(a.d_o);
  const auto dq = rows_of<T>(a.dq);
  const auto dk = rows_of<T>(a.dk);
  const auto dv = rows_of<T>(a.dv);
  const T scale = static_cast<T>(a.in.softmax_scale);
  for (std::int64_t r = 0; r < dq.count; ++r) std::fill_n(dq[r], dq.width, T(0));
  for (std::int64_t r = 0; r < dk.count; ++r) {
    std::fill_n(dk[r], dk.width, T(0));
    std::fill_n(dv[r], dv.width, T(0));
  }
  for_blocks(
      z, [&](std::int64_t b, std::int64_t kv, std::int64_t h, std::int64_t t, std::int64_t count) {
        const std::int64_t row = b * z.seqlen + t;
        const std::int64_t keys = z.visible(b, t + count - 1);
        const auto queries = head<T>(q, row, count, h, z.head_dim);
        const auto K = head<T>(k, b * z.slots, keys, kv, z.head_dim);
        const auto V = head<T>(v, b * z.slots, keys, kv, z.head_dim);
        const auto dO = head<T>(d_o, row, count, h, z.head_dim);
        const auto O = head<T>(o, row, count, h, z.head_dim);
        Dense<T> P = queries * K.transpose();
        Dense<T> dS = dO * V.transpose();
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t n = z.visible(b, t + i);
          const T lse = a.lse.data<T>()[(b * z.heads + h) * z.seqlen + t + i];
          const T delta = dO.row(i).dot(O.row(i));
          P.row(i).head(n) = (P.row(i).head(n).array() * scale - lse).exp().matrix();
          dS.row(i).head(n) =
              (P.row(i).head(n).array() * (dS.row(i).head(n).array() - delta) * scale).matrix();
          P.row(i).tail(keys - n).setZero();
          dS.row(i).tail(keys - n).setZero();
        }
        head<T>(dq, row, count, h, z.head_dim).noalias() = dS * K;
        head<T>(dk, b * z.slots, keys, kv, z.head_dim).noalias() += dS.transpose() * queries;
        head<T>(dv, b * z.slots, keys, kv, z.head_dim).noalias() += P.transpose() * dO;
      });
}

}  // namespace

void attention_forward(Context&, const AttentionForward& a) {
  visit_float("attention_forward", a.in.q.dtype(), [&]<class T>() { forward<T>(a); });
}
void attention_backward(Context&, const AttentionBackward& a) {
  visit_float("attention_backward", a.in.q.dtype(), [&]<class T>() { backward<T>(a); });
}

}  // namespace lrnn::cpu
