#pragma once

#include "lrnn/mixers/config.hpp"

namespace lrnn {

struct S5Config {
  std::optional<std::int64_t> d_state = {};  ///< default: the model's

  static void visit(auto& self, auto&& v) { v("d_state", self.d_state); }
};

}  // namespace lrnn
