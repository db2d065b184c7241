/// Times every benchmark case: <op>/<sizes>/<pass>/<dtype>/<device>.
///
/// CUDA: events around the pass on its stream, 128 MiB written before each iteration so that L2 is
/// cold, at least 10 warm-ups. A copy of 2 GiB and a GEMM of 8192^3 are timed in the same run;
/// counters give bytes and FLOP per second and their share of those. Rows of steps leave out the
/// copy of the state that comes before. `max_err` is the largest |x - reference| / max |reference|
/// over all results of the pass, against the double reference.
///
/// Events around one call also time its launch, and the writing back of what was just written to
/// L2. Below kShortMs that is a good part of it: such a pass is timed once more in a recorded chain
/// of calls, each on operands of its own that have left L2 since. `ms_chain` is the time of a call
/// there, from which the rates of the row are taken then.
///
/// --no-reference leaves max_err out and saves the minutes that the reference takes: for tuning. A
/// time without its error is no result.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <string_view>

#include <benchmark/benchmark.h>

#include "lrnn/core/graph.hpp"
#include "lrnn/core/random.hpp"
#include "lrnn/ops/linear.hpp"

#include "core/runtime.hpp"
#include "support/op_parity.hpp"

namespace lrnn::testing {
namespace {

constexpr int kWarmUps = 10;
constexpr int kIterations = 30;
constexpr double kShortMs = 0.025;
bool with_reference = true;

double median_ms(Context& ctx, int iterations, const std::function<void()>& before,
                 const std::function<void()>& work) {
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (int i = 0; i < iterations; ++i) {
    before();
    watch->start();
    work();
    watch->stop();
    ms.push_back(watch->milliseconds());
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}

/// Rates of this device, measured once per run.
struct Ceilings {
  double copy_bytes_per_s = 0;
  double gemm_flop_per_s_bf16 = 0;
  double gemm_flop_per_s_fp32 = 0;
};

double gemm_rate(Context& ctx, DType dtype, std::int64_t n) {
  const std::vector<double> block = [] {
    Rng rng(1, "gemm");
    std::vector<double> v(1 << 16);
    for (double& e : v) e = rng.uniform(-1, 1);
    return v;
  }();
  Tensor x = ctx.empty({n, n}, dtype);
  Tensor w = ctx.empty({n, n}, dtype);
  Tensor y = ctx.empty({n, n}, dtype);
  const auto rows = static_cast<std::int64_t>(block.size()) / n;
  for (Tensor* t : {&x, &w})
    for (std::int64_t r = 0; r < n; r += rows)
      ctx.write_from_host(t->view().slice(0, r, rows), block);
  const auto work = [&] { linear_forward(ctx, {.x = x, .weight = w, .y = y}); };
  for (int i = 0; i < 3; ++i) work();
  const double ms = median_ms(
      ctx, 10, [] {}, work);
  return 2.0 * std::pow(static_cast<double>(n), 3) / (ms * 1e-3);
}

const Ceilings& ceilings(Context& ctx) {
  static const Ceilings measured = [&] {
    Ceilings c;
    const bool cuda = ctx.device().is_cuda();
    const std::int64_t n = std::int64_t{1} << (cuda ? 29 : 26);
    const Tensor src = ctx.zeros({n}, DType::float32);
    Tensor dst = ctx.empty({n}, DType::float32);
    const double ms = median_ms(
        ctx, 10, [] {}, [&] { ctx.copy(dst, src); });
    c.copy_bytes_per_s = 8.0 * static_cast<double>(n) / (ms * 1e-3);
    c.gemm_flop_per_s_fp32 = gemm_rate(ctx, DType::float32, cuda ? 8192 : 1024);
    if (cuda) c.gemm_flop_per_s_bf16 = gemm_rate(ctx, DType::bfloat16, 8192);
    std::cerr << "copy " << c.copy_bytes_per_s / 1e12 << " TB/s, GEMM float32 "
              << c.gemm_flop_per_s_fp32 / 1e12 << ", bfloat16 " << c.gemm_flop_per_s_bf16 / 1e12
              << " TFLOP/s\n";
    return c;
  }();
  return measured;
}

/// Values of a case and its results in double on the CPU, kept while its rows are timed.
struct Reference {
  Context cpu = Context::cpu();
  const OpCase* c = nullptr;
  Values values;
  Tensors results;  // in the memory of cpu
};

Reference& reference_of(const OpCase& c) {
  static Reference kept;
  if (kept.c == &c) return kept;
  kept.results.clear();
  kept.values = random_values(c);
  kept.c = &c;
  if (!with_reference) return kept;
  kept.results = make_tensors(kept.cpu, c, kept.values, DType::float64);
  c.forward(kept.cpu, kept.results);
  if (c.backward) c.backward(kept.cpu, kept.results);
  return kept;
}

double max_error(Context& ctx, const OpCase& c, Reference& want, Tensors& got, bool backward) {
  c.forward(ctx, got);
  std::vector<std::string> names;
  if (backward) {
    c.backward(ctx, got);
    for (const auto* group : {&c.inputs, &c.params})
      for (const auto& o : *group) names.push_back("d" + o.name);
  } else {
    for (const auto& o : c.outputs) names.push_back(o.name);
  }
  double worst = 0;
  for (const auto& name : names) {
    const auto g = ctx.to_host_as_double(got.at(name));
    const auto w = want.cpu.to_host_as_double(want.results.at(name));
    double error = 0;
    double scale = 1e-300;
#pragma omp parallel for schedule(static) reduction(max : error, scale)
    for (std::size_t i = 0; i < w.size(); ++i) {
      const double d = std::abs(g[i] - w[i]);
      error = std::isnan(d) ? std::numeric_limits<double>::infinity() : std::max(error, d);
      scale = std::max(scale, std::abs(w[i]));
    }
    worst = std::max(worst, error / scale);
  }
  return worst;
}

double operand_bytes(const OpCase& c, DType dtype) {
  double bytes = 0;
  for (const auto* group : {&c.inputs, &c.params, &c.indices, &c.outputs})
    for (const Operand& o : *group) {
      const bool narrow = dtype == DType::bfloat16 && o.storage == Storage::Activation;
      bytes += (narrow ? 2.0 : 4.0) * static_cast<double>(o.shape.numel());
    }
  return bytes;
}
/// Least traffic of a pass.
double bytes_of(const OpCase& c, DType dtype, bool backward) {
  if (!backward && c.bytes_forward == 0) return operand_bytes(c, dtype);
  return (dtype == DType::bfloat16 ? 0.5 : 1.0) * (backward ? c.bytes_backward : c.bytes_forward);
}
/// What a row times, after a forward pass.
const std::function<void(Context&, Tensors&)>& pass_of(const OpCase& c, bool backward) {
  return backward ? c.backward : c.timed ? c.timed : c.forward;
}

/// ms of a call in a recorded chain that walks copies of the operands; 0 if too many of them fit in
/// L2 at once.
double chain_ms(Context& ctx, const OpCase& c, const Values& values, DType dtype, bool backward) {
  constexpr double kWalkedBytes = 256 << 20;  // several times L2
  constexpr int kLeastCalls = 20;
  constexpr int kMostCopies = 256;
  const double bytes = bytes_of(c, dtype, backward);
  if (bytes * kMostCopies < kWalkedBytes) return 0;
  const auto copies = std::max<std::size_t>(2, static_cast<std::size_t>(kWalkedBytes / bytes) + 1);
  const std::size_t rounds = (kLeastCalls + copies - 1) / copies;
  std::vector<Tensors> operands;
  while (operands.size() < copies) {
    operands.push_back(make_tensors(ctx, c, values, dtype));
    c.forward(ctx, operands.back());
  }
  CachingResource pool(std::make_unique<StatisticsResource>(ctx.memory()));
  const Context::MemoryScope scope(ctx, pool);
  const auto work = [&] {
    for (std::size_t i = 0; i < rounds * copies; ++i)
      pass_of(c, backward)(ctx, operands[i % copies]);
  };
  work();  // leaves in the pool the blocks that the recording needs
  Graph graph = Graph::capture(ctx, work);
  graph.launch();
  const double ms = median_ms(
      ctx, kIterations, [] {}, [&] { graph.launch(); });
  return ms / static_cast<double>(rounds * copies);
}

void report_rates(benchmark::State& state, const OpCase& c, DType dtype, bool backward,
                  double seconds, const Ceilings& top) {
  const double bytes = bytes_of(c, dtype, backward);
  const double flops = backward ? c.flops_backward : c.flops_forward;
  const double gemm =
      dtype == DType::bfloat16 ? top.gemm_flop_per_s_bf16 : top.gemm_flop_per_s_fp32;
  if (bytes > 0) {
    state.counters["GB/s"] = bytes / seconds / 1e9;
    state.counters["of_copy"] = bytes / seconds / top.copy_bytes_per_s;
  }
  if (flops > 0 && gemm > 0) {
    state.counters["TFLOP/s"] = flops / seconds / 1e12;
    state.counters["of_gemm"] = flops / seconds / gemm;
  }
}

void run(benchmark::State& state, const OpCase& c, DType dtype, bool cuda, bool backward) {
  Context ctx = cuda ? Context::cuda() : Context::cpu();
  const Ceilings& top = ceilings(ctx);
  Reference& reference = reference_of(c);
  Tensors t = make_tensors(ctx, c, reference.values, dtype);
  if (with_reference) state.counters["max_err"] = max_error(ctx, c, reference, t, backward);
  Tensor flush = ctx.empty({cuda ? std::int64_t{1} << 25 : 1}, DType::float32);
  c.forward(ctx, t);
  const auto work = [&] { pass_of(c, backward)(ctx, t); };
  for (int i = 0; i < (cuda ? kWarmUps : 1); ++i) work();
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    ctx.zero(flush);
    watch->start();
    work();
    watch->stop();
    ms.push_back(watch->milliseconds());
    state.SetIterationTime(ms.back() * 1e-3);
  }
  std::sort(ms.begin(), ms.end());
  const double median = ms[ms.size() / 2];
  state.counters["ms_p50"] = median;
  state.counters["ms_p10"] = ms[ms.size() / 10];
  state.counters["ms_p90"] = ms[ms.size() * 9 / 10];
  const double chain = cuda && median < kShortMs
                           ? chain_ms(ctx, c, reference.values, dtype, backward)
                           : 0;
  if (chain > 0) state.counters["ms_chain"] = chain;
  report_rates(state, c, dtype, backward, (chain > 0 ? chain : median) * 1e-3, top);
}

void register_case(const OpCase& c, bool cuda) {
  std::vector<DType> dtypes = {DType::float32};
  if (cuda && c.bfloat16) dtypes.push_back(DType::bfloat16);
  for (const DType dtype : dtypes)
    for (const bool backward : {false, true}) {
      if (backward && !c.backward) continue;
      const std::string name = detail::concat(c.name, backward ? "/backward/" : "/forward/", dtype,
                                              cuda ? "/cuda" : "/cpu");
      benchmark::RegisterBenchmark(
          name.c_str(),
          [&c, dtype, cuda, backward](benchmark::State& s) { run(s, c, dtype, cuda, backward); })
          ->UseManualTime()
          ->Iterations(cuda ? kIterations : 3)
          ->Unit(benchmark::kMillisecond);
    }
}

}  // namespace
}  // namespace lrnn::testing

int main(int argc, char** argv) {
  const bool cuda = lrnn::Context::cuda_device_count() > 0;
  for (const auto& c : lrnn::testing::all_bench_cases()) lrnn::testing::register_case(c, cuda);
  benchmark::Initialize(&argc, argv);
  if (argc > 1 && std::string_view(argv[1]) == "--no-reference") {
    lrnn::testing::with_reference = false;
    argv[1] = argv[0];
    --argc;
    ++argv;
  }
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
