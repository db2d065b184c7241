#include "mixers/diagonal_recurrence.hpp"

#include "lrnn/ops/elementwise.hpp"
#include "lrnn/ops/projected_diagonal.hpp"

namespace lrnn::detail {
namespace {

// Whether a = exp(z): then the gradient of log a is that of z, and no 1/a or a = 0 can spoil it.
bool is_exponential(Discretization method) {
  return method != Discretization::Bilinear && method != Discretization::None;
}

}  // namespace

DiagonalRecurrence make_recurrence(Context& ctx, const LaneParameters& parameters, TensorView tau) {
  const DType dtype = parameters.A_re.value.dtype();
  const std::int64_t lanes = parameters.lanes;
  DiagonalRecurrence r;
  r.gamma = ctx.empty({2, lanes}, dtype);
  if (tau) {
    r.z = ctx.empty({4, lanes}, dtype);
    r.tau = tau;
    r.event_bilinear = parameters.method == Discretization::Bilinear;
  } else {
    r.a = ctx.empty({2, lanes}, dtype);
    r.a_low = ctx.empty({2, lanes}, dtype);
  }
  discretize_forward(
      ctx, {.parameters = parameters, .a = r.a, .a_low = r.a_low, .gamma = r.gamma, .z = r.z});
  return r;
}

void recurrence_backward(Context& ctx, const DiagonalRecurrence& recurrence,
                         const LaneParameters& parameters, DiagonalScanBackward args,
                         const LaneGradients& gradients) {
  const DType dtype = parameters.A_re.value.dtype();
  Tensor sums = ctx.zeros({2, 2, parameters.lanes}, dtype);  // at once: every launch costs time
  const auto sum = [&](int i) { return sums.view().slice(0, i, 1).reshape({2, parameters.lanes}); };
  const MutableTensorView dmultiplier = sum(0);
  const MutableTensorView dgamma = sum(1);
  const bool event = static_cast<bool>(recurrence.z);
  const bool log = !event && is_exponential(parameters.method);
  args.multiplier = recurrence.multiplier();
  args.gamma = recurrence.gamma;
  args.dgamma = dgamma;
  (event ? args.dz : log ? args.dlog_a : args.da) = dmultiplier;
  diagonal_scan_backward(ctx, args);
  DiscretizeBackward backward{.parameters = parameters,
                              .dgamma = dgamma,
                              .dA_re = gradients.A_re,
                              .dA_im = gradients.A_im,
                              .ddt = gradients.dt,
                              .dgamma_log = gradients.gamma_log};
  (event || log ? backward.dz : backward.da) = dmultiplier;
  discretize_backward(ctx, backward);
}

void tabulate_recurrence(Context& ctx, const LaneParameters& parameters, DiagonalTables& tables) {
  const Shape planes = {2, parameters.lanes};
  for (Tensor* const t : {&tables.a, &tables.a_low, &tables.gamma})
    if (!*t) *t = ctx.empty(planes, parameters.A_re.value.dtype());
  discretize_forward(
      ctx, {.parameters = parameters, .a = tables.a, .a_low = tables.a_low, .gamma = tables.gamma});
}

void diagonal_step(Context& ctx, const MixerStep& args, TensorView D) {
  auto& own = state_as<DiagonalState>(args.state);
  const Shape rows = {args.x.dim(0), args.x.dim(2)};
  projected_diagonal_step(ctx, {.x = args.x.reshape(rows),
                                .B = own.tables.B,
                                .a = own.tables.a,
                                .a_low = own.tables.a_low,
                                .gamma = own.tables.gamma,
                                .C = own.tables.C,
                                .D = D,
                                .y = args.y.reshape(rows),
                                .state = own.lrnn_state,
                                .norm = args.norm});
}

TensorView in_dtype(Context& ctx, TensorView t, DType dtype, Tensor& storage) {
  if (t.dtype() == dtype) return t;
  storage = ctx.empty(t.shape(), dtype);
  cast(ctx, {.src = t, .dst = storage});
  return storage;
}

TensorView without_padding(Context& ctx, TensorView x, TensorView lengths, Tensor& storage) {
  if (!lengths) return x;
  storage = ctx.clone(x);
  mask_padding(ctx, {.x = storage, .lengths = lengths});
  return storage;
}

}  // namespace lrnn::detail
