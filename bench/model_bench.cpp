/// Times whole layers and language models on CUDA, and decoding on the CPU.
///
///   layer/<mixer>/<sizes>/{forward,train}/{float32,tf32,bfloat16}
///   scale/<mixer>/<sizes>/train/bfloat16
///   layer/<mixer>/<sizes>/step/bfloat16
///   lm/<model>/{train,optimizer,prefill,decode}/<sizes>/bfloat16
///   lm/<model>/train/recompute:<blocks that run again>/<sizes>/bfloat16
///   lm_head/<sizes>/bfloat16
///   lm/mamba-130m/decode/B:1/{float32,bfloat16}/cpu
///
/// Decoding on the CPU reads every weight once a token. GB/s counts the bytes of the weights alone;
/// of_read is its share of the rate at which the same threads add up 1 GiB, timed in the same row
/// before and after it, of which the greater counts.
///
/// Layers: events around a replay of the recorded pass, as the Trainer replays it, 128 MiB written
/// before each iteration (cold L2). Models: no flush. `peak_MB` is what the pass allocates beside
/// parameters, gradients and input. `of_gemm`: the share of the rate of a product of 8192^3
/// measured in the same run. Errors of layers, in the rows of training, and of models: see
/// model_error.hpp.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <iostream>
#include <memory>

#include <benchmark/benchmark.h>

#include "lrnn/lrnn.hpp"
#include "lrnn/ops/argmax.hpp"
#include "lrnn/ops/linear.hpp"

#include "core/runtime.hpp"
#include "model_error.hpp"

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

// Normal values, repeated from a million on: drawing all of a long row would take most of a run.
Tensor random_tensor(Context& ctx, const Shape& shape, DType dtype) {
  const std::int64_t n = shape.numel();
  const std::int64_t period = std::min(n, (std::int64_t{1} << 20) - 3);
  std::vector<double> values(static_cast<std::size_t>(period));
  Rng rng(7, "bench");
  init::normal(1.0)(values, {period}, rng);
  const Tensor block = ctx.from_host_as({period}, dtype, values);
  Tensor t = ctx.empty(shape, dtype);
  const MutableTensorView flat = t.view().reshape({n});
  for (std::int64_t begin = 0; begin < n; begin += period) {
    const std::int64_t count = std::min(period, n - begin);
    ctx.copy(flat.slice(0, begin, count), block.view().slice(0, 0, count));
  }
  return t;
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
           Precision precision, bool with_error) {
  Context ctx = Context::best();
  ctx.set_allow_tf32(precision == Precision::Tf32);
  const DType dtype = precision == Precision::BFloat16 ? DType::bfloat16 : DType::float32;
  ParameterStore store;
  const MixerBuild build{.d_model = z.d_model, .d_state = z.d_state};
  const auto mixer = make_mixer(type, {}, build, ParameterScope(store, "mixer."));
  store.materialize(ctx, dtype, 1);
  if (train) store.enable_grad(ctx);
  const Shape shape = {z.batch, z.seqlen, z.d_model};
  const Tensor x = random_tensor(ctx, shape, dtype);
  const Tensor dy = random_tensor(ctx, shape, dtype);
  Tensor y = ctx.empty(shape, dtype);
  Tensor dx = ctx.empty(shape, dtype);
  Tensor flush = ctx.empty({ctx.device().is_cuda() ? std::int64_t{1} << 25 : 1}, DType::float32);
  CachingResource pool(std::make_unique<StatisticsResource>(ctx.memory()));
  StatisticsResource memory(pool);
  const auto work = [&] {
    const Context::MemoryScope scope(ctx, memory);
    const auto saved = mixer->forward(ctx, {.x = x, .y = y}, train);
    if (train) mixer->backward(ctx, *saved, {.dy = dy, .dx = dx});
  };
  work();  // leaves in the pool the blocks that the recording needs
  Graph graph = Graph::capture(ctx, work);
  for (int i = 0; i < 3; ++i) graph.launch();
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    ctx.zero(flush);
    watch->start();
    graph.launch();
    watch->stop();
    ms.push_back(watch->milliseconds());
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  const auto peak = static_cast<double>(memory.stats().peak_bytes_in_use);
  const auto tokens = static_cast<double>(z.batch * z.seqlen);
  state.counters["peak_MB"] = peak / 1e6;
  state.counters["ns/token"] = summarise(ms).median_ms * 1e6 / tokens;
  state.counters["kB/token"] = peak / 1e3 / tokens;
  if (!train || !with_error) return;
  const auto error = bench::layer_error(ctx, type, build, *mixer, store, x, dy);
  state.counters["y_err"] = error.y;
  state.counters["dx_err"] = error.dx;
  state.counters["grad_err"] = error.gradient;
}

