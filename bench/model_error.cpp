#include "model_error.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <random>

#include "lrnn/core/random.hpp"
#include "lrnn/ops/cross_entropy.hpp"

#include "io/temporary_directory.hpp"

namespace lrnn::bench {
namespace {

// By way of files: a model that is loaded draws no initial values, which takes longer.
LRNNLMHeadModel in_double(Context& from, Context& cpu, const LRNNLMHeadModel& model) {
  const detail::TemporaryDirectory folder(
      std::filesystem::temp_directory_path() /
      ("model_error." + std::to_string(std::random_device{}())));
  model.save_pretrained(from, folder.path());
  return LRNNLMHeadModel::from_pretrained(cpu, folder.path(), {.dtype = DType::float64});
}

double largest_difference(const std::vector<double>& is, const std::vector<double>& exact) {
  double difference = 0;
  double largest = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double d = std::abs(is[i] - exact[i]);
    if (std::isnan(d)) return d;
    difference = std::max(difference, d);
    largest = std::max(largest, std::abs(exact[i]));
  }
  return difference / largest;
}

// Logits of the first sequences of a batch after three tokens.
std::vector<double> logits_after_steps(Context& ctx, const LRNNLMHeadModel& model,
                                       std::int64_t batch, std::int64_t sequences) {
  constexpr int kTokens = 3;
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = batch, .max_seqlen = kTokens});
  Rng rng(9, "tokens");
  std::vector<double> logits;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(batch));
    const auto vocab = static_cast<std::uint64_t>(model.config().vocab_size);
    const auto seed = static_cast<std::int32_t>(rng.below(vocab / 2));
    for (std::size_t b = 0; b < ids.size(); ++b) ids[b] = seed + static_cast<std::int32_t>(b);
    const Tensor out = model.step(ctx, ctx.from_host<std::int32_t>({batch, 1}, ids), cache).logits;
    logits = ctx.to_host_as_double(out.view().slice(0, 0, sequences));
  }
  return logits;
}

std::vector<double> logits_of_last_token(Context& ctx, const LRNNLMHeadModel& model,
                                         const Tensor& ids) {
  const Tensor logits = model.forward(ctx, ids, {.num_last_tokens = 1}).logits;
  return ctx.to_host_as_double(logits.view().slice(0, 0, 1));
}

// The first `sequences` of [B, L] int32, moved to the CPU.
Tensor first_on_cpu(Context& from, Context& cpu, const Tensor& ids, std::int64_t sequences) {
  return cpu.from_host<std::int32_t>({sequences, ids.dim(1)},
                                     from.to_host<std::int32_t>(ids.view().slice(0, 0, sequences)));
}

// |g - exact| / |exact| over all parameters.
double gradient_difference(Context& ctx, const ParameterStore& of, Context& cpu,
                           ParameterStore& exact) {
  double difference = 0;
  double norm = 0;
  for (const Parameter& p : of) {
    const auto is = ctx.to_host_as_double(p.grad);
    const auto wanted = cpu.to_host_as_double(exact.at(p.name).grad);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      difference += (is[i] - wanted[i]) * (is[i] - wanted[i]);
      norm += wanted[i] * wanted[i];
    }
  }
  return std::sqrt(difference / norm);
}

struct LayerResults {
  Tensor y, dx;
};

LayerResults forward_and_backward(Context& ctx, const Mixer& mixer, ParameterStore& store,
                                  TensorView x, TensorView dy) {
  store.enable_grad(ctx);
  store.zero_grad(ctx);
  LayerResults out{ctx.empty(x.shape(), x.dtype()), ctx.empty(x.shape(), x.dtype())};
  const auto saved = mixer.forward(ctx, {.x = x, .y = out.y}, true);
  mixer.backward(ctx, *saved, {.dy = dy, .dx = out.dx});
  return out;
}

// Of [B, L, H] the first tokens of the first sequence, [1, tokens, H].
template <class View>
View first_tokens(View t, std::int64_t tokens) {
  const std::int64_t width = t.dim(2);
  return t.reshape({t.dim(0) * t.dim(1), width}).slice(0, 0, tokens).reshape({1, tokens, width});
}

