#include "lrnn/generation/generate.hpp"

#include <algorithm>

#include "lrnn/core/graph.hpp"
#include "lrnn/ops/sample.hpp"

#include "core/runtime.hpp"
#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

constexpr const char* kOp = "generate";
constexpr std::int64_t kMaxSamples = std::int64_t{1} << 20;

// Measures what a recording needs from its arena, which never reuses a block.
class CountingResource final : public MemoryResource {
 public:
  explicit CountingResource(MemoryResource& upstream) : upstream_(&upstream) {}
  void* allocate(std::size_t bytes, Stream stream) override {
    total_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return upstream_->allocate(bytes, stream);
  }
  void deallocate(void* ptr, std::size_t bytes, Stream stream) noexcept override {
    upstream_->deallocate(ptr, bytes, stream);
  }
  [[nodiscard]] Device device() const noexcept override { return upstream_->device(); }
  [[nodiscard]] std::size_t total() const noexcept { return total_; }

 private:
  MemoryResource* upstream_;
  std::size_t total_ = 0;
};

Tensor prompt_as_int32(Context& ctx, TensorView prompt) {
  if (prompt.dtype() == DType::int32) return ctx.clone(prompt);
  const auto wide = ctx.to_host<std::int64_t>(prompt);
  std::vector<std::int32_t> ids;
  for (const std::int64_t id : wide) {
    LRNN_CHECK(id >= 0 && id <= INT32_MAX, InvalidArgument, kOp, ": prompt: token id ", id);
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return ctx.from_host<std::int32_t>(prompt.shape(), ids);
}

// [B, ...] to [B count, ...], every row `count` times.
Tensor repeated_rows(Context& ctx, TensorView x, std::int64_t count) {
  const std::int64_t rows = x.dim(0) * count;
  const std::int64_t width = x.numel() / x.dim(0);
  Tensor out = ctx.empty({rows, width}, x.dtype());
  for (std::int64_t r = 0; r < rows; ++r)
    ctx.copy(out.view().slice(0, r, 1), x.reshape({x.dim(0), width}).slice(0, r / count, 1));
  return out;
}

// One generation: the tokens just drawn, and everything the next draw depends on.
class Generation {
 public:
  Generation(Context& ctx, const LRNNLMHeadModel& model, TensorView prompt,
             const GenerateOptions& options)
      : ctx_(ctx),
        model_(model),
        options_(options),
        prompt_(prompt_as_int32(ctx, prompt)),
        rows_(prompt.dim(0) * options.num_samples),
        owned_cache_(options.cache != nullptr
                         ? std::optional<InferenceCache>()
                         : model.allocate_inference_cache(
                               ctx, {.batch_size = prompt.dim(0),
                                     .max_seqlen = prompt.dim(1) + options.max_new_tokens})),
        cache_(options.cache != nullptr ? *options.cache : *owned_cache_),
        token_(ctx.empty({rows_, 1}, DType::int32)),
        counters_(ctx.zeros({rows_}, DType::int64)),
        drawn_(ctx.empty({options.max_new_tokens, rows_}, DType::int32)),
        own_tokens_(static_cast<std::size_t>(rows_)),
        ended_(static_cast<std::size_t>(rows_), false),
        readback_(host_looks() ? ctx.runtime().make_readback(token_.view().nbytes()) : nullptr),
        runs_ahead_(ctx.device().is_cuda() && options.cache == nullptr && host_looks()) {
    cache_.check_room(kOp, prompt.dim(1) + options.max_new_tokens - 1);
    if (options.repetition_penalty == 1.0) return;
    const std::int64_t vocab_size = model.config().vocab_size;
    seen_ = ctx.zeros({batch(), seen_words(vocab_size)}, DType::int32);
    mark_seen(
        ctx, {.ids = prompt_, .vocab_size = vocab_size, .seen = seen_, .lengths = options.lengths});
    if (options.num_samples > 1) seen_ = repeated_rows(ctx, seen_, options.num_samples);
  }

  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;
  // Nothing that a step uses is taken apart while it runs.
  ~Generation() {
    try {
      if (runs_ahead_) ctx_.synchronize();
    } catch (const std::exception&) {  // it has been reported, or will be
    }
  }

  Tensor run() {
    prefill();
    for (;;) {
      keep_tokens();
      const bool last = count_ == options_.max_new_tokens;
      if (runs_ahead_ && !last) next();
      if (!wants_more() || last) return assemble();
      if (!runs_ahead_) next();
    }
  }

 private:
  [[nodiscard]] std::int64_t batch() const { return prompt_.dim(0); }

  void prefill() {
    const std::int64_t seqlen = prompt_.dim(1);
    // A chunk may not lie wholly in the padding of a sequence.
    const std::int64_t chunk =
        options_.lengths || options_.prefill_chunk == 0 ? seqlen : options_.prefill_chunk;
    Tensor logits;
    for (std::int64_t begin = 0; begin < seqlen; begin += chunk) {
      const std::int64_t length = std::min(chunk, seqlen - begin);
      const Tensor ids = begin == 0 && length == seqlen ? Tensor() : columns(begin, length);
      logits =
          model_
              .forward(ctx_, ids ? ids.view() : prompt_.view(),
                       {.last_valid_token = true, .lengths = options_.lengths, .cache = &cache_})
              .logits;
    }
    if (options_.num_samples > 1) {
      copy_states_to_samples();
      const Tensor of_samples = repeated_rows(ctx_, logits, options_.num_samples);
      return draw(of_samples.view().reshape({rows_, 1, logits.dim(2)}));
    }
    draw(logits);
  }

  void copy_states_to_samples() {
    auto wide = model_.allocate_inference_cache(
        ctx_, {.batch_size = rows_, .max_seqlen = cache_.max_seqlen()});
    for (std::int64_t r = 0; r < rows_; ++r)
      wide.copy_sequence(ctx_, r, cache_, r / options_.num_samples);
    *owned_cache_ = std::move(wide);
  }

  [[nodiscard]] Tensor columns(std::int64_t begin, std::int64_t length) {
    Tensor out = ctx_.empty({batch(), length}, DType::int32);
    for (std::int64_t b = 0; b < batch(); ++b)
      ctx_.copy(out.view().slice(0, b, 1).reshape({length}),
                prompt_.view().slice(0, b, 1).reshape({prompt_.dim(1)}).slice(0, begin, length));
    return out;
  }

  void draw(TensorView logits) {
    sample_forward(ctx_, {.logits = logits,
                          .options = {.temperature = options_.temperature,
                                      .top_k = options_.top_k,
                                      .top_p = options_.top_p,
                                      .min_p = options_.min_p,
                                      .repetition_penalty = options_.repetition_penalty},
                          .seed = options_.seed,
                          .counters = counters_,
                          .seen = seen_ ? seen_.view() : MutableTensorView(),
                          .ids = token_});
  }

  void step_and_draw() {
    const auto output = model_.step(ctx_, token_, cache_, {.validate = false});
    draw(output.logits);
  }

  // The first step runs as it is, which loads the kernels and measures the memory of a recording.
  void next() {
    const bool record = options_.cuda_graph && ctx_.device().is_cuda();
    if (!record) return step_and_draw();
    if (count_ == 1) {
      CountingResource counting(ctx_.memory());
      {
        const Context::MemoryScope scope(ctx_, counting);
        step_and_draw();
      }
      arena_bytes_ = counting.total();
      return;
    }
    if (!graph_) {
      arena_ = std::make_unique<ArenaResource>(ctx_.memory(), arena_bytes_, ctx_.stream());
      const Context::MemoryScope scope(ctx_, *arena_);
      graph_ = std::make_unique<Graph>(Graph::capture(ctx_, [&] { step_and_draw(); }));
    } else {
      cache_.check_room(kOp, 1);
      cache_.advance(1);  // the recording itself has counted its first launch
    }
    graph_->launch();
  }

  void keep_tokens() {
    ctx_.copy(drawn_.view().slice(0, count_, 1).reshape({rows_, 1}), token_);
    ++count_;
    if (host_looks()) readback_->start(token_);
  }

  [[nodiscard]] bool host_looks() const { return may_end() || options_.on_tokens; }
  [[nodiscard]] bool may_end() const {
    return options_.eos_token || !options_.stop_sequences.empty();
  }
  [[nodiscard]] std::int32_t pad_token() const {
    return options_.pad_token.value_or(options_.eos_token.value_or(0));
  }

  [[nodiscard]] bool is_end(const std::vector<std::int32_t>& tokens) const {
    if (tokens.back() == options_.eos_token) return true;
    return std::any_of(options_.stop_sequences.begin(), options_.stop_sequences.end(),
                       [&](const std::vector<std::int32_t>& stop) {
                         return stop.size() <= tokens.size() &&
                                std::equal(stop.rbegin(), stop.rend(), tokens.rbegin());
                       });
  }

  [[nodiscard]] bool wants_more() {
    if (!host_looks()) return true;
    const auto* const drawn = static_cast<const std::int32_t*>(readback_->wait());
    std::vector<std::int32_t> tokens(drawn, drawn + rows_);
    for (std::size_t b = 0; may_end() && b < tokens.size(); ++b) {
      if (ended_[b]) {
        tokens[b] = pad_token();
        continue;
      }
      own_tokens_[b].push_back(tokens[b]);
      ended_[b] = is_end(own_tokens_[b]);
    }
    const bool go_on = !options_.on_tokens || options_.on_tokens(tokens);
    return go_on && !std::all_of(ended_.begin(), ended_.end(), [](bool e) { return e; });
  }

  [[nodiscard]] Tensor assemble() {
    const auto prompt = ctx_.to_host<std::int32_t>(prompt_);
    const auto drawn = ctx_.to_host<std::int32_t>(drawn_);
    const auto seqlen = static_cast<std::size_t>(prompt_.dim(1));
    const auto rows = static_cast<std::size_t>(rows_);
    const auto samples = static_cast<std::size_t>(options_.num_samples);
    std::vector<std::int32_t> out;
    std::vector<std::int64_t> lengths;
    for (std::size_t b = 0; b < rows; ++b) {
      const auto begin = prompt.begin() + static_cast<std::ptrdiff_t>(b / samples * seqlen);
      out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(seqlen));
      lengths.push_back(may_end() ? static_cast<std::int64_t>(own_tokens_[b].size()) : count_);
      for (std::int64_t i = 0; i < count_; ++i)
        out.push_back(i < lengths[b] ? drawn[static_cast<std::size_t>(i) * rows + b] : pad_token());
    }
    if (options_.generated_lengths != nullptr) *options_.generated_lengths = lengths;
    return ctx_.from_host<std::int32_t>({rows_, prompt_.dim(1) + count_}, out);
  }

  Context& ctx_;
  const LRNNLMHeadModel& model_;
  const GenerateOptions& options_;
  Tensor prompt_;
  std::int64_t rows_;  // sequences: prompts times samples
  std::optional<InferenceCache> owned_cache_;
  InferenceCache& cache_;
  Tensor token_;                                       // [rows, 1] drawn last
  Tensor counters_;                                    // [rows] random numbers used
  Tensor seen_;                                        // [rows, words] tokens that occurred
  Tensor drawn_;                                       // [n, rows]
  std::vector<std::vector<std::int32_t>> own_tokens_;  // drawn by each sequence until it ended
  std::vector<bool> ended_;
  std::unique_ptr<Readback> readback_;
  // The host looks at tokens while the step behind them runs, one too many at the end. So the
  // states must be of no use to anybody else.
  bool runs_ahead_;
  std::int64_t count_ = 0;
  std::size_t arena_bytes_ = 0;
  std::unique_ptr<ArenaResource> arena_;
  std::unique_ptr<Graph> graph_;
};

}  // namespace

