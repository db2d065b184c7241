/// mamba_stack_step by the ops that it stands for.
#pragma once

#include "lrnn/ops/mamba_stack.hpp"
#include "lrnn/ops/projected_conv1d.hpp"
#include "lrnn/ops/projected_selective_scan.hpp"

namespace lrnn::detail {

/// The convolution of n [B, H] to uz [B, 1, 2 E], and the scan of that to v [B, 1, E].
ProjectedConv1dStep mamba_stack_conv(const MambaStackLayer& layer, TensorView n,
                                     MutableTensorView uz);
ProjectedSelectiveScanStep mamba_stack_scan(const MambaStackLayer& layer, TensorView uz,
                                            MutableTensorView v);

void mamba_stack_by_parts(Context& ctx, const MambaStackStep& args);

}  // namespace lrnn::detail
