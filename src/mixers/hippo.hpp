/// Initial values of the state-space parameters of S4 and S4D, in double.
///
/// HiPPO matrices are written as A = V (diag(Lambda) - P P^*) V^*, whose diagonal part comes from
/// the eigen-decomposition of the skew-symmetric rest; half of each conjugate pair is kept.
/// Papers: arXiv:2008.07669 (HiPPO), arXiv:2111.00396 (S4), arXiv:2206.11893 (S4D).
/// Matches: lrnnx/ops/s4_utils.py, nplr and dplr, up to the sign of each eigenvector: here the
/// first component that is not 0 is real and positive.
#pragma once

#include <complex>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "lrnn/mixers/state_space_config.hpp"

namespace lrnn::detail {

/// Initial values of `copies` state-space models with `states` complex states each.
struct HippoInit {
  using Complex = std::complex<double>;

  std::int64_t copies = 0;
  std::int64_t states = 0;
  std::vector<double> decay;      ///< -Re Lambda [copies, states], >= 0
  std::vector<double> frequency;  ///< -Im Lambda [copies, states], >= 0
  std::vector<Complex> B;         ///< [copies, states]
  std::vector<Complex> P;         ///< [rank, copies, states]
  std::vector<bool> random_P;     ///< [copies]: P starts complex normal instead
  /// The first unit vector of the HiPPO basis in the eigenbasis [copies, states].
  std::vector<Complex> unit;
};

struct HippoOptions {
  StateSpaceInit init;
  std::int64_t d_state;
  std::int64_t copies;
  std::int64_t rank = 1;
  std::optional<double> B_clip = 2.0;  ///< bound on |Im B| of HiPPO matrices
};

/// @throws ConfigError; `field` is the option's full name without the last part, e.g.
/// "mixer_kwargs.S4.".
[[nodiscard]] HippoInit make_hippo(const std::string& field, const HippoOptions& options);
/// The checks of make_hippo alone.
void check_hippo(const std::string& field, const HippoOptions& options);

}  // namespace lrnn::detail
