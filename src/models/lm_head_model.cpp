#include "lrnn/models/lm_head_model.hpp"

#include <algorithm>
#include <cmath>

#include "lrnn/ops/cross_entropy.hpp"
#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/embedding.hpp"
#include "lrnn/ops/linear.hpp"

#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

// Rows of logits that exist at a time in training: V may be 50,000, and B L many thousands. Each
// chunk reads and writes the float32 gradient of the whole head once more. 9 chunks of 16384 rows
// stay below 256 MiB with all that the head needs.
constexpr std::int64_t kLossChunkRows = 1840;

// Products are fast where sizes are multiples of 16 bytes and rows start at cache lines; V may be
// odd.
constexpr std::int64_t kLogitsAlignment = 8;
constexpr std::int64_t kLogitsPitch = 64;

std::int64_t logits_pitch(std::int64_t columns) {
  return (columns + kLogitsPitch - 1) / kLogitsPitch * kLogitsPitch;
}

// Up to here, as in decoding, a product takes any width as it is; beyond, an odd one costs more
// than a copy.
constexpr std::int64_t kFewLogitsRows = 128;

// dx = dz W without the padding rows of W, which may hold anything. The few rows beyond a multiple
// of kLogitsAlignment come first, so that the long sum is the one that is not rounded again.
void head_dx(Context& ctx, TensorView dz, TensorView weight, std::int64_t vocab_size,
             MutableTensorView dx) {
  const std::int64_t aligned = vocab_size / kLogitsAlignment * kLogitsAlignment;
  const auto add = [&](std::int64_t begin, std::int64_t count, bool accumulate) {
    if (count == 0) return;
    linear_backward(ctx, {.dy = dz.slice(1, begin, count),
                          .weight = weight.slice(0, begin, count),
                          .dx = dx,
                          .accumulate_dx = accumulate});
  };
  add(aligned, vocab_size - aligned, false);
  add(0, aligned, aligned != vocab_size);
}

bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16;
}

// Integers of an int32 or int64 tensor.
std::vector<std::int64_t> host_integers(Context& ctx, const char* op, const char* operand,
                                        TensorView t) {
  LRNN_CHECK(t.dtype() == DType::int32 || t.dtype() == DType::int64, DTypeError, op, ": ", operand,
             ": expected int32 or int64, got ", t.dtype());
  if (t.dtype() == DType::int64) return ctx.to_host<std::int64_t>(t);
  const auto values = ctx.to_host<std::int32_t>(t);
  return {values.begin(), values.end()};
}

struct Range {
  std::int64_t low;
  std::int64_t high;
};

// Checks an integer operand and converts it to int32 if need be. `accepted` are single values
// allowed beside the range.
TensorView checked_integers(Context& ctx, const char* op, const char* operand, TensorView t,
                            const Shape& shape, Range range, bool validate, Tensor& owned,
                            std::optional<std::int64_t> also = {}) {
  detail::check_operand(op, operand, ctx, t, shape, t.dtype());
  LRNN_CHECK(t.dtype() == DType::int32 || validate, DTypeError, op, ": ", operand,
             ": expected int32 without validation, got ", t.dtype());
  if (!validate) return t;
  const auto values = host_integers(ctx, op, operand, t);
  for (std::size_t i = 0; i < values.size(); ++i)
    LRNN_CHECK((values[i] >= range.low && values[i] <= range.high) || values[i] == also,
               InvalidArgument, op, ": ", operand, ": expected ", range.low, "..", range.high,
               ", got ", values[i], " at element ", i);
  if (t.dtype() == DType::int32) return t;
  owned =
      ctx.from_host<std::int32_t>(shape, std::vector<std::int32_t>(values.begin(), values.end()));
  return owned;
}

// The last `n` positions of x [B, L, H], as [B, n, H].
Tensor last_positions(Context& ctx, TensorView x, std::int64_t n) {
  const std::int64_t batch = x.dim(0);
  const std::int64_t seqlen = x.dim(1);
  const std::int64_t width = x.dim(2);
  Tensor out = ctx.empty({batch, n, width}, x.dtype());
  cast(ctx, {.src = x.reshape({batch, seqlen * width}).slice(1, (seqlen - n) * width, n * width),
             .dst = out.view().reshape({batch, n * width})});
  return out;
}

