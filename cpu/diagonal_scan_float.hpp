/// Both passes of diagonal_scan on float operands, computed in double, compiled for several
/// instruction sets: see common/isa.hpp.
#pragma once

#include <cstdint>

namespace lrnn::cpu {

/// Lanes of a work item: a constant, so that sums do not depend on the number of threads.
inline constexpr std::int64_t kDiagonalLanes = 128;

/// Operands of a pass; see include/lrnn/ops/diagonal_scan.hpp. Optional ones may be null.
struct FloatDiagonalScan {
  const float *a, *a_low;  // fixed form
  const float *z, *tau;    // event form
  bool bilinear, complex;  // of the event form; of v
  const float *v, *gamma;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, lanes, chunks;
};
struct FloatDiagonalForward {
  FloatDiagonalScan in;
  const float* state_in;
  float *x, *state_out, *chunk_states;
};
struct FloatDiagonalBackward {
  FloatDiagonalScan in;
  const float *dx, *chunk_states, *dstate_out;
  float *dv, *x, *dstate_in;
  double* multiplier;  ///< [B, 2, N], overwritten: gradients of a or z over time
  double* gamma;       ///< [B, 2, N], overwritten
  double* dtau;        ///< [items of a sequence, B L], overwritten; may be null
};

void run_float_diagonal(const FloatDiagonalForward& p);
void run_float_diagonal_backward(const FloatDiagonalBackward& p);

}  // namespace lrnn::cpu
