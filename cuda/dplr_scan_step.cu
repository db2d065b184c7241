// One token of dplr_scan of rank 1 with one read-out per head. Ownership: common/state_step.cuh.
// Bound by the states, in and out: 32 sequences, 768 heads, 32 states (6.3 MB, in L2) take 4.0 us
// in a recorded step on an H200. Few sequences are bound by latency.
#include "common/dplr_scan.cuh"
#include "common/state_step.cuh"

namespace lrnn::cuda {
namespace state_step {
namespace {

/// A head, whose states meet in <k, x>.
struct Head {
  static constexpr bool kCoupled = true;

  using Parameters = dplr::Parameters;
  static bool aligned(const Parameters& p) {
    for (const float* q : {p.e, p.w, p.k, p.b, p.C})
      if (!state_step::aligned(q)) return false;
    return true;
  }

  Quad e, w, k, b, C;
  float skip = 0.0F;

  __device__ __forceinline__ Head(const Parameters& p, std::int64_t plane, std::int64_t at,
                                  std::int64_t head) {
    e.load(p.e + at, plane);
    w.load(p.w + at, plane);
    k.load(p.k + at, plane);
    b.load(p.b + at, plane);
    float pairs[2 * kOwn];
    load_vec<float, kOwn>(p.C + 2 * at, reinterpret_cast<float (&)[kOwn]>(pairs[0]));
    load_vec<float, kOwn>(p.C + 2 * at + kOwn, reinterpret_cast<float (&)[kOwn]>(pairs[kOwn]));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      C.re[i] = pairs[2 * i];
      C.im[i] = pairs[2 * i + 1];
    }
    if (p.D != nullptr) skip = p.D[head];
  }
  /// Of Re sum conj(k) x.
  __device__ __forceinline__ float coupling(const Quad& x) const {
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum = fmaf(k.re[i], x.re[i], fmaf(k.im[i], x.im[i], sum));
    return sum;
  }
  /// The state is added last: one rounding of its size.
  __device__ __forceinline__ float advance(Quad& x, float u, float coupling) const {
    const float product = 2.0F * coupling;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float re = fmaf(-w.re[i], product, b.re[i] * u);
      const float im = fmaf(-w.im[i], product, b.im[i] * u);
      const float2 x0{x.re[i], x.im[i]};
      x.re[i] = x0.x + fmaf(e.re[i], x0.x, fmaf(-e.im[i], x0.y, re));
      x.im[i] = x0.y + fmaf(e.re[i], x0.y, fmaf(e.im[i], x0.x, im));
      sum = fmaf(C.re[i], x.re[i], fmaf(-C.im[i], x.im[i], sum));
    }
    return 2.0F * sum;
  }
};

}  // namespace
}  // namespace state_step

void dplr_scan_step(Context& ctx, const DplrScanStep& a) {
  using namespace state_step;  // NOLINT(google-build-using-namespace)
  const lrnn::detail::DplrScanSizes sizes(a.w, a.C, a.u);
  visit_float("dplr_scan_step", a.u.dtype(), [&]<class T>() {
    const Args<Head, T> args{{sizes.batch, sizes.heads, sizes.plane()},
                             dplr::parameters_of(a),
                             a.u.data<T>(),
                             a.y.data<T>(),
                             a.state.data<float>()};
    if (sizes.rank > 1 || sizes.channels > 1 ||
        !run(args, a.activation, a.twice, ctx.stream().handle))
      lrnn::detail::dplr_scan_step_by_parts(ctx, a);
  });
}

}  // namespace lrnn::cuda