// x[b, valid[b] - 1] as [B, 1, H].
Tensor last_valid_positions(Context& ctx, TensorView x, const std::vector<std::int64_t>& valid) {
  const std::int64_t batch = x.dim(0);
  const std::int64_t seqlen = x.dim(1);
  std::vector<std::int32_t> rows;
  for (const std::int64_t n : valid)
    rows.push_back(
        static_cast<std::int32_t>(static_cast<std::int64_t>(rows.size()) * seqlen + n - 1));
  const Tensor ids = ctx.from_host<std::int32_t>({batch, 1}, rows);
  Tensor out = ctx.empty({batch, 1, x.dim(2)}, x.dtype());
  embedding_forward(ctx, {.ids = ids, .weight = x.reshape({batch * seqlen, x.dim(2)}), .y = out});
  return out;
}

bool same_sizes(const MambaStackLayer& a, const MambaStackLayer& b) {
  return a.A_log.shape() == b.A_log.shape() && a.dt_weight.shape() == b.dt_weight.shape() &&
         a.conv_weight.shape() == b.conv_weight.shape();
}

// Sums of the residual stream after the layers that were asked for.
class LayerOutputs {
 public:
  explicit LayerOutputs(const std::vector<std::int64_t>& layers)
      : layers_(layers), outputs_(layers.size()) {}

  // The same rounding as that of the norm that follows: one addition in the wide type.
  void collect(Context& ctx, std::size_t layer, TensorView hidden, TensorView residual) {
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (static_cast<std::size_t>(layers_[i]) != layer) continue;
      outputs_[i] = ctx.empty(hidden.shape(), residual.dtype());
      cast(ctx, {.src = hidden, .dst = outputs_[i]});
      add_to(ctx, {.src = residual, .dst = outputs_[i]});
    }
  }
  [[nodiscard]] std::vector<Tensor> take() { return std::move(outputs_); }

 private:
  const std::vector<std::int64_t>& layers_;
  std::vector<Tensor> outputs_;
};

}  // namespace

struct LRNNLMHeadModel::Inputs {
  TensorView ids;        // [B, L] int32
  TensorView tau;        // [B, L] float32 (float64)
  TensorView positions;  // [B, L] int32
  TensorView lengths;    // [B] int32
  TensorView targets;    // [B, L] int32, for a loss
  InferenceCache* cache = nullptr;
  std::vector<std::int64_t> valid;  // tokens per sequence, as far as the host knows

  Tensor owned_ids, owned_tau, owned_positions, owned_lengths, owned_targets;
};

struct LRNNLMHeadModel::Saved {
  Inputs inputs;
  std::int64_t recompute_blocks = 0;
  std::vector<BlockSaved> blocks;
  AddNormOutput norm_f;

  [[nodiscard]] bool runs_again(std::size_t block) const noexcept {
    return static_cast<std::int64_t>(block) < recompute_blocks;
  }
};

LRNNLMHeadModel::LRNNLMHeadModel(const Device& device, LRNNLMHeadConfig config)
    : config_(config.resolve()), parameters_(std::make_unique<ParameterStore>()) {
  if (!config_.dtype) config_.dtype = DType::float32;
  check_dtype(device);
  const bool narrow_storage = device.is_cpu() && dtype() == DType::bfloat16;
  if (narrow_storage) parameters_->restrict_bfloat16_to_matrices();
  activation_dtype_ = narrow_storage ? DType::float32 : dtype();
  const ParameterScope backbone(*parameters_, "backbone.");
  const Shape table{config_.padded_vocab_size(), config_.d_model};
  embedding_ = &(backbone / "embedding")
                    .add("weight", table, init::normal(config_.initializer_cfg.initializer_range),
                         {.matrix = true});
  const AddNorm::Options norm{.kind = config_.rms_norm ? NormKind::Rms : NormKind::Layer,
                              .eps = config_.norm_epsilon,
                              .fused = config_.fused_add_norm};
  for (std::int64_t i = 0; i < config_.n_layer; ++i)
    blocks_.emplace_back(
        BlockOptions{.mixer_type = config_.mixer_types[static_cast<std::size_t>(i)],
                     .mixer_kwargs = config_.layer_kwargs(i),
                     .mixer_build = config_.mixer_build(),
                     .norm = norm,
                     .residual_dtype =
                         config_.residual_in_fp32 ? accumulate_dtype(dtype()) : activation_dtype_,
                     .mlp_cls = config_.mlp_cls,
                     .d_intermediate = config_.d_intermediate},
        backbone / "layers" / std::to_string(i));
  norm_f_.emplace(backbone / "norm_f", config_.d_model, norm);
  const double bound = 1.0 / std::sqrt(static_cast<double>(config_.d_model));
  head_ = config_.tie_embeddings
              ? embedding_
              : &ParameterScope(*parameters_, "lm_head.")
                     .add("weight", table, init::uniform(bound), {.matrix = true});
}

