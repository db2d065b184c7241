/// What the subcommands of the program `lrnn` share.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <string>

#include "lrnn/core/context.hpp"

namespace lrnn::tools {

/// Every subcommand adds itself to `app` and sets `run` to what it does when chosen; `run` returns
/// the exit status: 0, or 1 if a check failed. Wrong usage and errors exit with 2.
using Run = std::function<int()>;

void add_train(CLI::App& app, Run& run);
void add_generate(CLI::App& app, Run& run);
void add_inspect(CLI::App& app, Run& run);
void add_convert(CLI::App& app, Run& run);
void add_selftest(CLI::App& app, Run& run);
void add_verify(CLI::App& app, Run& run);

/// "cpu", "cuda", "cuda:1" or "auto". @throws ConfigError
[[nodiscard]] Context make_context(const std::string& device);
/// In the folder of a model, beside config.json.
inline constexpr const char* kTokenizerFile = "tokenizer.json";
/// The text of a tokenizer.json. @throws IoError
[[nodiscard]] std::string read_tokenizer_text(const std::filesystem::path& path);
/// "float32", "bfloat16" or "float64". @throws ConfigError
[[nodiscard]] DType parse_dtype(const std::string& name);

}  // namespace lrnn::tools
