/// The read-out of S4 in the coordinates of its recurrence.
///
/// lrnnx keeps C~ = C (I - M^K) for a kernel of K taps; the infinite recurrence reads C.
/// Paper: arXiv:2111.00396, section 3 and appendix C.3. Dense, in double, once per loaded checkpoint.
#pragma once

#include <cstdint>
#include <vector>

namespace lrnn::detail {

/// The transition M x = e x + x - w <k, x> of every head on (Re x, Im x); see ops/dplr_scan.hpp.
struct S4DenseTransition {
  std::int64_t heads;
  std::int64_t states;  ///< complex ones, N/2
  std::int64_t rank;
  std::vector<double> e;  ///< [2, heads, states]
  std::vector<double> w;  ///< [rank, 2, heads, states]
  std::vector<double> k;  ///< [rank, 2, heads, states]
};

/// C <- C (I - M^length)^-1 for pairs C [channels, heads, states, 2].
void restore_read_out(std::vector<double>& C, std::int64_t channels,
                      const S4DenseTransition& transition, std::int64_t length);

}  // namespace lrnn::detail
