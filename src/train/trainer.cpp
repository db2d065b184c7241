#include "lrnn/train/trainer.hpp"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <numbers>

#include "lrnn/core/graph.hpp"
#include "lrnn/train/checkpoint.hpp"

namespace lrnn {
namespace {

// Tokens that wait on the device for their steps.
constexpr std::int64_t kMaxWindowTokens = std::int64_t{1} << 24;

void check_positive(const char* field, std::int64_t got) {
  LRNN_CHECK(got > 0, ConfigError, "TrainerConfig.", field, ": expected > 0, got ", got);
}
void check_not_negative(const char* field, std::int64_t got) {
  LRNN_CHECK(got >= 0, ConfigError, "TrainerConfig.", field, ": expected >= 0, got ", got);
}

TrainerConfig resolved(TrainerConfig c) {
  check_not_negative("steps", c.steps);
  check_positive("batch_size", c.batch_size);
  check_positive("seqlen", c.seqlen);
  check_positive("accumulation", c.accumulation);
  check_positive("log_every", c.log_every);
  check_not_negative("eval_every", c.eval_every);
  check_not_negative("eval_sequences", c.eval_sequences);
  check_not_negative("checkpoint_every", c.checkpoint_every);
  check_not_negative("keep_checkpoints", c.keep_checkpoints);
  LRNN_CHECK(c.checkpoint_every == 0 || !c.checkpoint_directory.empty(), ConfigError,
             "TrainerConfig.checkpoint_directory: expected with checkpoint_every");
  if (c.schedule.total_steps == 0) c.schedule.total_steps = c.steps;
  c.schedule.validate();
  c.adamw.lr = c.schedule.lr;
  return c;
}

/// One line of JSON.
class Record {
 public:
  explicit Record(const char* event) : text_(detail::concat(R"({"event":")", event, '"')) {}
  Record& add(const char* name, double value) {
    std::array<char, 32> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
    // JSON has no NaN and no infinity.
    return add_raw(name, std::isfinite(value) ? std::string(digits.data(), end) : "null");
  }
  Record& add(const char* name, std::int64_t value) { return add_raw(name, std::to_string(value)); }
  Record& add(const char* name, const std::string& value) { return add_raw(name, quoted(value)); }
  [[nodiscard]] std::string text() const { return text_ + '}'; }

 private:
  Record& add_raw(const char* name, const std::string& value) {
    text_ += detail::concat(",\"", name, "\":", value);
    return *this;
  }
  static std::string quoted(const std::string& value) {
    std::string out = "\"";
    for (const char c : value) {
      if (c == '"' || c == '\\') out += '\\';
      out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return out + '"';
  }

  std::string text_;
};

std::int64_t distance_to_multiple(std::int64_t step, std::int64_t every) {
  return every - step % every;
}

bool is_due(std::int64_t step, std::int64_t every) {
  return every > 0 && step % every == 0;
}

double scalar_of(Context& ctx, const TensorView& t) {
  return ctx.to_host_as_double(t).front();
}

}  // namespace

/// The work of some consecutive steps, on the device. A pass has `batch` rows of inputs, then as
/// many of targets.
struct Trainer::Window {
  std::int64_t steps;
  Tensor tokens;  // [steps * accumulation * 2 * B, L] int32
  Tensor lr;      // [steps]
  Tensor losses;  // [steps * accumulation]
};

/// One forward and backward pass, recorded after its first run where that is possible. Its memory
/// is a pool of its own: the first run leaves exactly the blocks there that the recording needs,
/// they keep their addresses, and nobody else can be handed one while the graph is alive.
class Trainer::Pass {
 public:
  Pass(Context& ctx, const TrainingModel& model, const TrainerConfig& config, DType loss_dtype)
      : ctx_(ctx),
        model_(model),
        batch_size_(config.batch_size),
        recorded_(config.cuda_graph && model.recordable),
        pool_(std::make_unique<StatisticsResource>(ctx.memory())),
        tokens_(ctx.empty({2 * config.batch_size, config.seqlen}, DType::int32)),
        loss_(ctx.empty({}, loss_dtype)) {}

