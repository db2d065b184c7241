/// Rotary position embedding of query and key heads, in place.
///
///   inv_freq_j = base^(-2 j / dim),  angle = position inv_freq_j,  j < dim / 2
///   (a, b) -> (a cos - b sin, a sin + b cos)
///
/// Pairs are (j, j + dim/2), or (2 j, 2 j + 1) if interleaved; only the first `dim` elements of a
/// head rotate. The position of token t is position_ids[b, t], else positions[b] + t, else t.
/// Angles are reduced in double. The gradient is the rotation by -angle: `inverse`.
/// Paper: Su et al., arXiv:2104.09864.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct Rotary {
  MutableTensorView x;    ///< [B, L, heads d], rows may be column slices; in place
  std::int64_t head_dim;  ///< d
  std::int64_t dim;       ///< even, at most d
  double base = 10000.0;
  bool interleaved = false;
  bool inverse = false;
  TensorView positions = {};     ///< [B] int32
  TensorView position_ids = {};  ///< [B, L] int32
};

/// @throws ShapeError, DTypeError, DeviceError
void rotary(Context& ctx, const Rotary& args);

// Backends. Unchecked: call the function above.
namespace cpu {
void rotary(Context& ctx, const Rotary& args);
}  // namespace cpu
namespace cuda {
void rotary(Context& ctx, const Rotary& args);
}  // namespace cuda

}  // namespace lrnn