LRNNLMHeadModel::LRNNLMHeadModel(Context& ctx, LRNNLMHeadConfig config, const ModelOptions& options)
    : LRNNLMHeadModel(ctx.device(), [&] {
        config.dtype = options.dtype ? options.dtype : config.dtype;
        return std::move(config);
      }()) {
  parameters_->materialize(ctx, dtype(), options.seed);
}

void LRNNLMHeadModel::check_dtype(const Device& device) const {
  LRNN_CHECK(device.is_cpu() || dtype() != DType::float64, ConfigError,
             "dtype: expected float32 or bfloat16 on ", device, ", got ", dtype());
}

bool LRNNLMHeadModel::uses_integration_timesteps() const noexcept {
  return std::any_of(blocks_.begin(), blocks_.end(),
                     [](const Block& block) { return block.mixer().uses_integration_timesteps(); });
}

InferenceCache LRNNLMHeadModel::allocate_inference_cache(Context& ctx,
                                                         const CacheOptions& options) const {
  LRNN_CHECK(options.batch_size >= 1 && options.max_seqlen >= 1, InvalidArgument,
             "allocate_inference_cache: expected batch_size >= 1 and max_seqlen >= 1, got ",
             options.batch_size, " and ", options.max_seqlen);
  std::vector<const Mixer*> mixers;
  for (const Block& block : blocks_) mixers.push_back(&block.mixer());
  return {
      ctx, options.batch_size, options.max_seqlen,
      [mixers, options, dtype = activation_dtype_](Context& on) {
        InferenceCache::States states;
        for (const Mixer* mixer : mixers)
          states.push_back(mixer->make_state(on, options.batch_size, options.max_seqlen, dtype));
        return states;
      }};
}

// --- operands ----------------------------------------------------------------------------------

void LRNNLMHeadModel::check_timesteps(Context& ctx, const char* op, TensorView tau,
                                      TensorView lengths) const {
  const auto values = ctx.to_host_as_double(tau);
  const auto valid = lengths ? ctx.to_host<std::int32_t>(lengths) : std::vector<std::int32_t>();
  const auto seqlen = static_cast<std::size_t>(tau.dim(1));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const bool padding =
        !valid.empty() && i % seqlen >= static_cast<std::size_t>(valid[i / seqlen]);
    LRNN_CHECK(padding || (std::isfinite(values[i]) && values[i] > 0), InvalidArgument, op,
               ": integration_timesteps: expected positive and finite values, got ", values[i],
               " at [", i / seqlen, ", ", i % seqlen, "]");
  }
}

