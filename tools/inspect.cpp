/// `lrnn inspect`: configuration and tensors of a checkpoint. `lrnn convert`: reads one and writes
/// it again.
#include <filesystem>
#include <fmt/format.h>
#include <memory>
#include <sstream>

#include "lrnn/io/file.hpp"
#include "lrnn/lrnn.hpp"

#include "command.hpp"

namespace lrnn::tools {
namespace {

struct Options {
  std::string model;
  std::string out;
  std::string dtype;
  bool lrnnx_names = false;
};

LRNNLMHeadModel load(Context& ctx, const Options& o) {
  PretrainedOptions options;
  options.dtype = o.dtype.empty() ? DType::float32 : parse_dtype(o.dtype);
  return LRNNLMHeadModel::from_pretrained(ctx, o.model, options);
}

int inspect(const Options& o) {
  Context ctx = Context::cpu();
  const LRNNLMHeadModel model = load(ctx, o);
  fmt::print("{}\n", config_to_json(model.config()));
  for (const Parameter& p : model.parameters()) {
    std::ostringstream shape;
    shape << p.shape;
    fmt::print("{:<56} {:<24} {}{}\n", p.name, shape.str(), p.shape.numel(),
               p.options.keep_float32 ? "  float32 always" : "");
  }
  fmt::print("{} parameters\n", model.parameters().numel());
  return 0;
}

int convert(const Options& o) {
  Context ctx = Context::cpu();
  LRNN_CHECK(!std::filesystem::exists(std::filesystem::path(o.out) / "config.json"), ConfigError,
             "--out: ", o.out, " holds a model already");
  load(ctx, o).save_pretrained(ctx, o.out, {.lrnnx_names = o.lrnnx_names});
  const auto tokenizer = std::filesystem::path(o.model) / kTokenizerFile;
  if (std::filesystem::exists(tokenizer))
    write_text_file(std::filesystem::path(o.out) / kTokenizerFile, read_tokenizer_text(tokenizer));
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("inspect", "configuration and tensors of a checkpoint");
  auto o = std::make_shared<Options>();
  c->add_option("model", o->model, "directory of the model")->required();
  c->callback([&run, o] { run = [o] { return inspect(*o); }; });
}

void add_convert(CLI::App& app, Run& run) {
  auto* const c = app.add_subcommand("convert", "read a checkpoint and write it again");
  auto o = std::make_shared<Options>();
  c->add_option("--model", o->model, "directory of the model")->required();
  c->add_option("--out", o->out, "directory to write")->required();
  c->add_option("--dtype", o->dtype, "float32 or float64; default float32");
  c->add_flag("--lrnnx-names", o->lrnnx_names, "also the doubled names of lrnnx");
  c->callback([&run, o] { run = [o] { return convert(*o); }; });
}

}  // namespace lrnn::tools
