/// Times whole layers and language models on CUDA.
///
///   layer/<mixer>/<sizes>/{forward,train}/{float32,tf32,bfloat16}
///   lm/<model>/{train,optimizer,prefill,decode}/<sizes>/bfloat16
///
/// Layers: events around the pass, 128 MiB written before each iteration (cold L2). Models: no
/// flush. `peak_MB` is what the pass allocates beside parameters, gradients and input.
#include <algorithm>
#include <iostream>

#include <benchmark/benchmark.h>

#include "lrnn/lrnn.hpp"

#include "core/runtime.hpp"

namespace lrnn {
namespace {

struct Timing {
  double median_ms, p10_ms, p90_ms;
};

Timing summarise(std::vector<double> ms) {
  std::sort(ms.begin(), ms.end());
  return {ms[ms.size() / 2], ms[ms.size() / 10], ms[ms.size() * 9 / 10]};
}

void report(benchmark::State& state, const std::vector<double>& ms) {
  const Timing t = summarise(ms);
  state.counters["ms_p50"] = t.median_ms;
  state.counters["ms_p10"] = t.p10_ms;
  state.counters["ms_p90"] = t.p90_ms;
}

Tensor random_tensor(Context& ctx, const Shape& shape, DType dtype) {
  std::vector<double> values(static_cast<std::size_t>(shape.numel()));
  Rng rng(7, "bench");
  init::normal(1.0)(values, shape, rng);
  return ctx.from_host_as(shape, dtype, values);
}

Tensor random_ids(Context& ctx, const Shape& shape, std::int64_t vocab) {
  Rng rng(8, "ids");
  std::vector<std::int32_t> ids(static_cast<std::size_t>(shape.numel()));
  for (auto& id : ids) id = static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(vocab)));
  return ctx.from_host<std::int32_t>(shape, ids);
}

enum class Precision { Float32, Tf32, BFloat16 };
constexpr const char* kPrecisionNames[] = {"float32", "tf32", "bfloat16"};

struct LayerSizes {
  std::int64_t batch, seqlen, d_model, d_state;
};

void layer(benchmark::State& state, MixerType type, const LayerSizes& z, bool train,
           Precision precision) {
  Context ctx = Context::best();
  ctx.set_allow_tf32(precision == Precision::Tf32);
  const DType dtype = precision == Precision::BFloat16 ? DType::bfloat16 : DType::float32;
  ParameterStore store;
  const auto mixer = make_mixer(type, {}, {.d_model = z.d_model, .d_state = z.d_state},
                                ParameterScope(store, "mixer."));
  store.materialize(ctx, dtype, 1);
  if (train) store.enable_grad(ctx);
  const Shape shape = {z.batch, z.seqlen, z.d_model};
  const Tensor x = random_tensor(ctx, shape, dtype);
  const Tensor dy = random_tensor(ctx, shape, dtype);
  Tensor y = ctx.empty(shape, dtype);
  Tensor dx = ctx.empty(shape, dtype);
  Tensor flush = ctx.empty({ctx.device().is_cuda() ? std::int64_t{1} << 25 : 1}, DType::float32);
  StatisticsResource memory(ctx.memory());
  const auto work = [&] {
    const Context::MemoryScope scope(ctx, memory);
    const auto saved = mixer->forward(ctx, {.x = x, .y = y}, train);
    if (train) mixer->backward(ctx, *saved, {.dy = dy, .dx = dx});
  };
  for (int i = 0; i < 3; ++i) work();
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
  report(state, ms);
  state.counters["peak_MB"] = static_cast<double>(memory.stats().peak_bytes_in_use) / 1e6;
}

