/// `lrnn train`: a language model on text files, of bytes or of the tokens of a tokenizer.json.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fmt/format.h>
#include <fstream>
#include <memory>
#include <unistd.h>

#include "lrnn/io/file.hpp"
#include "lrnn/lrnn.hpp"
#include "lrnn/train/text_data.hpp"

#include "command.hpp"

namespace lrnn::tools {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> data;
  std::string out;
  std::string config_file;
  std::string tokenizer_file;
  std::vector<std::string> mixers = {"Mamba", "LRU", "attn", "Mamba"};
  std::int64_t d_model = 256;
  std::int64_t d_state = 16;
  std::int64_t d_intermediate = 0;
  std::string device = "auto";
  std::string dtype = "float32";
  bool allow_tf32 = false;
  std::int64_t recompute_blocks = 0;
  std::string schedule = "constant";
  double held_out = 0.05;
  double max_seconds = 0.0;
  std::string log;
  bool resume = false;
  std::uint64_t seed = 0;
  TrainerConfig trainer = {.adamw = {}, .schedule = {.lr = 1e-3}};
};

std::string read_text(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  LRNN_CHECK(in, IoError, file, ": cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}

// The file that says how text becomes tokens; empty if they are bytes. That of a run that goes on
// is in its directory.
fs::path tokenizer_path(const Options& o) {
  const fs::path saved = fs::path(o.out) / kTokenizerFile;
  if (o.tokenizer_file.empty()) {
    LRNN_CHECK(o.resume || !fs::exists(saved), ConfigError, "--tokenizer: expected, since ",
               saved.string(), " exists and is not bytes");
    return fs::exists(saved) ? saved : fs::path();
  }
  const bool same = !o.resume || (fs::exists(saved) && read_tokenizer_text(saved) ==
                                                           read_tokenizer_text(o.tokenizer_file));
  LRNN_CHECK(same, ConfigError, "--tokenizer: expected that of the run to be resumed, got ",
             o.tokenizer_file);
  return o.tokenizer_file;
}

LRNNLMHeadConfig model_config(const Options& o, const Tokenizer& tokenizer) {
  if (!o.config_file.empty()) {
    LRNNLMHeadConfig config = config_from_json(read_text(o.config_file));
    config.dtype = parse_dtype(o.dtype);
    return config;
  }
  std::vector<MixerType> types;
  for (const std::string& name : o.mixers) types.push_back(mixer_type(name));
  return {.d_model = o.d_model,
          .d_state = o.d_state,
          .n_layer = static_cast<std::int64_t>(types.size()),
          .vocab_size = tokenizer.vocab_size(),
          .mixer_types = std::move(types),
          .d_intermediate = o.d_intermediate,
          .dtype = parse_dtype(o.dtype)};
}

/// One line that is rewritten on a terminal and printed whole elsewhere.
class Progress {
 public:
  explicit Progress(const Options& options) : options_(options) {}

  void show(const TrainingMetrics& m) {
    const double seconds = elapsed();
    const double done = options_.max_seconds > 0 ? seconds / options_.max_seconds
                                                 : static_cast<double>(m.step) /
                                                       static_cast<double>(options_.trainer.steps);
    const double left = done > 0 ? std::max(0.0, seconds / done - seconds) : 0.0;
    const std::string line = fmt::format(
        "step {:>6}  loss {:.4f}  bits/byte {:.4f}  |g| {:.2f}  lr {:.2e}  {:>8.0f} tokens/s  "
        "ETA {:.0f} s",
        m.step, m.loss, m.bits_per_byte, m.grad_norm, m.lr, m.tokens_per_second, left);
    if (terminal_)
      fmt::print(stderr, "\r\033[K{}", line);
    else
      fmt::print(stderr, "{}\n", line);
    std::fflush(stderr);
  }
  void finish() const {
    if (terminal_) fmt::print(stderr, "\n");
  }
  [[nodiscard]] double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const Options& options_;
  bool terminal_ = isatty(fileno(stderr)) == 1;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

volatile std::sig_atomic_t interrupted = 0;

// The first Ctrl-C (or SIGTERM) asks for an end after the step in progress; another one ends at
// once.
extern "C" void request_stop(int signal) {
  interrupted = 1;
  std::signal(signal, SIG_DFL);
}

int train(Options o) {
  const fs::path out = o.out;
  LRNN_CHECK(o.resume || !fs::exists(out / "config.json"), ConfigError, "--out: ", o.out,
             " holds a model already; choose another directory or pass --resume");
  Context ctx = make_context(o.device);
  ctx.set_allow_tf32(o.allow_tf32);
  const fs::path tokenizer_file = tokenizer_path(o);
  const std::string tokenizer_text =
      tokenizer_file.empty() ? "" : read_tokenizer_text(tokenizer_file);
  const Tokenizer tokenizer = tokenizer_file.empty()
                                  ? Tokenizer()
                                  : Tokenizer::from_json(tokenizer_text, tokenizer_file.string());
  const TextData data = TextData::from_files({o.data.begin(), o.data.end()}, tokenizer, o.held_out);
  LRNNLMHeadModel model(ctx, model_config(o, tokenizer), {.seed = o.seed});
  LRNN_CHECK(data.max_token() < model.config().vocab_size, ConfigError,
             "vocab_size: expected more than ", data.max_token(), ", the greatest token, got ",
             model.config().vocab_size);
  fmt::print(stderr, "{} parameters, {} {} to train on, {} held out\n", model.parameters().numel(),
             data.train_size(), tokenizer.is_bytes() ? "bytes" : "tokens", data.held_out_size());

  fs::create_directories(out);
  if (!tokenizer.is_bytes()) write_text_file(out / kTokenizerFile, tokenizer_text);
  std::ofstream log;
  if (!o.log.empty()) {
    log.open(o.log, std::ios::app);
    LRNN_CHECK(log, IoError, o.log, ": cannot be written");
  }
  o.trainer.schedule.kind = lr_schedule_kind(o.schedule);
  o.trainer.schedule.total_steps = o.trainer.steps;
  o.trainer.seed = o.seed;
  o.trainer.resume = o.resume;
  if (o.trainer.checkpoint_every > 0 || o.resume)
    o.trainer.checkpoint_directory = out / "checkpoints";
  Progress progress(o);
  TrainerCallbacks callbacks;
  callbacks.on_metrics = [&](const TrainingMetrics& m) { progress.show(m); };
  callbacks.on_evaluation = [](const EvaluationMetrics& m) {
    fmt::print(stderr, "\nheld out after step {}: loss {:.4f}, {:.4f} bits per byte\n", m.step,
               m.loss, m.bits_per_byte);
  };
  callbacks.on_record = [&](const std::string& record) {
    if (log.is_open()) log << record << '\n' << std::flush;
  };
  callbacks.should_stop = [&] {
    return interrupted != 0 || (o.max_seconds > 0 && progress.elapsed() >= o.max_seconds);
  };
  TrainingModel training = training_model(model, o.recompute_blocks);
  if (!tokenizer.is_bytes()) training.files.emplace(kTokenizerFile, tokenizer_text);
  Trainer trainer(ctx, std::move(training), data, o.trainer, callbacks);
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  trainer.run();
  progress.finish();
  const double seconds = progress.elapsed();
  if (!o.trainer.checkpoint_directory.empty()) static_cast<void>(trainer.save());
  model.save_pretrained(ctx, out);
  if (interrupted != 0) {
    fmt::print(stderr, "stopped after step {}; the model is saved in {}\n", trainer.step(), o.out);
    return 0;
  }
  if (data.held_out_size() > 1) {
    const EvaluationMetrics m = trainer.evaluate();
    fmt::print("trained {} steps in {:.1f} s; held-out loss {:.4f}, {:.4f} bits per byte\n",
               trainer.step(), seconds, m.loss, m.bits_per_byte);
  }
  return 0;
}

}  // namespace

void add_train(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("train", "train a model on text files");
  auto o = std::make_shared<Options>();
  c->set_config("--options", "", "read options from a TOML file");
  c->add_option("--data", o->data, "text files")->required();
  c->add_option("--out", o->out, "directory of the trained model")->required();
  c->add_option("--config", o->config_file, "config.json of the model, in place of the sizes");
  c->add_option("--tokenizer", o->tokenizer_file, "tokenizer.json; default: every byte is a token");
  c->add_option("--mixers", o->mixers, "one mixer type per layer")->delimiter(',');
  c->add_option("--d-model", o->d_model);
  c->add_option("--d-state", o->d_state);
  c->add_option("--d-intermediate", o->d_intermediate, "width of the MLP; 0: none");
  c->add_option("--device", o->device, "auto, cpu, cuda or cuda:N");
  c->add_option("--dtype", o->dtype, "float32, bfloat16 (CUDA) or float64 (CPU)");
  c->add_flag("--tf32", o->allow_tf32, "allow TF32 in float32 products on CUDA");
  c->add_option("--recompute-blocks", o->recompute_blocks,
                "run the first n blocks forward again in the backward pass, to save their memory");
  c->add_option("--steps", o->trainer.steps);
  c->add_option("--max-seconds", o->max_seconds, "stop training after this time; 0: no limit");
  c->add_option("--batch", o->trainer.batch_size, "sequences per pass");
  c->add_option("--seqlen", o->trainer.seqlen);
  c->add_option("--accumulation", o->trainer.accumulation, "passes per step");
  c->add_option("--lr", o->trainer.schedule.lr);
  c->add_option("--warmup", o->trainer.schedule.warmup_steps);
  c->add_option("--schedule", o->schedule, "constant, linear, cosine or wsd");
  c->add_option("--decay-steps", o->trainer.schedule.decay_steps, "of wsd");
  c->add_option("--weight-decay", o->trainer.adamw.weight_decay);
  c->add_option("--max-grad-norm", o->trainer.adamw.max_grad_norm);
  c->add_option("--held-out", o->held_out, "share of every file kept for evaluation");
  c->add_option("--log", o->log, "append one line of JSON per record to this file");
  c->add_option("--log-every", o->trainer.log_every);
  c->add_option("--eval-every", o->trainer.eval_every);
  c->add_option("--checkpoint-every", o->trainer.checkpoint_every);
  c->add_flag("--resume", o->resume, "continue from the newest checkpoint in --out");
  c->add_option("--seed", o->seed);
  c->callback([&run, o] { run = [o] { return train(*o); }; });
}

}  // namespace lrnn::tools
