// More layers than one launch takes: the same bits as from a call for each of the launches.
#include "lrnn/ops/mamba_stack.hpp"

#include <cmath>

#include <gtest/gtest.h>

#include "lrnn/core/random.hpp"

namespace lrnn {
namespace {

constexpr std::int64_t kInputs = 256;
constexpr std::int64_t kChannels = 512;
constexpr std::int64_t kStates = 16;
constexpr std::int64_t kRank = 16;
constexpr std::int64_t kWidth = 4;

/// A stack with its states and the row that enters it, always of the same numbers.
class Stack {
 public:
  Stack(Context& ctx, DType dtype, std::size_t layers, std::int64_t batch)
      : ctx_(ctx), dtype_(dtype), batch_(batch) {
    for (std::size_t i = 0; i < layers; ++i) add_layer();
    x_ = uniform({batch, kInputs}, 1, dtype);
    residual_ = uniform({batch, kInputs}, 1, DType::float32);
  }

  /// Takes the row through layers [first, last), as it is left by those before.
  void step(std::size_t first, std::size_t last) {
    Tensor y = ctx_.empty(x_.shape(), dtype_);
    Tensor residual = ctx_.empty(residual_.shape(), DType::float32);
    mamba_stack_step(ctx_, {.layers = std::span(layers_).subspan(first, last - first),
                            .x = x_,
                            .residual = residual_,
                            .y = y,
                            .residual_out = residual});
    x_ = std::move(y);
    residual_ = std::move(residual);
  }
  /// Outputs and all states, one behind the other.
  std::vector<double> result() {
    std::vector<double> all = ctx_.to_host_as_double(x_);
    const auto append = [&](TensorView t) {
      const std::vector<double> values = ctx_.to_host_as_double(t);
      all.insert(all.end(), values.begin(), values.end());
    };
    append(residual_);
    for (const MambaStackLayer& layer : layers_) {
      append(layer.conv_state);
      append(layer.lrnn_state);
    }
    return all;
  }

 private:
  Tensor uniform(const Shape& shape, double bound, DType dtype, double middle = 0) {
    std::vector<double> values(static_cast<std::size_t>(shape.numel()));
    for (double& v : values) v = middle + rng_.uniform(-bound, bound);
    return ctx_.from_host_as(shape, dtype, values);
  }
  MutableTensorView keep(Tensor tensor) {
    tensors_.push_back(std::move(tensor));
    return tensors_.back().view();
  }
  MutableTensorView weight(const Shape& shape, std::int64_t fan_in) {
    return keep(uniform(shape, std::sqrt(3.0 / static_cast<double>(fan_in)), dtype_));
  }
  MutableTensorView island(const Shape& shape, double low, double high) {
    return keep(uniform(shape, (high - low) / 2, DType::float32, (high + low) / 2));
  }
  void add_layer() {
    layers_.push_back({.norm_weight = island({kInputs}, 0.5, 1.5),
                       .in_proj = weight({2 * kChannels, kInputs}, kInputs),
                       .conv_weight = weight({kChannels, kWidth}, kWidth),
                       .conv_bias = weight({kChannels}, kWidth),
                       .x_proj = weight({kRank + 2 * kStates, kChannels}, kChannels),
                       .dt_weight = weight({kChannels, kRank}, kRank),
                       .dt_bias = island({kChannels}, -4, -1),
                       .A_log = island({kChannels, kStates}, 0, 2),
                       .D = island({kChannels}, 0.5, 1.5),
                       .out_proj = weight({kInputs, kChannels}, kChannels),
                       .conv_state = island({batch_, kChannels, kWidth}, -1, 1),
                       .lrnn_state = island({batch_, kChannels, kStates}, -1, 1)});
  }

  Context& ctx_;
  DType dtype_;
  std::int64_t batch_;
  Rng rng_{7, "mamba_stack"};
  std::vector<Tensor> tensors_;
  std::vector<MambaStackLayer> layers_;
  Tensor x_, residual_;
};

void expect_launches_chain(Context& ctx, DType dtype, std::int64_t batch) {
  SCOPED_TRACE(batch);
  constexpr std::size_t kLayers = 65;
  Stack at_once(ctx, dtype, kLayers, batch);
  at_once.step(0, kLayers);
  Stack in_two(ctx, dtype, kLayers, batch);
  in_two.step(0, kLayers / 2);
  in_two.step(kLayers / 2, kLayers);
  EXPECT_EQ(at_once.result(), in_two.result());
}

TEST(MambaStack, LaunchesChainOnCpu) {
  Context ctx = Context::cpu();
  expect_launches_chain(ctx, DType::float32, 1);
}

// One and two sequences, and three to sixteen, have kernels of their own.
TEST(MambaStack, LaunchesChainOnCuda) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  Context ctx = Context::cuda();
  for (const std::int64_t batch : {1, 2, 9}) expect_launches_chain(ctx, DType::bfloat16, batch);
}

}  // namespace
}  // namespace lrnn
