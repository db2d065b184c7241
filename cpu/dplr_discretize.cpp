#include "lrnn/ops/dplr_discretize.hpp"

#include <vector>

#include "common/eigen.hpp"
#include "ops/dplr_math.hpp"

namespace lrnn::cpu {
namespace {

using detail::DplrGradients;
using detail::DplrOperands;
using detail::DplrPlanes;
using detail::DplrScratch;
using detail::DplrShare;
using detail::DplrSources;

// A team of one.
struct Alone {
  static std::int64_t index() { return 0; }
  static std::int64_t size() { return 1; }
  static double sum(double v) { return v; }
  static void barrier() {}
};

// Calls f(head, scratch) for every head.
template <class T, class F>
void for_each_head(const DplrSources<T>& p, F&& f) {
#pragma omp parallel for
  for (std::int64_t head = 0; head < p.heads; ++head) {
    std::vector<double> memory(static_cast<std::size_t>(DplrScratch::size(p.states, p.rank)));
    f(head, DplrScratch(memory.data(), p.states, p.rank));
  }
}

// Element j of `out`, at distance `stride`, += the sum of its share of `row`, in order.
template <class T>
void add_shares(const MutableTensorView& out, std::int64_t offset, std::int64_t stride,
                std::int64_t count, const double* row, const DplrShare& share) {
  if (!out) return;
  for (std::int64_t j = 0; j < count; ++j) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < share.uses; ++i) sum += row[j * share.first + i * share.next];
    out.data<T>()[offset + j * stride] += static_cast<T>(sum);
  }
}

template <class T>
void add_gradients(const DplrSources<T>& p, const DplrDiscretizeBackward& args,
                   const std::vector<double>& gradients) {
  const std::int64_t lanes = p.lanes.lanes;
  const std::int64_t rates = p.lanes.A_re.count;
  const auto row = [&](std::int64_t i) { return gradients.data() + i * lanes; };
  const DplrShare of_rates = DplrShare::of_rates(lanes, rates);
  add_shares<T>(args.dA_re, 0, 1, rates, row(0), of_rates);
  add_shares<T>(args.dA_im, 0, 1, rates, row(1), of_rates);
  add_shares<T>(args.ddt, 0, 1, p.lanes.dt.count, row(2),
                DplrShare::of_steps(lanes, p.lanes.dt.count));
  for (std::int64_t part = 0; part < 2; ++part) {
    add_shares<T>(args.dB, part, 2, rates, row(3 + part), of_rates);
    for (std::int64_t r = 0; r < p.rank; ++r)
      add_shares<T>(args.dP, 2 * r * rates + part, 2, rates, row(5 + 2 * r + part), of_rates);
  }
}

}  // namespace

void dplr_discretize_forward(Context&, const DplrDiscretizeForward& args) {
  visit_float("dplr_discretize_forward", args.parameters.P.dtype(), [&]<class T>() {
    const DplrSources<T> p(args.parameters);
    const auto planes = [&](const MutableTensorView& t) {
      return DplrPlanes<T>{t ? t.data<T>() : nullptr, p.lanes.lanes};
    };
    const DplrOperands<T> out{planes(args.e), planes(args.w), planes(args.k), planes(args.b)};
    for_each_head(p, [&](std::int64_t head, const DplrScratch& x) {
      detail::dplr_forward(Alone{}, p, head, x, out, planes(args.e_low));
    });
  });
}

void dplr_discretize_backward(Context&, const DplrDiscretizeBackward& args) {
  visit_float("dplr_discretize_backward", args.parameters.P.dtype(), [&]<class T>() {
    const DplrSources<T> p(args.parameters);
    const auto planes = [&](const TensorView& t) {
      return DplrPlanes<const T>{t.data<T>(), p.lanes.lanes};
    };
    const DplrOperands<const T> d{planes(args.de), planes(args.dw), planes(args.dk),
                                  planes(args.db)};
    std::vector<double> gradients(
        static_cast<std::size_t>(DplrGradients::rows(p.rank) * p.lanes.lanes));
    for_each_head(p, [&](std::int64_t head, const DplrScratch& x) {
      detail::dplr_backward(Alone{}, p, head, x, d, {gradients.data(), p.lanes.lanes});
    });
    add_gradients(p, args, gradients);
  });
}

}  // namespace lrnn::cpu