LRNNLMHeadModel::Inputs LRNNLMHeadModel::prepare(Context& ctx, const char* op, TensorView input_ids,
                                                 const ForwardOptions& options) const {
  Inputs in;
  detail::check_rank(op, "input_ids", input_ids, 2);
  const std::int64_t batch = input_ids.dim(0);
  const std::int64_t seqlen = input_ids.dim(1);
  LRNN_CHECK(batch >= 1 && seqlen >= 1, ShapeError, op, ": input_ids: expected [B, L], got ",
             input_ids.shape());
  LRNN_CHECK(options.num_last_tokens >= 0 && options.num_last_tokens <= seqlen, InvalidArgument, op,
             ": num_last_tokens: expected 0..", seqlen, ", got ", options.num_last_tokens);
  LRNN_CHECK(options.recompute_blocks >= 0 && options.recompute_blocks <= config_.n_layer,
             InvalidArgument, op, ": recompute_blocks: expected 0..", config_.n_layer, ", got ",
             options.recompute_blocks);
  in.ids = checked_integers(ctx, op, "input_ids", input_ids, {batch, seqlen},
                            {0, config_.vocab_size - 1}, options.validate, in.owned_ids);
  if (options.lengths)
    in.lengths = checked_integers(ctx, op, "lengths", options.lengths, {batch}, {1, seqlen},
                                  options.validate, in.owned_lengths);
  if (options.position_ids)
    in.positions = checked_integers(ctx, op, "position_ids", options.position_ids, {batch, seqlen},
                                    {0, INT32_MAX}, options.validate, in.owned_positions);
  if (const TensorView tau = options.integration_timesteps) {
    LRNN_CHECK(uses_integration_timesteps(), InvalidArgument, op,
               ": integration_timesteps: no layer of this model uses them (Mamba does, and S5 with "
               "event=true)");
    LRNN_CHECK(is_float(tau.dtype()), DTypeError, op,
               ": integration_timesteps: expected a float dtype, got ", tau.dtype());
    detail::check_operand(op, "integration_timesteps", ctx, tau, {batch, seqlen}, tau.dtype());
    in.tau = tau;
    const DType wide = accumulate_dtype(dtype());
    if (tau.dtype() != wide) {
      in.owned_tau = ctx.empty(tau.shape(), wide);
      cast(ctx, {.src = tau, .dst = in.owned_tau});
      in.tau = in.owned_tau;
    }
    if (options.validate) check_timesteps(ctx, op, in.tau, in.lengths);
  }
  in.valid.assign(static_cast<std::size_t>(batch), seqlen);
  if (in.lengths && options.validate) in.valid = host_integers(ctx, op, "lengths", in.lengths);
  LRNN_CHECK(!options.last_valid_token || !in.lengths || options.validate, InvalidArgument, op,
             ": last_valid_token with lengths needs validate");
  for (const std::int64_t layer : options.layer_outputs)
    LRNN_CHECK(layer >= 0 && layer < config_.n_layer, InvalidArgument, op,
               ": layer_outputs: expected 0..", config_.n_layer - 1, ", got ", layer);
  in.cache = options.cache;
  if (in.cache == nullptr) return in;
  LRNN_CHECK(in.cache->batch_size() == batch, InvalidArgument, op, ": cache: expected batch ",
             in.cache->batch_size(), ", got input_ids ", input_ids.shape());
  in.cache->check_room(op, seqlen);
  return in;
}

LRNNLMHeadModel::Inputs LRNNLMHeadModel::prepare_with_targets(Context& ctx, const char* op,
                                                              TensorView input_ids,
                                                              TensorView targets,
                                                              const ForwardOptions& options) const {
  Inputs in = prepare(ctx, op, input_ids, options);
  LRNN_CHECK(options.cache == nullptr && options.num_last_tokens == 0 && !options.last_valid_token,
             InvalidArgument, op, ": a loss takes neither a cache nor a choice of positions");
  LRNN_CHECK(options.layer_outputs.empty(), InvalidArgument, op,
             ": a loss returns no layer_outputs; see encode_for_backward");
  in.targets =
      checked_integers(ctx, op, "targets", targets, input_ids.shape(), {0, config_.vocab_size - 1},
                       options.validate, in.owned_targets, kIgnoreIndex);
  return in;
}

// --- forward and step --------------------------------------------------------------------------

Tensor LRNNLMHeadModel::embed(Context& ctx, TensorView ids) const {
  Tensor hidden = ctx.empty({ids.dim(0), ids.dim(1), config_.d_model}, activation_dtype_);
  embedding_forward(ctx, {.ids = ids, .weight = embedding_->value, .y = hidden});
  return hidden;
}

EncoderOutput LRNNLMHeadModel::hidden_states(Context& ctx, const Inputs& inputs, Saved* saved,
                                             const ForwardOptions& options) const {
  const bool keep = saved != nullptr;
  Tensor hidden = embed(ctx, inputs.ids);
  LayerOutputs layer_outputs(options.layer_outputs);
  BlockInputs block_inputs{.integration_timesteps = inputs.tau,
                           .position_ids = inputs.positions,
                           .lengths = inputs.lengths};
  BlockSaved last;
  Tensor carried;  // a residual that its block does not keep
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    BlockSaved block;
    block_inputs.state = inputs.cache != nullptr ? &inputs.cache->state(i) : nullptr;
    hidden = blocks_[i].forward(ctx, std::move(hidden), block_inputs, block, keep);
    block_inputs.residual = block.residual();
    if (keep && saved->runs_again(i)) {
      carried = block.keep_first_norm();
      if (carried) block_inputs.residual = carried;
    }
    layer_outputs.collect(ctx, i, hidden, block_inputs.residual);
    if (keep)
      saved->blocks.push_back(std::move(block));
    else
      last = std::move(block);
  }
  TensorView residual = block_inputs.residual;
  if (keep) {
    saved->norm_f = norm_f_->forward(ctx, std::move(hidden), residual,
                                     residual ? residual.dtype() : activation_dtype_, true);
    return {std::move(saved->norm_f.y), layer_outputs.take()};
  }
  const auto pick = [&](TensorView x) -> Tensor {
    if (!x) return {};
    if (options.last_valid_token) return last_valid_positions(ctx, x, inputs.valid);
    return last_positions(ctx, x, options.num_last_tokens);
  };
  if (!options.last_valid_token && options.num_last_tokens == 0)
    return {norm_f_->normalize(ctx, hidden, residual), layer_outputs.take()};
  const Tensor some = pick(hidden);
  const Tensor some_residual = pick(residual);
  return {norm_f_->normalize(ctx, some, some_residual), layer_outputs.take()};
}

