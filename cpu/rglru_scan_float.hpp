/// The passes of rglru_scan in float, compiled for several instruction sets: see common/isa.hpp.
#pragma once

#include <cstdint>

namespace lrnn::cpu {

/// Operands of a pass; see include/lrnn/ops/rglru_scan.hpp. Optional ones may be null.
struct FloatGatedScan {
  const float *v, *pre_r, *pre_i;
  std::int64_t v_stride, pre_r_stride, pre_i_stride;  // of tokens
  const float *a_log, *state_in;
  const std::int32_t* lengths;
  float c;
  std::int64_t batch, seqlen, channels, chunks;
};
struct FloatGatedScanForward {
  FloatGatedScan in;
  float *h, *state_out, *chunk_states;
  std::int64_t h_stride;
};
struct FloatGatedScanBackward {
  FloatGatedScan in;  ///< without state_in
  const float *dh, *chunk_states, *dstate_out;
  float *dv, *dpre_r, *dpre_i, *dstate_in;
  std::int64_t dh_stride, dv_stride, dpre_r_stride, dpre_i_stride;
  float* dlog;  ///< [B, E], overwritten: the gradient of a's logarithm times it, over time
};

void run_float_gated_scan(const FloatGatedScanForward& p);
void run_float_gated_scan_backward(const FloatGatedScanBackward& p);

}  // namespace lrnn::cpu
