// One token of lane_scan where every lane has one output of its own. Ownership:
// common/state_step.cuh. Bound by the states, in and out: 32 sequences, 768 lanes, 32 states (6.3
// MB, in L2) take 3.5 us in a recorded step on an H200. Few sequences are bound by latency.
#include "common/lane_scan.cuh"
#include "common/state_step.cuh"

namespace lrnn::cuda {
namespace state_step {
namespace {

/// A lane with multipliers of its own.
struct Lane {
  static constexpr bool kCoupled = false;

  struct Parameters {
    const float* a;
    const float* a_low;  // null: 0
    const float* W;
    const float* skip;  // null: 0
    bool real_weight;
  };
  static bool aligned(const Parameters& p) {
    return state_step::aligned(p.a) && state_step::aligned(p.a_low) && state_step::aligned(p.W);
  }

  Quad a, a_low{}, W;
  float skip = 0.0F;

  __device__ __forceinline__ Lane(const Parameters& p, std::int64_t plane, std::int64_t at,
                                  std::int64_t lane) {
    a.load(p.a + at, plane);
    if (p.a_low != nullptr) a_low.load(p.a_low + at, plane);
    W.load(p.W + at, p.real_weight ? 0 : plane);
    if (p.real_weight)
      for (float& im : W.im) im = 0.0F;
    if (p.skip != nullptr) skip = p.skip[lane];
  }
  /// What a_low adds comes before the state, which is so much larger.
  __device__ __forceinline__ float advance(Quad& x, float v, float /*coupling*/) const {
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float re = x.re[i];
      const float im = x.im[i];
      const float drive = v + fmaf(a_low.re[i], re, -a_low.im[i] * im);
      const float turn = fmaf(a_low.re[i], im, a_low.im[i] * re);
      x.re[i] = fmaf(a.re[i], re, fmaf(-a.im[i], im, drive));
      x.im[i] = fmaf(a.re[i], im, fmaf(a.im[i], re, turn));
      sum = fmaf(W.re[i], x.re[i], fmaf(-W.im[i], x.im[i], sum));
    }
    return sum;
  }
};

}  // namespace
}  // namespace state_step

void lane_scan_step(Context& ctx, const LaneScanStep& a) {
  using namespace state_step;  // NOLINT(google-build-using-namespace)
  const detail::LaneScanSizes sizes(a.a, a.W, a.v);
  visit_float("lane_scan_step", a.v.dtype(), [&]<class T>() {
    const Args<Lane, T> args{
        {sizes.batch, sizes.lanes, sizes.plane()},
        {a.a.data<float>(), lane::data_or_null<float>(a.a_low), a.W.data<float>(),
         lane::data_or_null<float>(a.skip), sizes.real_weight},
        a.v.data<T>(),
        a.y.data<T>(),
        a.state.data<float>()};
    if (sizes.groups > 1 || sizes.channels > 1 ||
        !run(args, a.activation, a.twice, ctx.stream().handle))
      lrnn::detail::lane_scan_step_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
