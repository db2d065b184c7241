/// The forward pass of selective_scan in float with the discretization of Mamba, the one that
/// language models run on the CPU. Compiled for several instruction sets; the machine's is picked
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

void run_float_scan(const FloatScan& p);

}  // namespace lrnn::cpu
