/// Linear Recurrent Unit.
#pragma once

#include "lrnn/mixers/config.hpp"

namespace lrnn {

struct LruConfig {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's
  double r_min = 0.0;
  double r_max = 1.0;
  double max_phase = 6.283185307179586;

  static void visit(auto& self, auto&& v) {
    v("d_state", self.d_state);
    v("r_min", self.r_min);
    v("r_max", self.r_max);
    v("max_phase", self.max_phase);
  }
};

}  // namespace lrnn
