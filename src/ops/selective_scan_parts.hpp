/// selective_scan_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/selective_scan.hpp"

namespace lrnn::detail {

/// The step behind a product of its own for dt.
void selective_scan_step_after_projection(Context& ctx, SelectiveScanStep args);

}  // namespace lrnn::detail
