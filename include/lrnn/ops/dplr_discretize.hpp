/// Operands of `dplr_scan` from the parameters of S4: the bilinear discretization of
/// x' = A x + B u with A = diag(Lambda) - sum_r P_r P_r^*,
///
///   (tau - A) x_t = (tau + A) x_{t-1} + 2 B u_t,   tau = 2 / dt
///
/// solved by the Woodbury identity. With E = 1 / (tau - Lambda), <p, q> = 2 Re sum_n conj(p_n) q_n,
/// S_{rs} = [r = s] + <P_r, E P_s> and G = S^-1:
///
///   e = 2 Lambda E,  w_s = sum_r E P_r G_{rs},  k_s = 2 tau conj(E) P_s,
///   b = 2 (E B - sum_s w_s <P_s, E B>).
///
/// The symmetric part of S is at least 1, because Re E > 0, so that S is never singular. Everything
/// is evaluated in double and rounded once. O(heads x N x R^2).
///
/// There are K copies of Lambda, P and B; head h uses copy h mod K. dt belongs to a head or to a
/// state of a head.
/// Paper: arXiv:2111.00396 (S4).
#pragma once

#include "lrnn/ops/discretize.hpp"

namespace lrnn {

inline constexpr std::int64_t kMaxDplrRank = 64;

struct DplrParameters {
  std::int64_t heads;  ///< H
  LaneParameter A_re;  ///< Re Lambda < 0, K N values; float32 (float64)
  LaneParameter A_im;  ///< Im Lambda, K N values
  LaneParameter dt;    ///< > 0, H or H N values
  TensorView P;        ///< [R, K, N, 2] (re, im), R <= kMaxDplrRank
  TensorView B;        ///< [K, N, 2]
};

struct DplrDiscretizeForward {
  DplrParameters parameters;
  MutableTensorView e;           ///< [2, H, N] planes (re, im)
  MutableTensorView e_low = {};  ///< [2, H, N] what rounding took from e; 0 in float64
  MutableTensorView w;           ///< [R, 2, H, N]
  MutableTensorView k;           ///< [R, 2, H, N]
  MutableTensorView b;           ///< [2, H, N]
};

struct DplrDiscretizeBackward {
  DplrParameters parameters;
  TensorView de;                 ///< [2, H, N]
  TensorView dw;                 ///< [R, 2, H, N]
  TensorView dk;                 ///< [R, 2, H, N]
  TensorView db;                 ///< [2, H, N]
  MutableTensorView dA_re = {};  ///< of the parameters, shapes of their views; accumulated into
  MutableTensorView dA_im = {};
  MutableTensorView ddt = {};
  MutableTensorView dP = {};
  MutableTensorView dB = {};
};

/// @throws ShapeError, DTypeError, DeviceError
void dplr_discretize_forward(Context& ctx, const DplrDiscretizeForward& args);
void dplr_discretize_backward(Context& ctx, const DplrDiscretizeBackward& args);

// Backends. Unchecked: call the functions above.
namespace cpu {
void dplr_discretize_forward(Context& ctx, const DplrDiscretizeForward& args);
void dplr_discretize_backward(Context& ctx, const DplrDiscretizeBackward& args);
}  // namespace cpu
namespace cuda {
void dplr_discretize_forward(Context& ctx, const DplrDiscretizeForward& args);
void dplr_discretize_backward(Context& ctx, const DplrDiscretizeBackward& args);
}  // namespace cuda

}  // namespace lrnn
