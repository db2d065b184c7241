/// The smallest language model: logits of the next token are a row of a table. Its loss and its
/// gradient are a few lines of host code, so that the trainer is tested without the models.
#pragma once

#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <unistd.h>
#include <vector>

#include "lrnn/ops/cross_entropy.hpp"
#include "lrnn/train/trainer.hpp"

namespace lrnn::testing {

class BigramModel {
 public:
  BigramModel(Context& ctx, std::int64_t vocab_size, DType dtype = DType::float32)
      : vocab_size_(vocab_size) {
    table_ = &store_.add("table", {vocab_size, vocab_size}, init::normal(0.5));
    store_.add("unused", {3}, init::constant(1.0), {.weight_decay = false});
    store_.materialize(ctx, dtype, 7);
    store_.enable_grad(ctx);
  }

  ParameterStore& parameters() { return store_; }
  TrainingModel training_model() {
    return {
        .parameters = &store_,
        .vocab_size = vocab_size_,
        .loss_and_backward = [this](Context& ctx, TensorView ids,
                                    TensorView targets) { return run(ctx, ids, targets, true); },
        .loss = [this](Context& ctx, TensorView ids,
                       TensorView targets) { return run(ctx, ids, targets, false); },
        .files = {{"config.json", "{\"bigram\": true}\n"}}};
  }
  /// Passes of which the next one has a loss and a gradient that are not numbers.
  int bad_passes = 0;

 private:
  Tensor run(Context& ctx, const TensorView& ids, const TensorView& targets, bool backward) {
    const auto table = ctx.to_host_as_double(table_->value);
    auto grad = ctx.to_host_as_double(table_->grad);
    const auto x = ctx.to_host<std::int32_t>(ids);
    const auto y = ctx.to_host<std::int32_t>(targets);
    const auto v = static_cast<std::size_t>(vocab_size_);
    double count = 0;
    for (const auto t : y) count += t == kIgnoreIndex ? 0 : 1;
    double loss = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (y[i] == kIgnoreIndex) continue;
      const std::size_t row = static_cast<std::size_t>(x[i]) * v;
      double sum = 0;
      for (std::size_t j = 0; j < v; ++j) sum += std::exp(table[row + j]);
      const auto target = static_cast<std::size_t>(y[i]);
      loss += (std::log(sum) - table[row + target]) / count;
      for (std::size_t j = 0; j < v; ++j)
        grad[row + j] += (std::exp(table[row + j]) / sum - (j == target ? 1.0 : 0.0)) / count;
    }
    if (backward && bad_passes > 0) {
      --bad_passes;
      loss = grad[0] = std::nan("");
    }
    if (backward) ctx.write_from_host(table_->grad, grad);
    return ctx.from_host_as({}, table_->grad.dtype(), std::vector<double>{loss});
  }

  std::int64_t vocab_size_;
  ParameterStore store_;
  Parameter* table_;
};

/// A directory that is removed at the end of a test.
class ScratchDirectory {
 public:
  explicit ScratchDirectory(const std::string& name)
      : path_(std::filesystem::temp_directory_path() /
              ("lrnn_test_" + name + '_' + std::to_string(::getpid()))) {
    std::filesystem::remove_all(path_);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Values and optimizer state, in double, which holds every dtype exactly.
inline std::vector<std::vector<double>> everything(Context& ctx, ParameterStore& store,
                                                   AdamW& optimizer) {
  std::vector<std::vector<double>> all;
  for (const Parameter& p : store) all.push_back(ctx.to_host_as_double(p.value));
  for (const auto& s : optimizer.state()) all.push_back(ctx.to_host_as_double(s.tensor));
  all.push_back(ctx.to_host_as_double(optimizer.counters()));
  return all;
}

}  // namespace lrnn::testing