Tensor LRNNLMHeadModel::head(Context& ctx, TensorView x) const {
  Tensor logits = ctx.empty({x.dim(0), x.dim(1), config_.vocab_size}, activation_dtype_);
  const std::int64_t rows = x.dim(0) * x.dim(1);
  if (ctx.device().is_cuda() && rows > kFewLogitsRows && config_.vocab_size % kLogitsAlignment != 0)
    aligned_head(ctx, x.reshape({rows, config_.d_model}),
                 logits.view().reshape({rows, config_.vocab_size}));
  else
    linear_forward(ctx, {.x = x,
                         .weight = head_->value.slice(0, 0, config_.vocab_size),
                         .y = logits,
                         .stable_weight = true});
  return logits;
}

void LRNNLMHeadModel::aligned_head(Context& ctx, TensorView x, MutableTensorView logits) const {
  const std::int64_t rows = x.dim(0);
  const std::int64_t columns = config_.padded_vocab_size();
  Tensor aligned =
      ctx.empty({std::min(rows, kLossChunkRows), logits_pitch(columns)}, activation_dtype_);
  for (std::int64_t begin = 0; begin < rows; begin += kLossChunkRows) {
    const std::int64_t count = std::min(kLossChunkRows, rows - begin);
    const MutableTensorView z = aligned.view().slice(0, 0, count);
    linear_forward(ctx, {.x = x.slice(0, begin, count),
                         .weight = head_->value,
                         .y = z.slice(1, 0, columns),
                         .stable_weight = true});
    cast(ctx, {.src = z.slice(1, 0, config_.vocab_size), .dst = logits.slice(0, begin, count)});
  }
}

CausalLMOutput LRNNLMHeadModel::forward(Context& ctx, TensorView input_ids,
                                        const ForwardOptions& options) const {
  const Inputs inputs = prepare(ctx, "LRNNLMHeadModel::forward", input_ids, options);
  EncoderOutput x = hidden_states(ctx, inputs, nullptr, options);
  if (inputs.cache != nullptr) inputs.cache->advance(inputs.valid);
  return {head(ctx, x.hidden), std::move(x.layer_outputs)};
}

EncoderOutput LRNNLMHeadModel::encode(Context& ctx, TensorView input_ids,
                                      const ForwardOptions& options) const {
  const Inputs inputs = prepare(ctx, "LRNNLMHeadModel::encode", input_ids, options);
  EncoderOutput out = hidden_states(ctx, inputs, nullptr, options);
  if (inputs.cache != nullptr) inputs.cache->advance(inputs.valid);
  return out;
}

std::vector<MambaStackLayer> LRNNLMHeadModel::stack_from(std::size_t begin,
                                                         const InferenceCache& cache) const {
  std::vector<MambaStackLayer> run;
  for (std::size_t i = begin; i < blocks_.size(); ++i) {
    const auto layer = blocks_[i].stack_layer(cache.state(i));
    if (!layer || (!run.empty() && !same_sizes(*layer, run.front()))) break;
    run.push_back(*layer);
  }
  return run;
}

Tensor LRNNLMHeadModel::step_stack(Context& ctx, std::span<const MambaStackLayer> layers,
                                   TensorView hidden, TensorView residual,
                                   BlockSaved& saved) const {
  const Shape rows = {hidden.dim(0), config_.d_model};
  const auto flat = [&](auto t) { return t ? t.reshape(rows) : t; };
  Tensor y = ctx.empty(hidden.shape(), hidden.dtype());
  saved.norm.residual = ctx.empty(
      hidden.shape(), config_.residual_in_fp32 ? accumulate_dtype(dtype()) : activation_dtype_);
  mamba_stack_step(ctx, {.layers = layers,
                         .eps = config_.norm_epsilon,
                         .x = flat(hidden),
                         .residual = flat(residual),
                         .y = flat(y.view()),
                         .residual_out = flat(saved.norm.residual.view())});
  return y;
}