double loss_and_gradients(Context& ctx, LRNNLMHeadModel& model, const Tensor& ids,
                          const Tensor& targets) {
  model.parameters().enable_grad(ctx);
  model.parameters().zero_grad(ctx);
  return ctx.to_host_as_double(model.loss_and_backward(ctx, ids, targets)).front();
}

}  // namespace

LayerError layer_error(Context& ctx, MixerType type, const MixerBuild& build, const Mixer& mixer,
                       ParameterStore& store, const Tensor& x, const Tensor& dy) {
  const std::int64_t tokens = std::min<std::int64_t>(x.dim(1), 4096);
  Context cpu = Context::cpu();
  ParameterStore exact_store;
  const auto exact = make_mixer(type, {}, build, ParameterScope(exact_store, "mixer."));
  exact_store.materialize(cpu, DType::float64, 0, false);
  for (const Parameter& p : store)
    cpu.write_from_host(exact_store.at(p.name).value, ctx.to_host_as_double(p.value));
  const auto on_cpu = [&](const Tensor& t) {
    return cpu.from_host_as({1, tokens, t.dim(2)}, DType::float64,
                            ctx.to_host_as_double(first_tokens(t.view(), tokens)));
  };
  Tensor first_dy = ctx.zeros(dy.shape(), dy.dtype());
  ctx.copy(first_tokens(first_dy.view(), tokens), first_tokens(dy.view(), tokens));
  const LayerResults is = forward_and_backward(ctx, mixer, store, x, first_dy);
  const LayerResults wanted = forward_and_backward(cpu, *exact, exact_store, on_cpu(x), on_cpu(dy));
  const auto difference = [&](const Tensor& got, const Tensor& exact_value) {
    return largest_difference(ctx.to_host_as_double(first_tokens(got.view(), tokens)),
                              cpu.to_host_as_double(exact_value));
  };
  return {difference(is.y, wanted.y), difference(is.dx, wanted.dx),
          gradient_difference(ctx, store, cpu, exact_store)};
}

double decode_error(Context& ctx, const LRNNLMHeadModel& model, std::int64_t batch) {
  Context cpu = Context::cpu();
  const LRNNLMHeadModel exact = in_double(ctx, cpu, model);
  const std::int64_t sequences = std::min<std::int64_t>(batch, 2);
  return largest_difference(logits_after_steps(ctx, model, batch, sequences),
                            logits_after_steps(cpu, exact, sequences, sequences));
}

double prefill_error(Context& ctx, const LRNNLMHeadModel& model, const Tensor& ids) {
  Context cpu = Context::cpu();
  const LRNNLMHeadModel exact = in_double(ctx, cpu, model);
  return largest_difference(logits_of_last_token(ctx, model, ids),
                            logits_of_last_token(cpu, exact, first_on_cpu(ctx, cpu, ids, 1)));
}

TrainingError training_error(Context& ctx, LRNNLMHeadModel& model, const Tensor& ids,
                             const Tensor& targets) {
  Context cpu = Context::cpu();
  LRNNLMHeadModel exact = in_double(ctx, cpu, model);
  const std::vector<std::int32_t> none(static_cast<std::size_t>(targets.shape().numel()),
                                       kIgnoreIndex);
  Tensor counted = ctx.from_host<std::int32_t>(targets.shape(), none);
  ctx.copy(counted.view().slice(0, 0, 1), targets.view().slice(0, 0, 1));
  const double loss = loss_and_gradients(ctx, model, ids, counted);
  const double exact_loss = loss_and_gradients(cpu, exact, first_on_cpu(ctx, cpu, ids, 1),
                                               first_on_cpu(ctx, cpu, targets, 1));
  return {std::abs(loss - exact_loss) / std::abs(exact_loss),
          gradient_difference(ctx, model.parameters(), cpu, exact.parameters())};
}

}  // namespace lrnn::bench
