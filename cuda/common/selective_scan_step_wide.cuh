/// One token of the selective scan with many states: when its kernel applies.
#pragma once

#include "lrnn/ops/selective_scan.hpp"

namespace lrnn::cuda::selective {

/// Runs it if it suits: 32, 64 or 128 states of Mamba's rule, several sequences. Returns whether it
/// did.
bool step_wide(Context& ctx, const SelectiveScanStep& args);

}  // namespace lrnn::cuda::selective