CausalLMOutput LRNNLMHeadModel::step(Context& ctx, TensorView input_ids, InferenceCache& cache,
                                     const StepOptions& options) const {
  constexpr const char* op = "LRNNLMHeadModel::step";
  detail::check_rank(op, "input_ids", input_ids, 2);
  LRNN_CHECK(input_ids.dim(1) == 1, ShapeError, op, ": input_ids: expected [B, 1], got ",
             input_ids.shape());
  const auto column = [&](TensorView t) { return t ? t.reshape({t.numel(), 1}) : t; };
  const Inputs inputs = prepare(ctx, op, input_ids,
                                {.integration_timesteps = column(options.integration_timesteps),
                                 .position_ids = column(options.position_ids),
                                 .cache = &cache,
                                 .layer_outputs = options.layer_outputs,
                                 .validate = options.validate});
  Tensor hidden = embed(ctx, inputs.ids);
  BlockInputs block_inputs{.integration_timesteps = inputs.tau, .position_ids = inputs.positions};
  LayerOutputs layer_outputs(options.layer_outputs);
  BlockSaved last;
  const bool whole_runs = options.layer_outputs.empty() && !inputs.tau;
  for (std::size_t i = 0; i < blocks_.size();) {
    BlockSaved block;
    const auto run = whole_runs ? stack_from(i, cache) : std::vector<MambaStackLayer>();
    if (!run.empty()) {
      hidden = step_stack(ctx, run, hidden, block_inputs.residual, block);
    } else {
      block_inputs.state = &cache.state(i);
      hidden = blocks_[i].step(ctx, std::move(hidden), block_inputs, block);
    }
    block_inputs.residual = block.residual();
    layer_outputs.collect(ctx, i, hidden, block_inputs.residual);
    last = std::move(block);
    i += std::max<std::size_t>(1, run.size());
  }
  cache.advance(1);
  return {head(ctx, norm_f_->normalize(ctx, hidden, block_inputs.residual)), layer_outputs.take()};
}

// --- loss and backward -------------------------------------------------------------------------

Tensor LRNNLMHeadModel::head_loss(Context& ctx, TensorView x, TensorView targets,
                                  TensorView lengths, MutableTensorView dx) const {
  const DType wide = accumulate_dtype(dtype());
  const std::int64_t rows = targets.numel();
  // Padding rows of the table have logits, so that sizes are aligned: nobody reads them, and their
  // gradients are 0.
  const std::int64_t columns = config_.padded_vocab_size();
  Tensor counted = ctx.empty(targets.shape(), DType::int32);
  Tensor scale = ctx.empty({1}, wide);
  prepare_targets(ctx,
                  {.targets = targets, .lengths = lengths, .counted = counted, .scale = scale});
  const TensorView flat_targets = counted.view().reshape({rows});
  const TensorView flat_x = x.reshape({rows, config_.d_model});
  const TensorView weight = head_->value;
  Tensor losses = ctx.empty({rows}, wide);
  Tensor logits =
      ctx.empty({std::min(rows, kLossChunkRows), logits_pitch(columns)}, activation_dtype_);
  for (std::int64_t begin = 0; begin < rows; begin += kLossChunkRows) {
    const std::int64_t count = std::min(kLossChunkRows, rows - begin);
    const MutableTensorView z = logits.view().slice(0, 0, count).slice(1, 0, columns);
    const TensorView x_chunk = flat_x.slice(0, begin, count);
    linear_forward(ctx, {.x = x_chunk, .weight = weight, .y = z});
    CrossEntropyForward args{.logits = z,
                             .targets = flat_targets.slice(0, begin, count),
                             .vocab_size = config_.vocab_size,
                             .losses = losses.view().slice(0, begin, count)};
    if (dx) {
      args.scale = scale;
      args.dlogits = z;
    }
    cross_entropy_forward(ctx, args);
    if (!dx) continue;
    linear_backward(ctx, {.dy = z, .x = x_chunk, .dweight = head_->grad});
    head_dx(ctx, z, weight, config_.vocab_size,
            dx.reshape({rows, config_.d_model}).slice(0, begin, count));
  }
  Tensor loss = ctx.empty({}, wide);
  mean_loss(ctx, {.losses = losses, .scale = scale, .loss = loss});
  return loss;
}

