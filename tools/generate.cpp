/// `lrnn generate`: continues prompts with a byte-level model.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fmt/format.h>
#include <fstream>
#include <memory>
#include <numeric>
#include <sstream>

#include "lrnn/lrnn.hpp"

#include "command.hpp"

namespace lrnn::tools {
namespace {

struct Options {
  std::string model;
  std::string prompt;
  std::string prompt_file;
  std::string prompts_file;
  std::string device = "auto";
  std::string dtype;
  std::vector<std::string> stop;
  bool no_graph = false;
  GenerateOptions generate = {.max_new_tokens = 200, .top_k = 0};
};

using Tokens = std::vector<std::int32_t>;

// Every byte is a token.
Tokens encode(std::string_view text) {
  Tokens ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}
std::string decode(std::span<const std::int32_t> ids) {
  std::string text;
  for (const std::int32_t id : ids) text += static_cast<char>(static_cast<unsigned char>(id));
  return text;
}

std::string read_file(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  LRNN_CHECK(in, IoError, file, ": cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}

// One prompt, or one per line of --prompts.
std::vector<std::string> read_prompts(const Options& o) {
  if (o.prompts_file.empty()) {
    const std::string prompt = o.prompt_file.empty() ? o.prompt : read_file(o.prompt_file);
    LRNN_CHECK(!prompt.empty(), ConfigError, "--prompt: expected at least one byte");
    return {prompt};
  }
  std::vector<std::string> prompts;
  std::istringstream lines(read_file(o.prompts_file));
  for (std::string line; std::getline(lines, line); prompts.push_back(line))
    LRNN_CHECK(!line.empty(), ConfigError, "--prompts: ", o.prompts_file, ": line ",
               prompts.size() + 1, ": expected at least one byte");
  LRNN_CHECK(!prompts.empty(), ConfigError, "--prompts: ", o.prompts_file,
             ": expected at least one line");
  return prompts;
}

LRNNLMHeadModel load_model(Context& ctx, const Options& o) {
  PretrainedOptions options;
  if (!o.dtype.empty())
    options.dtype = parse_dtype(o.dtype);
  else if (ctx.device().is_cpu())
    options.dtype = DType::float32;
  auto model = LRNNLMHeadModel::from_pretrained(ctx, o.model, options);
  LRNN_CHECK(model.config().vocab_size == 256, ConfigError,
             "vocab_size: expected a byte-level model with 256 tokens, got ",
             model.config().vocab_size);
  return model;
}

// Tells apart how fast the prompts were read, up to the first token drawn, and how fast the other
// tokens followed.
class Speed {
 public:
  void drew_a_token() {
    last_ = Clock::now();
    if (first_ == Clock::time_point()) first_ = last_;
  }
  void print(std::int64_t prompt_tokens, std::int64_t later_tokens) const {
    if (first_ == Clock::time_point()) return;
    fmt::print(stderr, "prefill: {}; decode: {}\n", shown(prompt_tokens, first_ - begin_),
               shown(later_tokens, last_ - first_));
  }

 private:
  using Clock = std::chrono::steady_clock;
  static std::string shown(std::int64_t tokens, std::chrono::duration<double> time) {
    if (tokens == 0) return "0 tokens";
    return fmt::format("{} tokens in {:.3f} s, {:.1f} tokens/s", tokens, time.count(),
                       static_cast<double>(tokens) / time.count());
  }

  Clock::time_point begin_ = Clock::now();
  Clock::time_point first_ = {};
  Clock::time_point last_ = {};
};

// Prompts as the rows of a matrix, padded at the right.
struct Batch {
  Batch(Context& ctx, const std::vector<std::string>& prompts) {
    for (const std::string& prompt : prompts) {
      rows.push_back(encode(prompt));
      width = std::max(width, rows.back().size());
    }
    Tokens padded;
    Tokens counts;
    for (const Tokens& row : rows) {
      padded.insert(padded.end(), row.begin(), row.end());
      padded.insert(padded.end(), width - row.size(), 0);
      counts.push_back(static_cast<std::int32_t>(row.size()));
      tokens += static_cast<std::int64_t>(row.size());
      is_padded = is_padded || row.size() < width;
    }
    const auto batch = static_cast<std::int64_t>(rows.size());
    ids = ctx.from_host<std::int32_t>({batch, static_cast<std::int64_t>(width)}, padded);
    lengths = ctx.from_host<std::int32_t>({batch}, counts);
  }

  std::vector<Tokens> rows;
  std::size_t width = 0;
  std::int64_t tokens = 0;
  bool is_padded = false;
  Tensor ids;
  Tensor lengths;
};

// "prompt 2, sample 3": what of it is needed to tell results apart.
std::string title(std::size_t row, std::size_t prompts, std::size_t samples) {
  const std::string prompt = fmt::format("prompt {}", row / samples + 1);
  const std::string sample = fmt::format("sample {}", row % samples + 1);
  if (samples == 1) return prompt;
  return prompts == 1 ? sample : prompt + ", " + sample;
}

void print_results(const Batch& batch, std::span<const std::int32_t> out,
                   std::span<const std::int64_t> counts) {
  const std::size_t samples = counts.size() / batch.rows.size();
  const std::size_t stride = out.size() / counts.size();
  for (std::size_t r = 0; r < counts.size(); ++r) {
    const auto drawn = out.subspan(r * stride + batch.width, static_cast<std::size_t>(counts[r]));
    const std::string text = decode(batch.rows[r / samples]) + decode(drawn) + '\n';
    fmt::print("{}==> {} <==\n", r == 0 ? "" : "\n", title(r, batch.rows.size(), samples));
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
}

// A single result is printed token by token, several ones one after the other at the end.
int run_generate(Options o) {
  const std::vector<std::string> prompts = read_prompts(o);
  Context ctx = make_context(o.device);
  const auto model = load_model(ctx, o);
  const Batch batch(ctx, prompts);
  if (batch.is_padded) o.generate.lengths = batch.lengths;
  o.generate.cuda_graph = !o.no_graph;
  for (const std::string& text : o.stop) o.generate.stop_sequences.push_back(encode(text));
  const bool stream = prompts.size() == 1 && o.generate.num_samples == 1;
  if (stream) std::fwrite(prompts[0].data(), 1, prompts[0].size(), stdout);
  Speed speed;
  o.generate.on_tokens = [&](std::span<const std::int32_t> tokens) {
    speed.drew_a_token();
    if (!stream) return true;
    const std::string text = decode(tokens);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
    return true;
  };
  std::vector<std::int64_t> counts;
  o.generate.generated_lengths = &counts;
  const Tensor out = lrnn::generate(ctx, model, batch.ids, o.generate);
  if (stream)
    std::fputc('\n', stdout);
  else
    print_results(batch, ctx.to_host<std::int32_t>(out), counts);
  const std::int64_t drawn = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  speed.print(batch.tokens, drawn - static_cast<std::int64_t>(counts.size()));
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("generate", "continue prompts");
  auto o = std::make_shared<Options>();
  c->add_option("--model", o->model, "directory of the model")->required();
  auto* const prompt = c->add_option("--prompt", o->prompt);
  auto* const prompt_file = c->add_option("--prompt-file", o->prompt_file)->excludes(prompt);
  c->add_option("--prompts", o->prompts_file, "file with one prompt per line, continued together")
      ->excludes(prompt)
      ->excludes(prompt_file);
  c->add_option("--num-samples", o->generate.num_samples, "continuations of every prompt");
  c->add_option("--max-new-tokens", o->generate.max_new_tokens);
  c->add_option("--temperature", o->generate.temperature, "0: greedy");
  c->add_option("--top-k", o->generate.top_k, "0: no limit");
  c->add_option("--top-p", o->generate.top_p);
  c->add_option("--min-p", o->generate.min_p);
  c->add_option("--repetition-penalty", o->generate.repetition_penalty);
  c->add_option("--stop", o->stop, "end after this text; may be repeated")->allow_extra_args(false);
  c->add_option("--seed", o->generate.seed);
  c->add_option("--device", o->device, "auto, cpu, cuda or cuda:N");
  c->add_option("--dtype", o->dtype, "default: that of the model; float32 on the CPU");
  c->add_flag("--no-graph", o->no_graph, "do not record the step as a CUDA graph");
  c->callback([&run, o] { run = [o] { return run_generate(*o); }; });
}

}  // namespace lrnn::tools