void register_layer(const char* group, MixerType type, const LayerSizes& z, bool train,
                    Precision precision, int iterations) {
  const std::string name = detail::concat(
      group, mixer_name(type), "/B:", z.batch, "/L:", z.seqlen, "/H:", z.d_model, "/N:", z.d_state,
      train ? "/train/" : "/forward/", kPrecisionNames[static_cast<int>(precision)]);
  const bool with_error = std::string_view(group) == "layer/";
  benchmark::RegisterBenchmark(
      name.c_str(),
      [=](benchmark::State& s) { layer(s, type, z, train, precision, with_error); })
      ->UseManualTime()
      ->Iterations(iterations)
      ->Unit(benchmark::kMillisecond);
}

// How time and memory per token grow with the length of one sequence.
void register_scaling() {
  for (const MixerType type : all_mixer_types()) {
    if (type == MixerType::Attn) continue;
    for (const std::int64_t seqlen : {1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18})
      register_layer("scale/", type, {1, seqlen, 768, type == MixerType::Mamba ? 16 : 64}, true,
                     Precision::BFloat16, seqlen > (1 << 16) ? 3 : 5);
  }
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
      for (const Precision precision : {Precision::Float32, Precision::Tf32, Precision::BFloat16})
        register_layer("layer/", r.type, r.sizes, train, precision, 10);
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

// A model of the list with its optimizer, kept while its rows are timed: 1.4 billion initial values
// take longer than most rows.
struct Loaded {
  const LanguageModel* description;
  Context ctx = Context::cuda();
  StatisticsResource memory{ctx.memory()};
  Context::MemoryScope scope{ctx, memory};
  LRNNLMHeadModel model;
  AdamW optimizer;
  /// Parameters, gradients, moments and master weights.
  std::int64_t resident_bytes = static_cast<std::int64_t>(memory.stats().bytes_in_use);

  explicit Loaded(const LanguageModel& m)
      : description(&m), model(ctx, m.config), optimizer(ctx, model.parameters(), {}) {}
};

std::unique_ptr<Loaded>& kept_model() {
  static std::unique_ptr<Loaded> kept;
  return kept;
}

Loaded& loaded(const LanguageModel& m) {
  auto& kept = kept_model();
  if (!kept || kept->description != &m) {
    kept.reset();
    kept = std::make_unique<Loaded>(m);
  }
  return *kept;
}

// Times `work` once per iteration; returns milliseconds divided by `parts`.
std::vector<double> timed(benchmark::State& state, Context& ctx, const std::function<void()>& work,
                          int parts = 1) {
  const auto watch = ctx.runtime().make_stopwatch();
  std::vector<double> ms;
  for (auto _ : state) {
    watch->start();
    work();
    watch->stop();
    ms.push_back(watch->milliseconds() / parts);
    state.SetIterationTime(ms.back() * 1e-3);
  }
  report(state, ms);
  return ms;
}

void report_tokens(benchmark::State& state, const std::vector<double>& ms, std::int64_t tokens) {
  state.counters["tokens/s"] = static_cast<double>(tokens) / (summarise(ms).median_ms * 1e-3);
}

// At the shape that was timed where the reference fits in memory, else of 256 tokens a sequence.
void report_training_error(benchmark::State& state, Loaded& l, const Tensor& ids,
                           const Tensor& targets) {
  const bool large = l.model.parameters().numel() > 300'000'000;
  const std::int64_t length = large ? 256 : ids.dim(1);
  const auto first = [&](const Tensor& t) {
    const Shape shape{t.dim(0), length};
    const auto flat = t.view().reshape({t.shape().numel()});
    return l.ctx.clone(flat.slice(0, 0, shape.numel()).reshape(shape));
  };
  const auto error = bench::training_error(l.ctx, l.model, first(ids), first(targets));
  state.counters["loss_err"] = error.loss;
  state.counters["grad_err"] = error.gradient;
  state.counters["err_L"] = static_cast<double>(length);
}

// One recorded step, replayed, as the Trainer replays its passes: zeroed gradients, forward and
// backward pass, optimizer.
void train_step(benchmark::State& state, const LanguageModel& m, std::int64_t recompute_blocks) {
  Loaded& l = loaded(m);
  Context& ctx = l.ctx;
  const Tensor ids = random_ids(ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  const Tensor targets = random_ids(ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  CachingResource pool(std::make_unique<StatisticsResource>(ctx.memory()));
  StatisticsResource memory(pool);
  const auto work = [&] {
    const Context::MemoryScope scope(ctx, memory);
    l.model.parameters().zero_grad(ctx);
    static_cast<void>(l.model.loss_and_backward(
        ctx, ids, targets, {.recompute_blocks = recompute_blocks, .validate = false}));
    l.optimizer.step(ctx);
  };
  work();  // leaves in the pool the blocks that the recording needs
  Graph graph = Graph::capture(ctx, work);
  for (int i = 0; i < 3; ++i) graph.launch();
  report_tokens(state, timed(state, ctx, [&] { graph.launch(); }), m.batch * m.seqlen);
  const auto peak = static_cast<double>(memory.stats().peak_bytes_in_use);
  state.counters["peak_MB"] = peak / 1e6;
  state.counters["total_GB"] = (peak + static_cast<double>(l.resident_bytes)) / 1e9;
  if (recompute_blocks == 0) report_training_error(state, l, ids, targets);
}

// AdamW with clipping by the global norm over all parameters: norm, factors, update.
void optimizer_step(benchmark::State& state, const LanguageModel& m) {
  Loaded& l = loaded(m);
  l.model.parameters().zero_grad(l.ctx);
  const auto work = [&] { l.optimizer.step(l.ctx); };
  for (int i = 0; i < 3; ++i) work();
  const auto ms = timed(state, l.ctx, work);
  const auto n = static_cast<double>(l.model.parameters().numel());
  // Gradient twice (norm, update), moments and master read and written, bfloat16 copy written.
  state.counters["GB/s"] = n * (4 + 4 + 16 + 8 + 2) / (summarise(ms).median_ms * 1e-3) / 1e9;
  state.counters["parameters"] = n;
}

void prefill(benchmark::State& state, const LanguageModel& m) {
  Loaded& l = loaded(m);
  const Tensor ids = random_ids(l.ctx, {m.batch, m.seqlen}, m.config.vocab_size);
  const auto work = [&] {
    static_cast<void>(l.model.forward(l.ctx, ids, {.num_last_tokens = 1, .validate = false}));
  };
  for (int i = 0; i < 3; ++i) work();
  report_tokens(state, timed(state, l.ctx, work), m.batch * m.seqlen);
  state.counters["max_err"] = bench::prefill_error(l.ctx, l.model, ids);
}

// Work recorded with its memory in an arena, after a first run that loads its kernels.
Graph recorded(Context& ctx, ArenaResource& arena, const std::function<void()>& work) {
  const Context::MemoryScope scope(ctx, arena);
  work();
  arena.reset();
  return Graph::capture(ctx, work);
}

// One token of every sequence of a batch through one mixer: the recorded step, replayed kSteps
// times, so that its weights come from L2.
void layer_step(benchmark::State& state, MixerType type, const LayerSizes& z) {
  Context ctx = Context::cuda();
  ParameterStore store;
  const auto mixer = make_mixer(type, {}, {.d_model = z.d_model, .d_state = z.d_state},
                                ParameterScope(store, "mixer."));
  store.materialize(ctx, DType::bfloat16, 1);
  const Tensor x = random_tensor(ctx, {z.batch, 1, z.d_model}, DType::bfloat16);
  Tensor y = ctx.empty({z.batch, 1, z.d_model}, DType::bfloat16);
  const auto mixer_state = mixer->make_state(ctx, z.batch, 1, DType::bfloat16);
  ArenaResource arena(ctx.memory(), std::size_t{1} << 28, ctx.stream());
  constexpr int kSteps = 50;
  Graph graph = recorded(ctx, arena, [&] {
    for (int i = 0; i < kSteps; ++i) mixer->step(ctx, {.x = x, .y = y, .state = *mixer_state});
  });
  for (int i = 0; i < 3; ++i) graph.launch();
  const auto ms = timed(
      state, ctx, [&] { graph.launch(); }, kSteps);
  state.counters["us/token"] = summarise(ms).median_ms * 1e3;
}

void register_layer_steps() {
  constexpr std::int64_t kBatch = 32;
  for (const MixerType type : all_mixer_types()) {
    if (type == MixerType::Attn) continue;
    LayerSizes z{kBatch, 1, 768, 64};
    if (type == MixerType::S7) z = {kBatch, 1, 256, 16};
    benchmark::RegisterBenchmark(detail::concat("layer/", mixer_name(type), "/B:", z.batch, "/H:",
                                                z.d_model, "/N:", z.d_state, "/step/bfloat16")
                                     .c_str(),
                                 [=](benchmark::State& s) { layer_step(s, type, z); })
        ->UseManualTime()
        ->Iterations(20)
        ->Unit(benchmark::kMillisecond);
  }
}

// One recorded step, replayed: embedding, layers, head, argmax, fed back on the device.
void decode(benchmark::State& state, const LanguageModel& m, std::int64_t batch) {
  Loaded& l = loaded(m);
  Context& ctx = l.ctx;
  auto cache = l.model.allocate_inference_cache(ctx, {.batch_size = batch, .max_seqlen = 1024});
  Tensor ids = random_ids(ctx, {batch, 1}, m.config.vocab_size);
  ArenaResource arena(ctx.memory(), std::size_t{1} << 30, ctx.stream());
  Graph graph = recorded(ctx, arena, [&] {
    const Tensor logits = l.model.step(ctx, ids, cache, {.validate = false}).logits;
    argmax_forward(ctx, {.logits = logits, .ids = ids});
  });
  constexpr int kSteps = 20;
  const auto ms = timed(
      state, ctx,
      [&] {
        for (int i = 0; i < kSteps; ++i) graph.launch();
      },
      kSteps);
  report_tokens(state, ms, batch);
  state.counters["max_err"] = bench::decode_error(ctx, l.model, batch);
}

// Bytes per second of a sum over 1 GiB.
double read_rate() {
  constexpr std::int64_t kFloats = std::int64_t{1} << 28;
  constexpr std::int64_t kSums = 64;  // independent, so that additions do not wait
  static const std::vector<float> buffer(static_cast<std::size_t>(kFloats), 1.0F);
  const auto start = std::chrono::steady_clock::now();
  float total = 0;
#pragma omp parallel reduction(+ : total)
  {
    float sums[kSums] = {};
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < kFloats; i += kSums)
#pragma omp simd
      for (std::int64_t k = 0; k < kSums; ++k) sums[k] += buffer[static_cast<std::size_t>(i + k)];
    for (const float sum : sums) total += sum;
  }
  benchmark::DoNotOptimize(total);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 4.0 * static_cast<double>(kFloats) / seconds.count();
}

// Bytes that one token reads: all matrices, of the embedding one row unless it is the head as well.
double weight_bytes(const LRNNLMHeadModel& model) {
  double bytes = 0;
  for (const Parameter& p : model.parameters())
    if (model.config().tie_embeddings || p.name != "backbone.embedding.weight")
      bytes += static_cast<double>(p.value.nbytes());
  return bytes;
}

void decode_on_cpu(benchmark::State& state, LanguageModel m, DType dtype) {
  Context ctx = Context::cpu();
  m.config.dtype = dtype;
  const LRNNLMHeadModel model(ctx, m.config);
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = 1, .max_seqlen = 1024});
  Tensor ids = random_ids(ctx, {1, 1}, m.config.vocab_size);
  const auto work = [&] {
    const Tensor logits = model.step(ctx, ids, cache, {.validate = false}).logits;
    const Tensor next = argmax(ctx, logits);
    ctx.copy(ids, next);
  };
  double ceiling = read_rate();
  for (int i = 0; i < 3; ++i) work();
  const auto ms = timed(state, ctx, work);
  for (int i = 0; i < 2; ++i) ceiling = std::max(ceiling, read_rate());
  const double rate = weight_bytes(model) / (summarise(ms).median_ms * 1e-3);
  report_tokens(state, ms, 1);
  state.counters["GB/s"] = rate / 1e9;
  state.counters["read_GB/s"] = ceiling / 1e9;
  state.counters["of_read"] = rate / ceiling;
  state.counters["max_err"] = bench::decode_error(ctx, model, 1);
}