void register_layers() {
  struct Row {
    MixerType type;
    LayerSizes sizes;
  };
  std::vector<Row> rows;
  for (const MixerType type : all_mixer_types()) {
    if (type == MixerType::Attn) continue;
    const std::int64_t dstate = type == MixerType::Mamba ? 16 : 64;
    rows.push_back({type, {8, 2048, 768, dstate}});
    rows.push_back({type, {32, 512, 128, 16}});
    rows.push_back({type, {32, 2048, 128, 16}});
    if (type == MixerType::S7)
      rows.push_back({type, {8, 2048, 256, 16}});
    else
      rows.push_back({type, {1, 65536, 768, dstate}});
  }
  for (const Row& r : rows)
    for (const bool train : {false, true})
      for (const Precision precision : {Precision::Float32, Precision::Tf32, Precision::BFloat16}) {
        const std::string name = detail::concat(
            "layer/", mixer_name(r.type), "/B:", r.sizes.batch, "/L:", r.sizes.seqlen,
            "/H:", r.sizes.d_model, "/N:", r.sizes.d_state, train ? "/train/" : "/forward/",
            kPrecisionNames[static_cast<int>(precision)]);
        benchmark::RegisterBenchmark(
            name.c_str(), [=](benchmark::State& s) { layer(s, r.type, r.sizes, train, precision); })
            ->UseManualTime()
            ->Iterations(10)
            ->Unit(benchmark::kMillisecond);
      }
}

struct LanguageModel {
  const char* name;
  LRNNLMHeadConfig config;
  std::int64_t batch, seqlen;
};

std::vector<MixerType> repeat(MixerType type, std::size_t count) {
  return std::vector<MixerType>(count, type);
}

std::vector<LanguageModel> language_models() {
  using enum MixerType;
  const auto pure = [](MixerType type, std::int64_t layers, std::int64_t d_model,
                       std::int64_t d_state) {
    return LRNNLMHeadConfig{.d_model = d_model,
                            .d_state = d_state,
                            .n_layer = layers,
                            .vocab_size = 50277,
                            .mixer_types = repeat(type, static_cast<std::size_t>(layers)),
                            .residual_in_fp32 = true,
                            .dtype = DType::bfloat16};
  };
  const auto has = [](MixerType type) {
    const auto all = all_mixer_types();
    return std::find(all.begin(), all.end(), type) != all.end();
  };
  std::vector<LanguageModel> models = {
      {"mamba-130m", pure(Mamba, 24, 768, 16), 8, 2048},
      {"mamba-1.4b", pure(Mamba, 48, 2048, 16), 4, 2048},
      {"seed1",
       {.d_model = 512,
        .d_state = 64,
        .n_layer = 4,
        .vocab_size = 50257,
        .mixer_types = {S5, S5, Mamba, Mamba},
        .d_intermediate = 2048,
        .dtype = DType::bfloat16},
       8,
       2048},
      {"seed2",
       {.d_model = 768,
        .d_state = 128,
        .n_layer = 6,
        .vocab_size = 50257,
        .mixer_types = {S5, S5, Attn, Mamba, Mamba, Attn},
        .d_intermediate = 3072,
        .mixer_kwargs = {.attn = {.num_heads = 12}},
        .dtype = DType::bfloat16},
       4,
       2048},
      {"lru12", pure(LRU, 12, 768, 256), 8, 2048},
  };
  if (has(RGLRU)) models.push_back({"rglru24", pure(RGLRU, 24, 768, 16), 8, 2048});
  return models;
}