  /// Accumulates gradients; `loss` is written when the pass is through.
  void run(TensorView tokens, MutableTensorView loss) {
    ctx_.copy(tokens_, tokens);
    if (!recorded_ || !warm_) {
      enqueue();
      warm_ = true;
    } else {
      if (!graph_) record();
      graph_->launch();
    }
    ctx_.copy(loss, loss_);
  }

  /// Work between passes may use the same memory.
  [[nodiscard]] MemoryResource& pool() noexcept { return pool_; }

 private:
  void enqueue() {
    const Context::MemoryScope scope(ctx_, pool_);
    const TensorView tokens = tokens_;
    const Tensor loss = model_.loss_and_backward(ctx_, tokens.slice(0, 0, batch_size_),
                                                 tokens.slice(0, batch_size_, batch_size_));
    ctx_.copy(loss_, loss);
  }
  void record() {
    graph_ = std::make_unique<Graph>(Graph::capture(ctx_, [this] { enqueue(); }));
  }

  Context& ctx_;
  const TrainingModel& model_;
  std::int64_t batch_size_;
  bool recorded_;
  bool warm_ = false;
  CachingResource pool_;
  Tensor tokens_;  // [2 B, L] inputs, then targets
  Tensor loss_;    // []
  std::unique_ptr<Graph> graph_;
};

Trainer::~Trainer() = default;

Trainer::Trainer(Context& ctx, TrainingModel model, const TextData& data, TrainerConfig config,
                 TrainerCallbacks callbacks)
    : ctx_(&ctx),
      model_(std::move(model)),
      data_(&data),
      config_(resolved(std::move(config))),
      callbacks_(std::move(callbacks)),
      optimizer_(ctx, *model_.parameters, config_.adamw) {
  LRNN_CHECK(data.max_token() < model_.vocab_size, InvalidArgument, "Trainer: token ",
             data.max_token(), " does not fit a vocabulary of ", model_.vocab_size);
  LRNN_CHECK(data.train_size() > config_.seqlen, InvalidArgument, "Trainer: ", data.train_size(),
             " tokens to train on, expected at least ", config_.seqlen + 1);
  LRNN_CHECK(config_.eval_every == 0 || data.held_out_size() > 1, InvalidArgument,
             "Trainer: eval_every without held-out text");
  pass_ = std::make_unique<Pass>(ctx, model_, config_, optimizer_.lr().dtype());
  if (!config_.checkpoint_directory.empty()) resume();
}

std::map<std::string, std::string> Trainer::settings() const {
  const auto number = [](auto v) { return detail::concat(v); };
  return {{"batch_size", number(config_.batch_size)},
          {"seqlen", number(config_.seqlen)},
          {"accumulation", number(config_.accumulation)},
          {"seed", number(config_.seed)},
          {"train_tokens", number(data_->train_size())},
          {"lr", number(config_.schedule.lr)},
          {"schedule", name_of(config_.schedule.kind)},
          {"warmup_steps", number(config_.schedule.warmup_steps)},
          {"total_steps", number(config_.schedule.total_steps)},
          {"decay_steps", number(config_.schedule.decay_steps)},
          {"final_fraction", number(config_.schedule.final_fraction)},
          {"beta1", number(config_.adamw.beta1)},
          {"beta2", number(config_.adamw.beta2)},
          {"eps", number(config_.adamw.eps)},
          {"weight_decay", number(config_.adamw.weight_decay)},
          {"max_grad_norm", number(config_.adamw.max_grad_norm)}};
}

void Trainer::resume() {
  const CheckpointSearch search = find_checkpoint(config_.checkpoint_directory);
  if (!config_.resume) {
    LRNN_CHECK(!search.found && search.rejected.empty(), ConfigError,
               "TrainerConfig.checkpoint_directory: ", config_.checkpoint_directory.string(),
               " holds checkpoints of another run");
    return;
  }
  for (const std::string& reason : search.rejected)
    record(Record("rejected").add("reason", reason).text());
  if (!search.found) return;
  load_checkpoint(*ctx_, search.found->path, *model_.parameters, optimizer_);
  step_ = search.found->step;
  record(Record("resume").add("step", step_).add("path", search.found->path.string()).text());
  for (const auto& [name, value] : settings()) {
    const auto saved = search.found->settings.find(name);
    if (saved == search.found->settings.end() || saved->second == value) continue;
    record(Record("settings")
               .add("name", name)
               .add("checkpoint", saved->second)
               .add("run", value)
               .text());
  }
}

std::filesystem::path Trainer::save() {
  LRNN_CHECK(!config_.checkpoint_directory.empty(), ConfigError,
             "TrainerConfig.checkpoint_directory: expected for a checkpoint");
  auto path = save_checkpoint(*ctx_,
                              {.directory = config_.checkpoint_directory,
                               .step = step_,
                               .settings = settings(),
                               .files = model_.files,
                               .keep = config_.keep_checkpoints},
                              *model_.parameters, optimizer_);
  record(Record("checkpoint").add("step", step_).add("path", path.string()).text());
  return path;
}

std::int64_t Trainer::steps_to_boundary(std::int64_t until) const {
  std::int64_t steps = std::min(until - step_, distance_to_multiple(step_, config_.log_every));
  if (config_.eval_every > 0)
    steps = std::min(steps, distance_to_multiple(step_, config_.eval_every));
  if (config_.checkpoint_every > 0)
    steps = std::min(steps, distance_to_multiple(step_, config_.checkpoint_every));
  const std::int64_t step_tokens = config_.accumulation * config_.batch_size * config_.seqlen;
  return std::min(steps, std::max<std::int64_t>(1, kMaxWindowTokens / step_tokens));
}

Trainer::Window Trainer::upload(std::int64_t steps) {
  const std::int64_t passes = steps * config_.accumulation;
  const std::int64_t pass = config_.batch_size * config_.seqlen;
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(2 * passes * pass));
  for (std::int64_t i = 0; i < passes; ++i) {
    const auto both = std::span(tokens).subspan(static_cast<std::size_t>(2 * i * pass),
                                                static_cast<std::size_t>(2 * pass));
    const std::int64_t first = (step_ * config_.accumulation + i) * config_.batch_size;
    data_->fill_train(
        config_.seed, first, config_.seqlen,
        {both.first(static_cast<std::size_t>(pass)), both.last(static_cast<std::size_t>(pass))});
  }
  std::vector<double> lr;
  for (std::int64_t i = 0; i < steps; ++i) lr.push_back(config_.schedule.at(step_ + i));
  const DType dtype = optimizer_.lr().dtype();
  return {steps,
          ctx_->from_host<std::int32_t>({2 * passes * config_.batch_size, config_.seqlen},
                                        std::span<const std::int32_t>(tokens)),
          ctx_->from_host_as({steps}, dtype, lr), ctx_->empty({passes}, dtype)};
}

void Trainer::train_step(Window& window, std::int64_t index) {
  model_.parameters->zero_grad(*ctx_);
  for (std::int64_t k = 0; k < config_.accumulation; ++k) {
    const std::int64_t pass = index * config_.accumulation + k;
    const std::int64_t rows = 2 * config_.batch_size;
    pass_->run(TensorView(window.tokens).slice(0, pass * rows, rows),
               window.losses.view().slice(0, pass, 1).reshape({}));
  }
  ctx_->copy(optimizer_.lr(), TensorView(window.lr).slice(0, index, 1).reshape({}));
  optimizer_.step(*ctx_, 1.0 / static_cast<double>(config_.accumulation));
}

void Trainer::finish(const Window& window, double seconds) {
  step_ += window.steps;
  seconds_ += seconds;
  const std::int64_t passes = window.steps * config_.accumulation;
  tokens_ += passes * config_.batch_size * config_.seqlen;
  loss_count_ += passes;
}

void Trainer::report() {
  const double loss = loss_sum_ / static_cast<double>(loss_count_);
  const auto counters = ctx_->to_host<std::int64_t>(optimizer_.counters());
  const std::int64_t step_tokens = config_.accumulation * config_.batch_size * config_.seqlen;
  const TrainingMetrics m{step_,
                          step_ * step_tokens,
                          loss,
                          loss / std::numbers::ln2 / data_->bytes_per_token(),
                          scalar_of(*ctx_, optimizer_.grad_norm()),
                          scalar_of(*ctx_, optimizer_.lr()),
                          static_cast<double>(tokens_) / seconds_,
                          counters[1]};
  loss_sum_ = 0.0;
  loss_count_ = 0;
  seconds_ = 0.0;
  tokens_ = 0;
  if (callbacks_.on_metrics) callbacks_.on_metrics(m);
  record(Record("train")
             .add("step", m.step)
             .add("tokens", m.tokens)
             .add("loss", m.loss)
             .add("bits_per_byte", m.bits_per_byte)
             .add("grad_norm", m.grad_norm)
             .add("lr", m.lr)
             .add("tokens_per_second", m.tokens_per_second)
             .add("skipped_steps", m.skipped_steps)
             .text());
}

void Trainer::run(std::int64_t until) {
  until = std::min(until, config_.steps);
  while (step_ < until) {
    const auto start = std::chrono::steady_clock::now();
    Window window = upload(steps_to_boundary(until));
    for (std::int64_t i = 0; i < window.steps; ++i) train_step(window, i);
    for (const double loss : ctx_->to_host_as_double(window.losses)) loss_sum_ += loss;
    finish(window, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    const bool last = step_ == until;
    const bool reported = is_due(step_, config_.log_every) || last;
    if (reported) report();
    if (is_due(step_, config_.eval_every)) static_cast<void>(evaluate());
    const bool stop = reported && callbacks_.should_stop && callbacks_.should_stop();
    const bool finished = stop || step_ == config_.steps;
    if (is_due(step_, config_.checkpoint_every) || (finished && config_.checkpoint_every > 0))
      static_cast<void>(save());
    if (stop) return;
  }
}

EvaluationMetrics Trainer::evaluate() {
  std::int64_t windows = data_->held_out_windows(config_.seqlen);
  LRNN_CHECK(windows > 0, InvalidArgument, "Trainer: evaluation without held-out text");
  if (config_.eval_sequences > 0) windows = std::min(windows, config_.eval_sequences);
  double sum = 0.0;
  std::int64_t targets = 0;
  for (std::int64_t first = 0; first < windows; first += config_.batch_size) {
    const std::int64_t rows = std::min(config_.batch_size, windows - first);
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(2 * rows * config_.seqlen));
    const auto half = tokens.size() / 2;
    const std::span all(tokens);
    const std::int64_t count =
        data_->fill_held_out(first, config_.seqlen, {all.first(half), all.last(half)});
    const Tensor both = ctx_->from_host<std::int32_t>({2 * rows, config_.seqlen},
                                                      std::span<const std::int32_t>(tokens));
    const Tensor loss =
        model_.loss(*ctx_, both.view().slice(0, 0, rows), both.view().slice(0, rows, rows));
    sum += static_cast<double>(count) * scalar_of(*ctx_, loss);
    targets += count;
  }
  const double loss = sum / static_cast<double>(targets);
  const EvaluationMetrics m{step_, targets, loss,
                            loss / std::numbers::ln2 / data_->held_out_bytes_per_token()};
  if (callbacks_.on_evaluation) callbacks_.on_evaluation(m);
  record(Record("eval")
             .add("step", m.step)
             .add("tokens", m.tokens)
             .add("loss", m.loss)
             .add("bits_per_byte", m.bits_per_byte)
             .text());
  return m;
}

void Trainer::record(const std::string& text) const {
  if (callbacks_.on_record) callbacks_.on_record(text);
}

}  // namespace lrnn