void register_cpu(const LanguageModel& m) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    benchmark::RegisterBenchmark(
        detail::concat("lm/", m.name, "/decode/B:1/", dtype, "/cpu").c_str(),
        [&m, dtype](benchmark::State& s) { decode_on_cpu(s, m, dtype); })
        ->UseManualTime()
        ->Iterations(20)
        ->Unit(benchmark::kMillisecond);
}

void register_models(const std::vector<LanguageModel>& models) {
  for (const LanguageModel& m : models) {
    const std::string prefix = detail::concat("lm/", m.name);
    const std::string sizes = detail::concat("/B:", m.batch, "/L:", m.seqlen, "/bfloat16");
    const auto register_training = [&](const std::string& name, std::int64_t recompute_blocks) {
      benchmark::RegisterBenchmark(
          (prefix + name + sizes).c_str(),
          [&m, recompute_blocks](benchmark::State& s) { train_step(s, m, recompute_blocks); })
          ->UseManualTime()
          ->Iterations(8)
          ->Unit(benchmark::kMillisecond);
    };
    register_training("/train", 0);
    if (m.config.n_layer >= 48)  // where memory matters
      for (const std::int64_t blocks : {m.config.n_layer * 5 / 8, m.config.n_layer})
        register_training(detail::concat("/train/recompute:", blocks), blocks);
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

// FLOP per second of a bfloat16 product of n^3, measured once per run.
double gemm_rate(Context& ctx, std::int64_t n = 8192) {
  static const double rate = [&] {
    const Tensor x = random_tensor(ctx, {n, n}, DType::bfloat16);
    const Tensor weight = random_tensor(ctx, {n, n}, DType::bfloat16);
    Tensor y = ctx.empty({n, n}, DType::bfloat16);
    const auto watch = ctx.runtime().make_stopwatch();
    std::vector<double> ms;
    for (int i = 0; i < 13; ++i) {
      watch->start();
      linear_forward(ctx, {.x = x, .weight = weight, .y = y});
      watch->stop();
      if (i >= 3) ms.push_back(watch->milliseconds());
    }
    return 2.0 * std::pow(static_cast<double>(n), 3) / (summarise(ms).median_ms * 1e-3);
  }();
  return rate;
}

// Loss and gradients of a model without layers, one recorded pass: the head with cross-entropy in
// chunks. The look-up of the embedding, the last norm and their gradients are in the time.
void lm_head(benchmark::State& state, std::int64_t tokens, std::int64_t d_model,
             std::int64_t vocab) {
  kept_model().reset();
  Context ctx = Context::cuda();
  LRNNLMHeadModel model(ctx, {.d_model = d_model,
                              .d_state = 16,
                              .n_layer = 0,
                              .vocab_size = vocab,
                              .mixer_types = {},
                              .dtype = DType::bfloat16});
  const Tensor ids = random_ids(ctx, {1, tokens}, vocab);
  const Tensor targets = random_ids(ctx, {1, tokens}, vocab);
  model.parameters().enable_grad(ctx);
  model.parameters().zero_grad(ctx);
  CachingResource pool(std::make_unique<StatisticsResource>(ctx.memory()));
  StatisticsResource memory(pool);
  const auto work = [&] {
    const Context::MemoryScope scope(ctx, memory);
    static_cast<void>(model.loss_and_backward(ctx, ids, targets, {.validate = false}));
  };
  work();  // leaves in the pool the blocks that the recording needs
  Graph graph = Graph::capture(ctx, work);
  for (int i = 0; i < 3; ++i) graph.launch();
  const auto ms = timed(state, ctx, [&] { graph.launch(); });
  report_tokens(state, ms, tokens);
  // Logits, gradient of the weight, gradient of the input.
  const double flops = 3.0 * 2.0 * static_cast<double>(tokens * d_model * vocab);
  state.counters["of_gemm"] = flops / (summarise(ms).median_ms * 1e-3) / gemm_rate(ctx);
  state.counters["peak_MB"] = static_cast<double>(memory.stats().peak_bytes_in_use) / 1e6;
}

void register_lm_head() {
  constexpr std::int64_t kTokens = 16384;
  constexpr std::int64_t kWidth = 768;
  constexpr std::int64_t kVocab = 50280;
  benchmark::RegisterBenchmark(
      detail::concat("lm_head/T:", kTokens, "/H:", kWidth, "/V:", kVocab, "/bfloat16").c_str(),
      [](benchmark::State& s) { lm_head(s, kTokens, kWidth, kVocab); })
      ->UseManualTime()
      ->Iterations(30)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace
}  // namespace lrnn

int main(int argc, char** argv) {
  const auto models = lrnn::language_models();
  lrnn::register_cpu(models.front());
  if (lrnn::Context::cuda_device_count() > 0) {
    lrnn::register_layers();
    lrnn::register_scaling();
    lrnn::register_layer_steps();
    lrnn::register_models(models);
    lrnn::register_lm_head();
  } else {
    std::cerr << "model_bench: no CUDA device: decoding on the CPU alone\n";
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  lrnn::kept_model().reset();  // before the CUDA runtime goes
}
