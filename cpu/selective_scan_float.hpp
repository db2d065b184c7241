/// The passes of selective_scan in float with the discretization of Mamba, the one that language
/// models run on the CPU. Compiled for several instruction sets; the machine's is picked
/// at run time.
#pragma once

#include <cstdint>

namespace lrnn::cpu {

/// Operands of the pass; see include/lrnn/ops/selective_scan.hpp. Optional ones may be null.
struct FloatScan {
  const float *u, *dt, *z, *B, *C;
  float* y;
  std::int64_t u_stride, dt_stride, z_stride, B_stride, C_stride, y_stride;  // of tokens
  const float *dt_bias, *A_log, *D, *state_in;
  float *state_out, *chunk_states;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, channels, dstate, chunks;
};

/// Channels whose parts of dB and dC are added up in one work item.
inline constexpr std::int64_t kFloatGroup = 128;

/// Operands of the backward pass; `in` is without what forward writes and without state_in. The
/// last three are sums over parts of the batch or the channels, overwritten except dBC at padding.
struct FloatScanBackward {
  FloatScan in;
  const float *dy, *chunk_states, *dstate_out;
  float *du, *ddt, *dz, *dstate_in;
  std::int64_t dy_stride, du_stride, ddt_stride, dz_stride;  // of tokens
  std::int64_t groups;
  float* dBC;       // [B, groups, L, 2 N]
  float* dA_log;    // [B, E, N]
  float* dvectors;  // [B, 3, E]: dt_bias, D; the last is not written
};

void run_float_scan(const FloatScan& p);
void run_float_scan_backward(const FloatScanBackward& p);

}  // namespace lrnn::cpu
