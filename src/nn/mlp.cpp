#include "lrnn/nn/mlp.hpp"

#include <cmath>

#include "lrnn/ops/activation.hpp"
#include "lrnn/ops/gated_activation.hpp"
#include "lrnn/ops/projected_gate.hpp"

namespace lrnn {
namespace {

Shape with_last(const Shape& shape, std::int64_t extent) {
  Shape out = shape;
  out.set(shape.rank() - 1, extent);
  return out;
}

LinearOptions scaled(std::int64_t fan_in, double scale) {
  return {.weight_init = init::uniform(scale / std::sqrt(static_cast<double>(fan_in)))};
}

class GatedMlp final : public Mlp {
 public:
  GatedMlp(const MlpBuild& build, const ParameterScope& scope)
      : features_((build.d_intermediate + kMultiple - 1) / kMultiple * kMultiple),
        fc1_(scope / "fc1", build.d_model, 2 * features_),
        fc2_(scope / "fc2", features_, build.d_model, scaled(features_, build.residual_scale)) {}

  void forward(Context& ctx, TensorView x, MutableTensorView y, MlpSaved& saved) const override {
    Tensor hidden = ctx.empty(with_last(x.shape(), 2 * features_), x.dtype());
    fc1_.forward(ctx, x, hidden);
    const Tensor activated = activate(ctx, hidden);
    fc2_.forward(ctx, activated, y);
    saved.hidden = std::move(hidden);
  }

  void forward(Context& ctx, TensorView x, MutableTensorView y,
               const AddNormForward* norm) const override {
    Tensor activated = ctx.empty(with_last(x.shape(), features_), x.dtype());
    projected_gate(ctx, {.x = x,
                         .weight = fc1_.weight_value().reshape({2, features_, x.dim(-1)}),
                         .y = activated,
                         .norm = norm});
    fc2_.forward(ctx, activated, y);
  }

  void backward(Context& ctx, const MlpSaved& saved, TensorView x, TensorView dy,
                MutableTensorView dx) const override {
    Tensor dactivated = ctx.empty(with_last(x.shape(), features_), x.dtype());
    {
      const Tensor activated = activate(ctx, saved.hidden);
      fc2_.backward(ctx, dy, activated, dactivated);
    }
    Tensor dhidden = ctx.empty(saved.hidden.shape(), x.dtype());
    gated_activation_backward(ctx, {.kind = Activation::Silu,
                                    .dy = dactivated,
                                    .value = half(saved.hidden, 0),
                                    .gate = half(saved.hidden, 1),
                                    .dvalue = dhidden.view().slice(-1, 0, features_),
                                    .dgate = dhidden.view().slice(-1, features_, features_)});
    fc1_.backward(ctx, dhidden, x, dx);
  }

 private:
  static constexpr std::int64_t kMultiple = 128;

  [[nodiscard]] TensorView half(TensorView hidden, std::int64_t i) const {
    return hidden.slice(-1, i * features_, features_);
  }
  [[nodiscard]] Tensor activate(Context& ctx, TensorView hidden) const {
    Tensor y = ctx.empty(with_last(hidden.shape(), features_), hidden.dtype());
    gated_activation_forward(
        ctx, {.kind = Activation::Silu, .value = half(hidden, 0), .gate = half(hidden, 1), .y = y});
    return y;
  }

  std::int64_t features_;
  Linear fc1_;
  Linear fc2_;
};

class PlainMlp final : public Mlp {
 public:
  PlainMlp(const MlpBuild& build, const ParameterScope& scope)
      : fc1_(scope / "fc1", build.d_model, build.d_intermediate),
        fc2_(scope / "fc2", build.d_intermediate, build.d_model,
             scaled(build.d_intermediate, build.residual_scale)) {}

  void forward(Context& ctx, TensorView x, MutableTensorView y, MlpSaved& saved) const override {
    Tensor hidden = ctx.empty(with_last(x.shape(), fc1_.out_features()), x.dtype());
    fc1_.forward(ctx, x, hidden);
    const Tensor activated = activate(ctx, hidden);
    fc2_.forward(ctx, activated, y);
    saved.hidden = std::move(hidden);
  }

  void forward(Context& ctx, TensorView x, MutableTensorView y,
               const AddNormForward* norm) const override {
    if (norm != nullptr) add_norm_forward(ctx, *norm);
    MlpSaved dropped;
    forward(ctx, x, y, dropped);
  }

  void backward(Context& ctx, const MlpSaved& saved, TensorView x, TensorView dy,
                MutableTensorView dx) const override {
    Tensor dhidden = ctx.empty(saved.hidden.shape(), x.dtype());
    {
      const Tensor activated = activate(ctx, saved.hidden);
      fc2_.backward(ctx, dy, activated, dhidden);
    }
    activation_backward(
        ctx, {.kind = Activation::Gelu, .dy = dhidden, .x = saved.hidden, .dx = dhidden});
    fc1_.backward(ctx, dhidden, x, dx);
  }

 private:
  [[nodiscard]] static Tensor activate(Context& ctx, TensorView hidden) {
    Tensor y = ctx.empty(hidden.shape(), hidden.dtype());
    activation_forward(ctx, {.kind = Activation::Gelu, .x = hidden, .y = y});
    return y;
  }

  Linear fc1_;
  Linear fc2_;
};

struct Row {
  const char* name;
  std::unique_ptr<Mlp> (*make)(const MlpBuild&, const ParameterScope&);
};

template <class M>
std::unique_ptr<Mlp> make(const MlpBuild& build, const ParameterScope& scope) {
  return std::make_unique<M>(build, scope);
}
constexpr Row kRows[] = {{"GatedMLP", make<GatedMlp>}, {"MLP", make<PlainMlp>}};

const Row& row_of(std::string_view name) {
  std::string known;
  for (const Row& row : kRows) {
    if (name == row.name) return row;
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  throw ConfigError(detail::concat("mlp_cls: unknown MLP '", name, "', expected one of: ", known));
}

}  // namespace

std::vector<std::string> mlp_names() {
  std::vector<std::string> names;
  for (const Row& row : kRows) names.emplace_back(row.name);
  return names;
}

void check_mlp_name(std::string_view name) {
  static_cast<void>(row_of(name));
}

std::unique_ptr<Mlp> make_mlp(std::string_view name, const MlpBuild& build,
                              const ParameterScope& scope) {
  return row_of(name).make(build, scope);
}

}  // namespace lrnn