// One recorded step, replayed, as the Trainer replays its passes: zeroed gradients, forward and
// backward pass, optimizer.
void train_step(benchmark::State& state, const LanguageModel& m) {
  Context ctx = Context::cuda();
  LRNNLMHeadModel model(ctx, m.config);
  AdamW optimizer(ctx, model.parameters(), {});
  const Tensor ids = random_ids(ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  const Tensor targets = random_ids(ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  CachingResource pool(std::make_unique<StatisticsResource>(ctx.memory()));
  StatisticsResource memory(pool);
  const auto work = [&] {
    const Context::MemoryScope scope(ctx, memory);
    model.parameters().zero_grad(ctx);
    static_cast<void>(model.loss_and_backward(ctx, ids, targets, {.validate = false}));
    optimizer.step(ctx);
  };
  work();  // leaves in the pool the blocks that the recording needs
  Graph graph = Graph::capture(ctx, work);
  for (int i = 0; i < 3; ++i) graph.launch();
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    watch->start();
    graph.launch();
    watch->stop();
    ms.push_back(watch->milliseconds());
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  state.counters["tokens/s"] =
      static_cast<double>(m.batch * m.seqlen) / (summarise(ms).median_ms * 1e-3);
  state.counters["peak_MB"] = static_cast<double>(memory.stats().peak_bytes_in_use) / 1e6;
}

// AdamW with clipping by the global norm over all parameters: norm, factors, update.
void optimizer_step(benchmark::State& state, const LanguageModel& m) {
  Context ctx = Context::cuda();
  LRNNLMHeadModel model(ctx, m.config);
  AdamW optimizer(ctx, model.parameters(), {});
  model.parameters().zero_grad(ctx);
  const auto work = [&] { optimizer.step(ctx); };
  for (int i = 0; i < 3; ++i) work();
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    watch->start();
    work();
    watch->stop();
    ms.push_back(watch->milliseconds());
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  const auto n = static_cast<double>(model.parameters().numel());
  // Gradient twice (norm, update), moments and master read and written, bfloat16 copy written.
  state.counters["GB/s"] = n * (4 + 4 + 16 + 8 + 2) / (summarise(ms).median_ms * 1e-3) / 1e9;
  state.counters["parameters"] = n;
}

void prefill(benchmark::State& state, const LanguageModel& m) {
  Context ctx = Context::cuda();
  const LRNNLMHeadModel model(ctx, m.config);
  const Tensor ids = random_ids(ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  const auto work = [&] {
    return model.forward(ctx, ids, {.num_last_tokens = 1, .validate = false});
  };
  for (int i = 0; i < 3; ++i) static_cast<void>(work());
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    watch->start();
    static_cast<void>(work());
    watch->stop();
    ms.push_back(watch->milliseconds());
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  state.counters["tokens/s"] =
      static_cast<double>(m.batch * m.seqlen) / (summarise(ms).median_ms * 1e-3);
}

// One recorded step, replayed: embedding, layers, head, argmax, fed back on the device.
void decode(benchmark::State& state, const LanguageModel& m, std::int64_t batch) {
  Context ctx = Context::cuda();
  const LRNNLMHeadModel model(ctx, m.config);
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = batch, .max_seqlen = 1024});
  Tensor ids = random_ids(ctx, {batch, 1}, m.config.vocab_size);
  const auto work = [&] {
    const Tensor logits = model.step(ctx, ids, cache, {.validate = false}).logits;
    const Tensor next = argmax(ctx, logits);
    ctx.copy(ids, next);
  };
  work();
  ArenaResource arena(ctx.memory(), std::size_t{1} << 30, ctx.stream());
  const Context::MemoryScope scope(ctx, arena);
  work();
  arena.reset();
  Graph graph = Graph::capture(ctx, work);
  constexpr int kSteps = 20;
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    watch->start();
    for (int i = 0; i < kSteps; ++i) graph.launch();
    watch->stop();
    ms.push_back(watch->milliseconds() / kSteps);
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  state.counters["tokens/s"] = static_cast<double>(batch) / (summarise(ms).median_ms * 1e-3);
}

void register_models(const std::vector<LanguageModel>& models) {
  for (const LanguageModel& m : models) {
    const std::string prefix = detail::concat("lm/", m.name);
    const std::string sizes = detail::concat("/B:", m.batch, "/L:", m.seqlen, "/bfloat16");
    benchmark::RegisterBenchmark((prefix + "/train" + sizes).c_str(),
                                 [&m](benchmark::State& s) { train_step(s, m); })
        ->UseManualTime()
        ->Iterations(8)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark((prefix + "/optimizer/bfloat16").c_str(),
                                 [&m](benchmark::State& s) { optimizer_step(s, m); })
        ->UseManualTime()
        ->Iterations(10)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark((prefix + "/prefill" + sizes).c_str(),
                                 [&m](benchmark::State& s) { prefill(s, m); })
        ->UseManualTime()
        ->Iterations(10)
        ->Unit(benchmark::kMillisecond);
    for (const std::int64_t batch : {1, 16, 128})
      benchmark::RegisterBenchmark(detail::concat(prefix, "/decode/B:", batch, "/bfloat16").c_str(),
                                   [&m, batch](benchmark::State& s) { decode(s, m, batch); })
          ->UseManualTime()
          ->Iterations(10)
          ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace
}  // namespace lrnn

int main(int argc, char** argv) {
  const auto models = lrnn::language_models();
  if (lrnn::Context::cuda_device_count() == 0) {
    std::cerr << "model_bench: no CUDA device; its rows are sized for one\n";
    return 0;
  }
  lrnn::register_layers();
  lrnn::register_models(models);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
