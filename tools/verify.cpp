/// `lrnn verify`: models against recorded numbers.
#include "lrnn/models/verify.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <fmt/format.h>
#include <memory>
#include <vector>

#include "command.hpp"

namespace lrnn::tools {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> folders;
  std::string device = "auto";
  std::vector<std::string> dtypes;
};

bool is_case(const fs::path& folder) {
  return fs::exists(folder / "config.json") && fs::exists(folder / "io.safetensors");
}

// Every argument is a case or a folder of cases.
std::vector<fs::path> find_cases(const std::vector<std::string>& folders) {
  std::vector<fs::path> cases;
  for (const std::string& folder : folders) {
    const std::size_t before = cases.size();
    if (is_case(folder)) {
      cases.emplace_back(folder);
    } else if (fs::is_directory(folder)) {
      for (const auto& entry : fs::directory_iterator(folder))
        if (is_case(entry.path())) cases.push_back(entry.path());
    }
    LRNN_CHECK(cases.size() > before, IoError, folder, ": holds no recorded case");
    std::sort(cases.begin() + static_cast<std::ptrdiff_t>(before), cases.end());
  }
  return cases;
}

std::string shown(double error) {
  return std::isnan(error) ? "-" : fmt::format("{:.1e}", error);
}

void print(const VerifyResult& r, DType dtype) {
  fmt::print("{:<32} {:<8} {:<14} {:>8} {:>8} {:>8} {:>8}  {}\n", r.name, name_of(dtype),
             name_of(r.status), shown(r.output_error), shown(r.loss_error), shown(r.gradient_error),
             shown(r.step_error), r.reason.empty() ? r.worst_gradient : r.reason);
}

int verify(const Options& options) {
  Context ctx = make_context(options.device);
  std::vector<DType> dtypes;
  for (const std::string& name : options.dtypes) dtypes.push_back(parse_dtype(name));
  if (dtypes.empty()) dtypes = {ctx.device().is_cuda() ? DType::float32 : DType::float64};
  const auto cases = find_cases(options.folders);
  fmt::print("{:<32} {:<8} {:<14} {:>8} {:>8} {:>8} {:>8}  {}\n", "case", "dtype", "status",
             "output", "loss", "gradient", "step", "worst gradient, or reason");
  std::array<int, 4> counts{};
  for (const fs::path& folder : cases)
    for (const DType dtype : dtypes) {
      const VerifyResult r = verify_case(ctx, dtype, folder);
      ++counts[static_cast<std::size_t>(r.status)];
      print(r, dtype);
    }
  for (const auto status : {VerifyStatus::Ok, VerifyStatus::Failed, VerifyStatus::NotComparable,
                            VerifyStatus::Unsupported})
    fmt::print("{}{} {}", status == VerifyStatus::Ok ? "" : ", ",
               counts[static_cast<std::size_t>(status)], name_of(status));
  fmt::print("\n");
  // What was to be checked and could not be is no success.
  const int bad = counts[static_cast<std::size_t>(VerifyStatus::Failed)] +
                  counts[static_cast<std::size_t>(VerifyStatus::Unsupported)];
  return bad == 0 ? 0 : 1;
}

}  // namespace

void add_verify(CLI::App& app, Run& run) {
  auto* const command = app.add_subcommand("verify", "compare with recorded numbers");
  auto options = std::make_shared<Options>();
  command
      ->add_option(
          "folders", options->folders,
          "recorded cases of lrnnx, checkpoints with io.safetensors beside them, or folders "
          "of such folders")
      ->required();
  command->add_option("--device", options->device, "auto, cpu, cuda or cuda:N")
      ->capture_default_str();
  command
      ->add_option("--dtype", options->dtypes,
                   "float32, bfloat16 or float64; may be repeated (default: float64 on the CPU, "
                   "float32 on CUDA)")
      ->allow_extra_args(false);
  command->callback([&run, options] { run = [options] { return verify(*options); }; });
}

}  // namespace lrnn::tools
