/// Gradients of S4 in the coordinates of lrnnx.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace lrnn::detail {

/// Parameters of one S4 layer and their gradients, in the order of lrnnx's tensors.
///
/// This library trains the read-out C. lrnnx trains C~ = C (I - M^K) with M the transition matrix
/// and K its kernel length, and holds C~ fixed when it differentiates by A, P and dt. With
/// R = (I - M^K)^-1 and g the gradient of C, the gradients of lrnnx are
///   dC~ = g R^H,   d(A, P, dt) += the gradient of Re <dC~, C M^K> by M's parameters.
struct S4Layer {
  std::int64_t channels, heads, states, ssm_copies, rank;  ///< of C, H, N/2, n_ssm, of P
  bool dt_tied;
  std::vector<double> A_real, A_imag, inv_dt, P, C;
  std::vector<double> dA_real, dA_imag, dinv_dt, dP, dC;
  /// lrnnx's transforms of the three, by name ("exp", "none", ...); dt_fast takes sinh first.
  std::string real_transform = "exp";
  std::string imag_transform = "none";
  std::string dt_transform = "exp";
  bool dt_fast = false;
};

/// Changes the gradients in place. `kernel_length` is lrnnx's l_kernel after the forward pass.
void to_lrnnx_coordinates(S4Layer& layer, std::int64_t kernel_length);

}  // namespace lrnn::detail
