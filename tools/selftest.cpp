/// `lrnn selftest`: what this machine has, and every op of this build against the CPU reference.
#include <chrono>
#include <fmt/format.h>

#include "command.hpp"
#include "core/runtime.hpp"
#include "support/op_parity.hpp"

namespace lrnn::tools {
namespace {

struct Options {
  bool devices_only = false;
  bool verbose = false;
};

void print_devices() {
#if LRNN_WITH_CUDA
  const int count = Context::cuda_device_count();
  if (count == 0) fmt::print("no CUDA device (built for sm_{})\n", LRNN_GPU_ARCHS);
  for (int i = 0; i < count; ++i) fmt::print("cuda:{}  {}\n", i, cuda::describe_device(i));
#else
  fmt::print("built without CUDA\n");
#endif
  fmt::print("cpu\n");
}

// Returns the number of results beyond their limit.
int run_case(const testing::OpCase& c, Context& ctx, DType dtype, bool verbose) {
  int failures = 0;
  try {
    for (const testing::Deviation& d : testing::compare_with_double(c, ctx, dtype)) {
      const bool ok = d.nmse <= d.limit;
      failures += ok ? 0 : 1;
      if (!ok || verbose)
        fmt::print("{} {} {}: {}: nmse {:.2e}, limit {:.0e}\n", ok ? "ok    " : "FAILED", c.name,
                   name_of(dtype), d.name, d.nmse, d.limit);
    }
  } catch (const Error& e) {
    fmt::print("FAILED {} {}: {}\n", c.name, name_of(dtype), e.what());
    ++failures;
  }
  return failures;
}

int run_device(Context ctx, const std::vector<DType>& dtypes, const Options& options) {
  int cases = 0;
  int failures = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (const testing::OpCase& c : testing::all_op_cases())
    for (const DType dtype : dtypes) {
      if (dtype == DType::bfloat16 && !c.bfloat16) continue;
      ++cases;
      failures += run_case(c, ctx, dtype, options.verbose);
    }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  fmt::print("{}: {} cases, {} failures, {:.1f} s\n", ctx.device().is_cuda() ? "cuda" : "cpu",
             cases, failures, seconds.count());
  return failures;
}

int selftest(const Options& options) {
  print_devices();
  if (options.devices_only) return 0;
  int failures = run_device(Context::cpu(), {DType::float32}, options);
  for (int i = 0; i < Context::cuda_device_count(); ++i)
    failures += run_device(Context::cuda(i), {DType::float32, DType::bfloat16}, options);
  return failures == 0 ? 0 : 1;
}

}  // namespace

void add_selftest(CLI::App& app, Run& run) {
  auto* const command =
      app.add_subcommand("selftest", "driver, GPU, and every op against the CPU reference");
  auto options = std::make_shared<Options>();
  command->add_flag("--devices-only", options->devices_only, "list the devices and stop");
  command->add_flag("--verbose", options->verbose, "one line per result");
  command->callback([&run, options] { run = [options] { return selftest(*options); }; });
}

}  // namespace lrnn::tools
