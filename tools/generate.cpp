/// `lrnn generate`: continues a prompt with a byte-level model.
#include <chrono>
#include <cstdio>
#include <fmt/format.h>
#include <fstream>
#include <memory>

#include "lrnn/lrnn.hpp"

#include "command.hpp"

namespace lrnn::tools {
namespace {

struct Options {
  std::string model;
  std::string prompt;
  std::string prompt_file;
  std::string device = "auto";
  std::string dtype;
  std::vector<std::string> stop;
  bool no_graph = false;
  GenerateOptions generate = {.max_new_tokens = 200, .top_k = 0};
};

std::string read_prompt(const Options& o) {
  if (o.prompt_file.empty()) return o.prompt;
  std::ifstream in(o.prompt_file, std::ios::binary);
  LRNN_CHECK(in, IoError, o.prompt_file, ": cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}

int run_generate(Options o) {
  const std::string prompt = read_prompt(o);
  LRNN_CHECK(!prompt.empty(), ConfigError, "--prompt: expected at least one byte");
  Context ctx = make_context(o.device);
  PretrainedOptions options;
  if (!o.dtype.empty())
    options.dtype = parse_dtype(o.dtype);
  else if (ctx.device().is_cpu())
    options.dtype = DType::float32;
  const auto model = LRNNLMHeadModel::from_pretrained(ctx, o.model, options);
  LRNN_CHECK(model.config().vocab_size == 256, ConfigError,
             "vocab_size: expected a byte-level model with 256 tokens, got ",
             model.config().vocab_size);
  std::vector<std::int32_t> ids;
  for (const char c : prompt) ids.push_back(static_cast<unsigned char>(c));
  const Tensor input = ctx.from_host<std::int32_t>({1, static_cast<std::int64_t>(ids.size())}, ids);
  std::int64_t count = 0;
  o.generate.cuda_graph = !o.no_graph;
  for (const std::string& text : o.stop) {
    auto& tokens = o.generate.stop_sequences.emplace_back();
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  }
  o.generate.on_tokens = [&](std::span<const std::int32_t> tokens) {
    std::fputc(static_cast<unsigned char>(tokens[0]), stdout);
    std::fflush(stdout);
    ++count;
    return true;
  };
  std::fwrite(prompt.data(), 1, prompt.size(), stdout);
  const auto begin = std::chrono::steady_clock::now();
  static_cast<void>(lrnn::generate(ctx, model, input, o.generate));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::fputc('\n', stdout);
  fmt::print(stderr, "{} tokens in {:.2f} s, {:.1f} tokens/s, prompt included\n", count,
             seconds.count(), static_cast<double>(count) / seconds.count());
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("generate", "continue a prompt");
  auto o = std::make_shared<Options>();
  c->add_option("--model", o->model, "directory of the model")->required();
  auto* const prompt = c->add_option("--prompt", o->prompt);
  c->add_option("--prompt-file", o->prompt_file)->excludes(prompt);
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