Tensor LRNNLMHeadModel::loss(Context& ctx, TensorView input_ids, TensorView targets,
                             const ForwardOptions& options) const {
  constexpr const char* op = "LRNNLMHeadModel::loss";
  const Inputs inputs = prepare_with_targets(ctx, op, input_ids, targets, options);
  const Tensor x = hidden_states(ctx, inputs, nullptr, {}).hidden;
  return head_loss(ctx, x, inputs.targets, inputs.lengths, {});
}

Tensor LRNNLMHeadModel::loss_and_backward(Context& ctx, TensorView input_ids, TensorView targets,
                                          const ForwardOptions& options) {
  constexpr const char* op = "LRNNLMHeadModel::loss_and_backward";
  Saved saved;
  saved.inputs = prepare_with_targets(ctx, op, input_ids, targets, options);
  saved.recompute_blocks = options.recompute_blocks;
  parameters_->enable_grad(ctx);
  Tensor loss;
  Tensor dx;
  {
    const Tensor x = hidden_states(ctx, saved.inputs, &saved, {}).hidden;
    dx = ctx.empty(x.shape(), x.dtype());
    loss = head_loss(ctx, x, saved.inputs.targets, saved.inputs.lengths, dx);
  }
  AddNormGradients gradients = norm_f_->backward(ctx, saved.norm_f, dx, {});
  dx = {};
  backward_blocks(ctx, saved, std::move(gradients));
  return loss;
}

void LRNNLMHeadModel::backward_blocks(Context& ctx, Saved& saved, AddNormGradients gradients) {
  saved.norm_f = {};
  const BlockInputs block_inputs{.integration_timesteps = saved.inputs.tau,
                                 .position_ids = saved.inputs.positions,
                                 .lengths = saved.inputs.lengths};
  for (std::size_t i = blocks_.size(); i-- > 0;) {
    if (saved.runs_again(i)) blocks_[i].run_again(ctx, block_inputs, saved.blocks[i]);
    gradients =
        blocks_[i].backward(ctx, std::move(saved.blocks[i]), gradients.dx, gradients.residual());
  }
  embedding_backward(ctx,
                     {.ids = saved.inputs.ids, .dy = gradients.dx, .dweight = embedding_->grad});
}

LRNNLMHeadModel::Encoding LRNNLMHeadModel::encode_for_backward(Context& ctx, TensorView input_ids,
                                                               const ForwardOptions& options) {
  constexpr const char* op = "LRNNLMHeadModel::encode_for_backward";
  LRNN_CHECK(options.cache == nullptr && options.num_last_tokens == 0 && !options.last_valid_token,
             InvalidArgument, op, ": takes neither a cache nor a choice of positions");
  parameters_->enable_grad(ctx);
  Encoding out;
  out.saved_ = std::make_shared<Saved>();
  out.saved_->inputs = prepare(ctx, op, input_ids, options);
  out.saved_->recompute_blocks = options.recompute_blocks;
  // The embedding's gradient needs the ids long after the caller may have let go of them.
  if (!out.saved_->inputs.owned_ids) {
    out.saved_->inputs.owned_ids = ctx.clone(out.saved_->inputs.ids);
    out.saved_->inputs.ids = out.saved_->inputs.owned_ids;
  }
  EncoderOutput x = hidden_states(ctx, out.saved_->inputs, out.saved_.get(), options);
  out.hidden_ = std::move(x.hidden);
  out.layer_outputs_ = std::move(x.layer_outputs);
  return out;
}

void LRNNLMHeadModel::backward(Context& ctx, Encoding encoding, TensorView dhidden) {
  constexpr const char* op = "LRNNLMHeadModel::backward";
  LRNN_CHECK(encoding.saved_ != nullptr, InvalidArgument, op, ": encoding: used before");
  detail::check_operand(op, "dhidden", ctx, dhidden, encoding.hidden_.shape(),
                        encoding.hidden_.dtype());
  parameters_->enable_grad(ctx);
  Saved& saved = *encoding.saved_;
  backward_blocks(ctx, saved, norm_f_->backward(ctx, saved.norm_f, dhidden, {}));
}

}  // namespace lrnn
