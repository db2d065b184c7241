// One token of dplr_scan of rank 1 with one read-out per head. Ownership: common/state_step.cuh.
// Bound by the states, in and out: 32 sequences, 768 heads, 32 states (6.3 MB, in L2) take 4.0 us
// in a recorded step on an H200. Few sequences are bound by latency.
#include "common/dplr_scan.cuh"
#include "common/state_step.cuh"

namespace lrnn::cuda {
namespace state_step {
namespace {

template <class T>
struct HeadArgs {
  Sizes sizes;
  dplr::Parameters parameters;
  const T* u;
  T* y;
  float* state;
};

/// What moves a head on and reads it out.
struct Head {
  Quad e, w, k, b, C;
  float D = 0.0F;

  template <class T>
  __device__ __forceinline__ Head(const HeadArgs<T>& args, std::int64_t at, std::int64_t head) {
    const dplr::Parameters& p = args.parameters;
    const std::int64_t plane = args.sizes.plane;
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
    if (p.D != nullptr) D = p.D[head];
  }
  /// The part of Re sum conj(k) x of this thread.
  __device__ __forceinline__ float product(const Quad& x) const {
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum = fmaf(k.re[i], x.re[i], fmaf(k.im[i], x.im[i], sum));
    return sum;
  }
  /// x of the next token, given <k, x>; returns its part of Re sum C x. The state is added last:
  /// one rounding of its size.
  __device__ __forceinline__ float advance(Quad& x, float u, float product) const {
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
    return sum;
  }
};

template <class T, int kParts, int kRows, bool kGeluTwice>
__global__ __launch_bounds__(kThreads) void dplr_scan_step_kernel(HeadArgs<T> args) {
  let_next_kernel_start();
  const Sizes& s = args.sizes;
  const Seat<kParts, kRows> seat(s);
  const Head head(args, seat.at, seat.lane);
  const auto state = [&](int r) { return args.state + seat.row(r) * 2 * s.plane + seat.at; };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    prefetch_to_l2(state(r));
    prefetch_to_l2(state(r) + s.plane);
  }
  wait_for_previous_kernel();
  Quad x[kRows];
  T u[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r].load(state(r), s.plane);
    u[r] = args.u[seat.row(r) * s.lanes + seat.lane];
  }
  float product[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) product[r] = head.product(x[r]);
  transpose_add<kRows, kParts, 1>(product, seat.part);
  float sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float drive = to_float(u[r]);
    sum[r] = 2.0F * head.advance(x[r], drive, 2.0F * sum_of_row<kParts, kRows>(product, r));
    if (seat.part == 0) sum[r] = fmaf(head.D, drive, sum[r]);
    if (seat.stores(r)) x[r].store(state(r), s.plane);
  }
  transpose_add<kRows, kParts, 1>(sum, seat.part);
  seat.for_each_sum(sum, [&](int r, float v) {
    args.y[seat.row(r) * s.lanes + seat.lane] = activated<T, kGeluTwice>(v);
  });
}

template <class T>
bool takes(const HeadArgs<T>& args) {
  const auto aligned = [](const float* p) { return allows_vectors(p, 0, 0, kOwn); };
  const dplr::Parameters& p = args.parameters;
  return takes(args.sizes) && aligned(p.e) && aligned(p.w) && aligned(p.k) && aligned(p.b) &&
         aligned(p.C) && aligned(args.state);
}

}  // namespace
}  // namespace state_step

void dplr_scan_step(Context& ctx, const DplrScanStep& a) {
  using namespace state_step;  // NOLINT(google-build-using-namespace)
  const lrnn::detail::DplrScanSizes sizes(a.w, a.C, a.u);
  const bool gelu_twice = a.activation == Activation::Gelu && a.twice;
  visit_float("dplr_scan_step", a.u.dtype(), [&]<class T>() {
    const HeadArgs<T> args{{sizes.batch, sizes.heads, sizes.plane()},
                           dplr::parameters_of(a),
                           a.u.data<T>(),
                           a.y.data<T>(),
                           a.state.data<float>()};
    if (sizes.rank > 1 || sizes.channels > 1 || !takes(args) ||
        (a.activation != Activation::Identity && !gelu_twice))
      return lrnn::detail::dplr_scan_step_by_parts(ctx, a);
    visit(args.sizes, [&]<int kParts, int kRows>() {
      const auto launch = [&]<bool kGeluTwice>() {
        launch_overlapped(dplr_scan_step_kernel<T, kParts, kRows, kGeluTwice>,
                          blocks<kParts, kRows>(args.sizes), kThreads, 0, ctx.stream().handle,
                          args);
      };
      gelu_twice ? launch.template operator()<true>() : launch.template operator()<false>();
    });
  });
}

}  // namespace lrnn::cuda
