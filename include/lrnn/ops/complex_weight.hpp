/// The real matrix that stands for a complex one, so that its products run as real GEMMs.
///
///   Drive    W u for real u, as planes:       weight [2, R, C] = [Re W ; Im W]
///   ReadOut  Re(W x) for x given as planes:   weight [R, 2, C] = [Re W | -Im W]
///
/// re and im are separate [R, C] parameters, or the planes [R, C, 1] of interleaved pairs. weight
/// has the dtype of the activations; the parameters and all gradients are float32 (float64).
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

enum class ComplexProduct { Drive, ReadOut };

struct ComplexWeightForward {
  ComplexProduct product;
  TensorView re;             ///< [R, C] or [R, C, 1]
  TensorView im;             ///< shape of re
  MutableTensorView weight;  ///< [2, R, C] or [R, 2, C]
};
struct ComplexWeightBackward {
  ComplexProduct product;
  TensorView dweight;     ///< [2, R, C] or [R, 2, C], float32 (float64)
  MutableTensorView dre;  ///< as re, accumulated into
  MutableTensorView dim;  ///< as im, accumulated into
};

/// @throws ShapeError, DTypeError, DeviceError
void complex_weight_forward(Context& ctx, const ComplexWeightForward& args);
void complex_weight_backward(Context& ctx, const ComplexWeightBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void complex_weight_forward(Context& ctx, const ComplexWeightForward& args);
void complex_weight_backward(Context& ctx, const ComplexWeightBackward& args);
}  // namespace cpu
namespace cuda {
void complex_weight_forward(Context& ctx, const ComplexWeightForward& args);
void complex_weight_backward(Context& ctx, const ComplexWeightBackward& args);
}  // namespace cuda

}  // namespace lrnn
