/// The training loop: accumulation, schedule, clipping, evaluation, log records, checkpoints.
///
/// Batches and learning rates of all steps up to the next report go to the device at once, and
/// losses stay there until then: between reports the host only enqueues work. What is trained, in
/// which order, is a function of the configuration and the step, so a resumed run gives the same
/// bytes as one that was never interrupted.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lrnn/train/adamw.hpp"
#include "lrnn/train/lr_schedule.hpp"
#include "lrnn/train/text_data.hpp"

namespace lrnn {

class LRNNLMHeadModel;

/// What the trainer needs of a model.
struct TrainingModel {
  ParameterStore* parameters;
  std::int64_t vocab_size;
  /// Mean cross-entropy of [B, L] int32 ids and targets, [] float32 (float64), in nats; gradients
  /// are accumulated. Targets kIgnoreIndex do not count.
  std::function<Tensor(Context&, TensorView input_ids, TensorView targets)> loss_and_backward;
  /// The same without gradients.
  std::function<Tensor(Context&, TensorView input_ids, TensorView targets)> loss;
  /// Text files for checkpoints by name: config.json.
  std::map<std::string, std::string> files = {};
  /// Whether loss_and_backward can be recorded: see Graph.
  bool recordable = false;
};
/// `model` outlives the result. With its checkpoints, from_pretrained() reads the model.
/// recompute_blocks: see ForwardOptions.
[[nodiscard]] TrainingModel training_model(LRNNLMHeadModel& model,
                                           std::int64_t recompute_blocks = 0);

struct TrainerConfig {
  std::int64_t steps = 1000;      ///< optimizer steps in total
  std::int64_t batch_size = 8;    ///< sequences per forward pass
  std::int64_t seqlen = 256;      ///< tokens per sequence
  std::int64_t accumulation = 1;  ///< forward passes per optimizer step
  AdamWConfig adamw = {};         ///< lr is not used: the schedule's is
  LrSchedule schedule = {};       ///< total_steps 0: steps
  std::uint64_t seed = 0;         ///< of the order of the data
  std::int64_t log_every = 10;
  std::int64_t eval_every = 0;        ///< 0: never
  std::int64_t eval_sequences = 0;    ///< of the held-out text; 0: all
  std::int64_t checkpoint_every = 0;  ///< 0: never
  std::int64_t keep_checkpoints = 2;  ///< 0: all
  std::filesystem::path checkpoint_directory = {};
  bool resume = true;  ///< from the newest intact checkpoint; false: the directory must hold none
  bool cuda_graph = true;  ///< record one pass and replay it, where the model is recordable
};

struct TrainingMetrics {
  std::int64_t step;    ///< steps taken
  std::int64_t tokens;  ///< trained on since step 0
  double loss;          ///< nats per token, mean since the last report
  double bits_per_byte;
  double grad_norm;  ///< of the last step, before clipping
  double lr;         ///< of the last step
  double tokens_per_second;
  std::int64_t skipped_steps;  ///< with a gradient that was not finite, since step 0
};

struct EvaluationMetrics {
  std::int64_t step;
  std::int64_t tokens;  ///< targets
  double loss;          ///< nats per token
  double bits_per_byte;
};

/// All optional, called between steps on the thread of run().
struct TrainerCallbacks {
  std::function<void(const TrainingMetrics&)> on_metrics = {};
  std::function<void(const EvaluationMetrics&)> on_evaluation = {};
  /// Receives every record as one line of JSON without a newline; its "event" is resume, rejected,
  /// settings, train, eval or checkpoint.
  std::function<void(const std::string& record)> on_record = {};
  std::function<bool()> should_stop = {};  ///< asked after every report
};

class Trainer {
 public:
  /// Resumes where there is a checkpoint. Model and data outlive the trainer.
  /// @throws ConfigError naming the field; InvalidArgument if the data do not fit the model
  Trainer(Context& ctx, TrainingModel model, const TextData& data, TrainerConfig config,
          TrainerCallbacks callbacks = {});

  /// Trains until `until` steps (at most those of the configuration) are taken, or until a callback
  /// stops it.
  void run(std::int64_t until);
  void run() { run(config_.steps); }

  /// Mean loss over the held-out text. @throws InvalidArgument if there is none
  EvaluationMetrics evaluate();
  /// @throws ConfigError without a checkpoint directory
  std::filesystem::path save();

  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  [[nodiscard]] std::int64_t step() const noexcept { return step_; }
  [[nodiscard]] AdamW& optimizer() noexcept { return optimizer_; }
  [[nodiscard]] const TrainerConfig& config() const noexcept { return config_; }

 private:
  struct Window;
  class Pass;
  [[nodiscard]] std::int64_t steps_to_boundary(std::int64_t until) const;
  [[nodiscard]] Window upload(std::int64_t steps);
  void train_step(Window& window, std::int64_t index);
  void finish(const Window& window, double seconds);
  void report();
  void resume();
  void record(const std::string& text) const;
  [[nodiscard]] std::map<std::string, std::string> settings() const;

  Context* ctx_;
  TrainingModel model_;
  const TextData* data_;
  TrainerConfig config_;
  TrainerCallbacks callbacks_;
  AdamW optimizer_;
  std::unique_ptr<Pass> pass_;
  std::int64_t step_ = 0;
  // Since the last report.
  double loss_sum_ = 0.0;
  std::int64_t loss_count_ = 0;
  double seconds_ = 0.0;
  std::int64_t tokens_ = 0;
};

}  // namespace lrnn
