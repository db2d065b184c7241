/// AdamW over all parameters of a model.
///
/// With g the gradients times grad_scale, clipped to the global norm max_grad_norm, and t the
/// number of applied steps:
///   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
///   w = w - lr lr_scale (weight_decay w + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))
/// lr_scale and whether a parameter decays are its ParameterOptions. bfloat16 parameters have
/// float32 masters; moments are float32 (float64 in a float64 model).
///
/// A step whose gradient norm is infinite or NaN changes nothing: it is counted as skipped, on the
/// device. Nothing here waits for the device, and step() can be recorded in a Graph.
/// Paper: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
#pragma once

#include <string>
#include <vector>

#include "lrnn/nn/parameter.hpp"

namespace lrnn {

struct AdamWConfig {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double max_grad_norm = 1.0;  ///< 0: no clipping
};

class AdamW {
 public:
  /// Allocates gradients, where the parameters have none yet, and the optimizer state. The
  /// parameters outlive the optimizer.
  /// @throws ConfigError naming the field
  AdamW(Context& ctx, ParameterStore& parameters, const AdamWConfig& config);

  /// Updates all values from their gradients, which are not cleared. `grad_scale` turns a sum of
  /// gradients into a mean.
  void step(Context& ctx, double grad_scale = 1.0);

  /// Learning rate of the following steps. Called outside a Graph.
  void set_lr(Context& ctx, double lr);
  /// The same in device memory: [], float32 (float64).
  [[nodiscard]] MutableTensorView lr() noexcept { return lr_; }

  /// Of the last step, after grad_scale and before clipping: [], float32 (float64).
  [[nodiscard]] TensorView grad_norm() const noexcept { return grad_norm_; }
  /// [2] int64: steps applied, steps skipped.
  [[nodiscard]] MutableTensorView counters() noexcept { return counters_; }

  /// Forgets all steps and takes the masters from the values: after values were loaded.
  void reset(Context& ctx);

  struct State {
    std::string name;  ///< "masters.", "m." or "v." and the name of the parameter
    MutableTensorView tensor;
  };
  /// Everything that a checkpoint needs beside the values, the counters and the learning rate.
  [[nodiscard]] std::vector<State> state();

  [[nodiscard]] const AdamWConfig& config() const noexcept { return config_; }

 private:
  struct Slab {
    Tensor group_options;  // [n / kAdamwGroup] int32
    Tensor masters;        // [n] float32, for bfloat16 values
    Tensor m;              // [n]
    Tensor v;              // [n]
  };
  void build_options(Context& ctx);

  ParameterStore* parameters_;
  AdamWConfig config_;
  std::vector<Slab> slabs_;
  Tensor options_;    // [K, 2] lr_scale, weight_decay
  Tensor lr_;         // []
  Tensor grad_norm_;  // []
  Tensor counters_;   // [2] int64
  Tensor factors_;    // [5]
};

}  // namespace lrnn
