/// `lrnn generate`: continues prompts.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fmt/format.h>
#include <fstream>
#include <memory>
#include <sstream>

#include "lrnn/lrnn.hpp"

#include "command.hpp"

namespace lrnn::tools {
namespace {

// The token between documents of GPT-2 and GPT-NeoX.
constexpr const char* kEndOfText = "<|endoftext|>";

struct Options {
  std::string model;
  std::string tokenizer_file;
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

std::string read_file(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  LRNN_CHECK(in, IoError, file, ": cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}

void write(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
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
  return LRNNLMHeadModel::from_pretrained(ctx, o.model, options);
}

Tokenizer tokenizer_of(const Options& o, const LRNNLMHeadModel& model) {
  const Tokenizer tokenizer = o.tokenizer_file.empty() ? Tokenizer::of_model(o.model)
                                                       : Tokenizer::from_file(o.tokenizer_file);
  const std::int64_t vocab_size = model.config().vocab_size;
  if (tokenizer.is_bytes())
    LRNN_CHECK(vocab_size == 256, ConfigError,
               "vocab_size: expected 256 of a model of bytes, or a tokenizer.json, got ",
               vocab_size);
  LRNN_CHECK(tokenizer.vocab_size() <= vocab_size, ConfigError,
             "--tokenizer: expected at most the ", vocab_size, " tokens of the model, got ",
             tokenizer.vocab_size());
  return tokenizer;
}

/// The text of one row, up to the end of the first stop text or to the end token.
class Continuation {
 public:
  Continuation(const Tokenizer& tokenizer, const std::vector<std::string>& stop,
               std::optional<std::int32_t> end)
      : vocab_size_(tokenizer.vocab_size()), stream_(tokenizer), stop_(&stop), end_(end) {}

  /// The text that has become certain with this token; none once the row has ended.
  std::string push(std::int32_t token) {
    if (ended_) return {};
    ++count_;
    ended_ = token == end_;
    // The rows of an embedding may be more than the tokens.
    return token >= vocab_size_ ? std::string() : until_stop(stream_.push(token));
  }
  std::string finish() { return stopped_ ? std::string() : until_stop(stream_.finish()); }
  [[nodiscard]] bool ended() const noexcept { return ended_; }
  [[nodiscard]] std::int64_t count() const noexcept { return count_; }

 private:
  std::string until_stop(const std::string& text) {
    const std::size_t before = tail_.size();
    tail_ += text;
    std::size_t end = std::string::npos;
    std::size_t longest = 1;
    for (const std::string& stop : *stop_) {
      longest = std::max(longest, stop.size());
      if (const std::size_t at = tail_.find(stop); at != std::string::npos)
        end = std::min(end, at + stop.size());
    }
    stopped_ = end != std::string::npos;
    ended_ = ended_ || stopped_;
    const std::string shown = text.substr(0, std::min(end, tail_.size()) - before);
    // What a stop text may have begun with.
    if (tail_.size() >= longest) tail_.erase(0, tail_.size() - (longest - 1));
    return shown;
  }

  std::int64_t vocab_size_;
  TokenStream stream_;
  const std::vector<std::string>* stop_;
  std::optional<std::int32_t> end_;
  std::string tail_;  // the last bytes
  std::int64_t count_ = 0;
  bool stopped_ = false;
  bool ended_ = false;
};

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
  Batch(Context& ctx, const Tokenizer& tokenizer, const std::vector<std::string>& prompts) {
    std::vector<Tokens> rows;
    std::size_t width = 0;
    for (const std::string& prompt : prompts) {
      rows.push_back(tokenizer.encode(prompt));
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

void print_results(const std::vector<std::string>& prompts,
                   const std::vector<std::string>& continuations) {
  const std::size_t samples = continuations.size() / prompts.size();
  for (std::size_t r = 0; r < continuations.size(); ++r) {
    fmt::print("{}==> {} <==\n", r == 0 ? "" : "\n", title(r, prompts.size(), samples));
    write(prompts[r / samples] + continuations[r] + '\n');
  }
}

// A single result is printed token by token, several ones one after the other at the end.
int run_generate(Options o) {
  const std::vector<std::string> prompts = read_prompts(o);
  for (const std::string& stop : o.stop)
    LRNN_CHECK(!stop.empty(), ConfigError, "--stop: expected at least one byte");
  LRNN_CHECK(o.generate.num_samples >= 1, ConfigError, "--num-samples: expected at least 1, got ",
             o.generate.num_samples);
  Context ctx = make_context(o.device);
  const auto model = load_model(ctx, o);
  const Tokenizer tokenizer = tokenizer_of(o, model);
  const Batch batch(ctx, tokenizer, prompts);
  if (batch.is_padded) o.generate.lengths = batch.lengths;
  o.generate.cuda_graph = !o.no_graph;
  o.generate.eos_token = tokenizer.added_token(kEndOfText);

  const std::size_t count = prompts.size() * static_cast<std::size_t>(o.generate.num_samples);
  std::vector<Continuation> rows(count, {tokenizer, o.stop, o.generate.eos_token});
  std::vector<std::string> texts(count);
  const bool stream = count == 1;
  if (stream) write(prompts[0]);
  Speed speed;
  o.generate.on_tokens = [&](std::span<const std::int32_t> tokens) {
    speed.drew_a_token();
    for (std::size_t r = 0; r < count; ++r) {
      const std::string text = rows[r].push(tokens[r]);
      if (stream)
        write(text);
      else
        texts[r] += text;
    }
    return !std::all_of(rows.begin(), rows.end(), [](const auto& row) { return row.ended(); });
  };
  static_cast<void>(lrnn::generate(ctx, model, batch.ids, o.generate));
  std::int64_t drawn = 0;
  for (std::size_t r = 0; r < count; ++r) {
    texts[r] += rows[r].finish();
    drawn += rows[r].count();
  }
  if (stream)
    write(texts[0] + '\n');
  else
    print_results(prompts, texts);
  speed.print(batch.tokens, drawn - static_cast<std::int64_t>(count));
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("generate", "continue prompts");
  auto o = std::make_shared<Options>();
  c->add_option("--model", o->model, "directory of the model")->required();
  c->add_option("--tokenizer", o->tokenizer_file,
                "tokenizer.json; default: that of the model, or bytes");
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
