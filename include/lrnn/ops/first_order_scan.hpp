/// The gated linear recurrence with multipliers that are given, one state per channel.
///
///   h_t = a_t h_{t-1} + b_t,   a_t itself or its logarithm given (HGRN and its kin: log a_t <= 0)
///
/// Backward, with g_t = dh_t + a_{t+1} g_{t+1}:
///   db_t = g_t,   da_t = g_t h_{t-1},   dlog_a_t = a_t g_t h_{t-1}
/// where h_{t-1} is what forward stored, so nothing else is saved.
///
/// Papers: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length",
/// arXiv:1709.04057; Qin et al., "Hierarchically Gated Recurrent Neural Network", arXiv:2311.04823.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

/// What all passes read. Rows may be column slices of wider tensors. Of a and log_a exactly one is
/// present.
struct FirstOrderScanInputs {
  TensorView a = {};         ///< [B, L, D], dtype of b
  TensorView log_a = {};     ///< [B, L, D], float32 (float64)
  TensorView b;              ///< [B, L, D]
  TensorView lengths = {};   ///< [B] int32
  TensorView state_in = {};  ///< [B, D], float32 (float64); absent: 0
};

struct FirstOrderScanForward {
  FirstOrderScanInputs in;
  MutableTensorView h;               ///< [B, L, D], dtype of b; zero at padding
  MutableTensorView state_out = {};  ///< [B, D], float32 (float64); may be in.state_in
};

struct FirstOrderScanBackward {
  FirstOrderScanInputs in;           ///< b is not read
  TensorView h;                      ///< [B, L, D], of forward
  TensorView dh;                     ///< [B, L, D]; ignored at padding
  TensorView dstate_out = {};        ///< [B, D], float32 (float64); absent: 0
  MutableTensorView da = {};         ///< [B, L, D], overwritten; present if in.a is
  MutableTensorView dlog_a = {};     ///< [B, L, D], overwritten; present if in.log_a is
  MutableTensorView db;              ///< [B, L, D], overwritten
  MutableTensorView dstate_in = {};  ///< [B, D], float32 (float64), overwritten
};

/// One token: first_order_scan_forward with L = 1 and the state in place.
struct FirstOrderScanStep {
  FirstOrderScanInputs in;  ///< state_in and lengths absent
  MutableTensorView h;      ///< [B, 1, D]
  MutableTensorView state;  ///< [B, D], updated in place
};

/// @throws ShapeError, DTypeError, DeviceError, InvalidArgument
void first_order_scan_forward(Context& ctx, const FirstOrderScanForward& args);
void first_order_scan_backward(Context& ctx, const FirstOrderScanBackward& args);
void first_order_scan_step(Context& ctx, const FirstOrderScanStep& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void first_order_scan_forward(Context& ctx, const FirstOrderScanForward& args);
void first_order_scan_backward(Context& ctx, const FirstOrderScanBackward& args);
}  // namespace cpu
namespace cuda {
void first_order_scan_forward(Context& ctx, const FirstOrderScanForward& args);
void first_order_scan_backward(Context& ctx, const FirstOrderScanBackward& args);
}  // namespace cuda

}  // namespace lrnn
