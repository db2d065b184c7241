/// Greedy choice with a repetition penalty, which the kernels of argmax make.
#pragma once

#include "ops/sample_math.hpp"

namespace lrnn::cuda {

/// What sample_forward() does where `plan` is greedy and there is a mask.
void penalised_argmax(Context& ctx, const SampleForward& a, const detail::SamplePlan& plan);

}  // namespace lrnn::cuda
