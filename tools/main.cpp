/// The program `lrnn`: the list of its subcommands.
#include <cstdio>
#include <exception>
#include <fmt/format.h>

#include "lrnn/io/file.hpp"
#include "lrnn/io/tokenizer.hpp"

#include "command.hpp"

namespace lrnn::tools {

Context make_context(const std::string& device) {
  if (device == "auto") return Context::best();
  if (device == "cpu") return Context::cpu();
  if (device == "cuda") return Context::cuda();
  if (device.starts_with("cuda:") && device.size() > 5 &&
      device.find_first_not_of("0123456789", 5) == std::string::npos && device.size() < 9)
    return Context::cuda(std::stoi(device.substr(5)));
  throw ConfigError("--device: expected auto, cpu, cuda or cuda:N, got '" + device + "'");
}

std::string read_tokenizer_text(const std::filesystem::path& path) {
  return read_text_file(path, Tokenizer::kMaxFileBytes);
}

DType parse_dtype(const std::string& name) {
  for (const DType d : {DType::float32, DType::bfloat16, DType::float64})
    if (name == name_of(d)) return d;
  throw ConfigError("--dtype: expected float32, bfloat16 or float64, got '" + name + "'");
}

}  // namespace lrnn::tools

int main(int argc, char** argv) {
  CLI::App app{"Language models of linear recurrent networks"};
  app.require_subcommand(1);
  lrnn::tools::Run run;
  lrnn::tools::add_train(app, run);
  lrnn::tools::add_generate(app, run);
  lrnn::tools::add_inspect(app, run);
  lrnn::tools::add_convert(app, run);
  lrnn::tools::add_verify(app, run);
  lrnn::tools::add_selftest(app, run);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return run();
  } catch (const std::exception& e) {
    fmt::print(stderr, "lrnn: {}\n", e.what());
    return 2;
  }
}