Tensor generate(Context& ctx, const LRNNLMHeadModel& model, TensorView prompt,
                const GenerateOptions& options) {
  detail::check_rank(kOp, "prompt", prompt, 2);
  LRNN_CHECK(prompt.dtype() == DType::int32 || prompt.dtype() == DType::int64, DTypeError, kOp,
             ": prompt: expected int32 or int64, got ", prompt.dtype());
  detail::check_operand(kOp, "prompt", ctx, prompt, prompt.shape(), prompt.dtype());
  LRNN_CHECK(prompt.dim(0) >= 1 && prompt.dim(1) >= 1, ShapeError, kOp,
             ": prompt: expected [B, L], got ", prompt.shape());
  LRNN_CHECK(options.max_new_tokens >= 0, InvalidArgument, kOp,
             ": max_new_tokens: expected >= 0, got ", options.max_new_tokens);
  // The bound keeps the product of all counts far from 2^63.
  LRNN_CHECK(options.num_samples >= 1 && options.num_samples <= kMaxSamples, InvalidArgument, kOp,
             ": num_samples: expected 1..", kMaxSamples, ", got ", options.num_samples);
  LRNN_CHECK(options.prefill_chunk >= 0, InvalidArgument, kOp,
             ": prefill_chunk: expected >= 0, got ", options.prefill_chunk);
  for (const auto& stop : options.stop_sequences)
    LRNN_CHECK(!stop.empty(), InvalidArgument, kOp,
               ": stop_sequences: expected at least one token in each");
  LRNN_CHECK(options.cache == nullptr || options.cache->batch_size() == prompt.dim(0),
             InvalidArgument, kOp, ": cache: expected batch ", prompt.dim(0), ", got ",
             options.cache == nullptr ? 0 : options.cache->batch_size());
  LRNN_CHECK(options.cache == nullptr || options.num_samples == 1, InvalidArgument, kOp,
             ": num_samples: expected 1 with a cache, got ", options.num_samples);
  if (options.max_new_tokens == 0) {
    const std::int64_t rows = prompt.dim(0) * options.num_samples;
    if (options.generated_lengths != nullptr)
      options.generated_lengths->assign(static_cast<std::size_t>(rows), 0);
    const Tensor ids = prompt_as_int32(ctx, prompt);
    return repeated_rows(ctx, ids, options.num_samples);
  }
  return Generation(ctx, model, prompt, options).run();
}

}  // namespace lrnn
