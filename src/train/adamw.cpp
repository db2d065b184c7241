#include "lrnn/train/adamw.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "lrnn/ops/adamw.hpp"
#include "lrnn/ops/global_norm.hpp"

namespace lrnn {
namespace {

void check_config(const AdamWConfig& c) {
  const auto check = [](bool holds, const char* field, const char* expected, double got) {
    LRNN_CHECK(holds, ConfigError, "AdamWConfig.", field, ": expected ", expected, ", got ", got);
  };
  check(std::isfinite(c.lr) && c.lr >= 0, "lr", ">= 0", c.lr);
  check(c.beta1 >= 0 && c.beta1 < 1, "beta1", "[0, 1)", c.beta1);
  check(c.beta2 >= 0 && c.beta2 < 1, "beta2", "[0, 1)", c.beta2);
  check(c.eps > 0, "eps", "> 0", c.eps);
  check(c.weight_decay >= 0, "weight_decay", ">= 0", c.weight_decay);
  check(c.max_grad_norm >= 0, "max_grad_norm", ">= 0", c.max_grad_norm);
}

// Masters are exactly the rounded values until the first step.
void widen(Context& ctx, MutableTensorView masters, const Tensor& values) {
  const auto rounded = ctx.to_host<bfloat16>(values);
  std::vector<double> wide(rounded.size());
  std::transform(rounded.begin(), rounded.end(), wide.begin(),
                 [](bfloat16 v) { return static_cast<double>(to_float(v)); });
  ctx.write_from_host(masters, wide);
}

}  // namespace

AdamW::AdamW(Context& ctx, ParameterStore& parameters, const AdamWConfig& config)
    : parameters_(&parameters), config_(config) {
  check_config(config);
  parameters.enable_grad(ctx);
  const DType dtype = accumulate_dtype(parameters.slabs().front().dtype);
  for (const ParameterSlab& slab : parameters.slabs()) {
    Slab& state = slabs_.emplace_back();
    if (slab.numel == 0) continue;
    if (slab.dtype == DType::bfloat16) state.masters = ctx.empty({slab.numel}, DType::float32);
    state.m = ctx.empty({slab.numel}, dtype);
    state.v = ctx.empty({slab.numel}, dtype);
  }
  lr_ = ctx.from_host_as({}, dtype, std::array{config.lr});
  grad_norm_ = ctx.zeros({}, dtype);
  counters_ = ctx.zeros({2}, DType::int64);
  factors_ = ctx.zeros({5}, dtype);
  build_options(ctx);
  reset(ctx);
}

void AdamW::build_options(Context& ctx) {
  std::vector<std::pair<double, double>> rows;
  std::vector<std::vector<std::int32_t>> groups;
  for (const ParameterSlab& slab : parameters_->slabs())
    groups.emplace_back(static_cast<std::size_t>(slab.numel / kAdamwGroup), 0);
  for (const Parameter& p : *parameters_) {
    const std::pair<double, double> row{static_cast<double>(p.options.lr_scale),
                                        p.options.weight_decay ? config_.weight_decay : 0.0};
    const auto found = std::find(rows.begin(), rows.end(), row);
    const auto index = static_cast<std::int32_t>(found - rows.begin());
    if (found == rows.end()) rows.push_back(row);
    LRNN_CHECK(p.offset % kAdamwGroup == 0, InternalError, p.name, ": offset ", p.offset);
    const std::int64_t count = (p.shape.numel() + kAdamwGroup - 1) / kAdamwGroup;
    std::fill_n(groups[static_cast<std::size_t>(p.slab)].begin() + p.offset / kAdamwGroup, count,
                index);
  }
  std::vector<double> flat;
  for (const auto& [lr_scale, weight_decay] : rows) {
    flat.push_back(lr_scale);
    flat.push_back(weight_decay);
  }
  options_ = ctx.from_host_as({static_cast<std::int64_t>(rows.size()), 2}, factors_.dtype(), flat);
  for (std::size_t i = 0; i < slabs_.size(); ++i)
    if (!groups[i].empty())
      slabs_[i].group_options = ctx.from_host<std::int32_t>(
          {static_cast<std::int64_t>(groups[i].size())}, std::span<const std::int32_t>(groups[i]));
}

void AdamW::reset(Context& ctx) {
  for (std::size_t i = 0; i < slabs_.size(); ++i) {
    if (!slabs_[i].m) continue;
    ctx.zero(slabs_[i].m);
    ctx.zero(slabs_[i].v);
    if (slabs_[i].masters) widen(ctx, slabs_[i].masters, parameters_->slabs()[i].values);
  }
  ctx.zero(counters_);
}

void AdamW::step(Context& ctx, double grad_scale) {
  GlobalNorm norm{.grads = {}, .scale = grad_scale, .norm = grad_norm_};
  for (const ParameterSlab& slab : parameters_->slabs())
    if (slab.numel > 0) norm.grads.emplace_back(slab.grads);
  global_norm(ctx, norm);
  adamw_begin(ctx, {.grad_norm = grad_norm_,
                    .lr = lr_,
                    .grad_scale = grad_scale,
                    .max_grad_norm = config_.max_grad_norm,
                    .beta1 = config_.beta1,
                    .beta2 = config_.beta2,
                    .counters = counters_,
                    .factors = factors_});
  for (std::size_t i = 0; i < slabs_.size(); ++i) {
    if (!slabs_[i].m) continue;
    ParameterSlab& slab = parameters_->slabs()[i];
    adamw_update(ctx, {.grad = slab.grads,
                       .factors = factors_,
                       .group_options = slabs_[i].group_options,
                       .options = options_,
                       .beta1 = config_.beta1,
                       .beta2 = config_.beta2,
                       .eps = config_.eps,
                       .m = slabs_[i].m,
                       .v = slabs_[i].v,
                       .masters = slabs_[i].masters,
                       .values = slab.values});
  }
}

void AdamW::set_lr(Context& ctx, double lr) {
  ctx.write_from_host(lr_, std::array{lr});
}

std::vector<AdamW::State> AdamW::state() {
  std::vector<State> all;
  for (const Parameter& p : *parameters_) {
    Slab& slab = slabs_[static_cast<std::size_t>(p.slab)];
    const auto add = [&](const char* kind, Tensor& whole) {
      if (whole)
        all.push_back(
            {kind + p.name, whole.view().slice(0, p.offset, p.shape.numel()).reshape(p.shape)});
    };
    add("masters.", slab.masters);
    add("m.", slab.m);
    add("v.", slab.v);
  }
  return all;
}

}  // namespace lrnn
