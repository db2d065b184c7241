/// How the rows of S7's x_proj are divided: [A: N | B: H N | C: H N | D: H | bias: N].
#pragma once

#include "lrnn/core/tensor.hpp"

namespace lrnn::detail {

struct S7Rows {
  std::int64_t dim;     // H
  std::int64_t dstate;  // N

  [[nodiscard]] std::int64_t count() const { return 2 * dim * dstate + dim + 2 * dstate; }
  template <class View>
  [[nodiscard]] View A(View weight) const {
    return weight.slice(0, 0, dstate);
  }
  template <class View>
  [[nodiscard]] View B(View weight) const {
    return weight.slice(0, dstate, dim * dstate);
  }
  template <class View>
  [[nodiscard]] View C(View weight) const {
    return weight.slice(0, dstate + dim * dstate, dim * dstate);
  }
  /// D and bias together: [H + N] rows.
  template <class View>
  [[nodiscard]] View D_bias(View weight) const {
    return weight.slice(0, dstate + 2 * dim * dstate, dim + dstate);
  }
};

}  // namespace lrnn::detail
