// One token of lane_scan where every lane has one output of its own. Ownership:
// common/state_step.cuh. Bound by the states, in and out: 32 sequences, 768 lanes, 32 states (6.3
// MB, in L2) take 3.5 us in a recorded step on an H200. Few sequences are bound by latency.
#include "common/lane_scan.cuh"
#include "common/state_step.cuh"

namespace lrnn::cuda {
namespace state_step {
namespace {

template <class T>
struct LaneArgs {
  Sizes sizes;
  const float* a;
  const float* a_low;  // null: 0
  const float* W;
  const float* skip;  // null: 0
  const T* v;
  T* y;
  float* state;
  bool real_weight;
};

/// What moves a lane on and reads it out.
struct Lane {
  Quad a, a_low{}, W;
  float skip = 0.0F;

  template <class T>
  __device__ __forceinline__ Lane(const LaneArgs<T>& args, std::int64_t at, std::int64_t lane) {
    const std::int64_t plane = args.sizes.plane;
    a.load(args.a + at, plane);
    if (args.a_low != nullptr) a_low.load(args.a_low + at, plane);
    W.load(args.W + at, args.real_weight ? 0 : plane);
    if (args.real_weight)
      for (float& im : W.im) im = 0.0F;
    if (args.skip != nullptr) skip = args.skip[lane];
  }
  /// x of the next token; returns its part of the output. What a_low adds comes before the state,
  /// which is so much larger.
  __device__ __forceinline__ float advance(Quad& x, float v) const {
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

template <class T, int kParts, int kRows, bool kGeluTwice>
__global__ __launch_bounds__(kThreads) void lane_scan_step_kernel(LaneArgs<T> args) {
  let_next_kernel_start();
  const Sizes& s = args.sizes;
  const Seat<kParts, kRows> seat(s);
  const Lane lane(args, seat.at, seat.lane);
  const auto state = [&](int r) { return args.state + seat.row(r) * 2 * s.plane + seat.at; };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    prefetch_to_l2(state(r));
    prefetch_to_l2(state(r) + s.plane);
  }
  wait_for_previous_kernel();
  Quad x[kRows];
  T v[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r].load(state(r), s.plane);
    v[r] = args.v[seat.row(r) * s.lanes + seat.lane];
  }
  float sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float drive = to_float(v[r]);
    sum[r] = lane.advance(x[r], drive);
    if (seat.part == 0) sum[r] = fmaf(lane.skip, drive, sum[r]);
    if (seat.stores(r)) x[r].store(state(r), s.plane);
  }
  transpose_add<kRows, kParts, 1>(sum, seat.part);
  seat.for_each_sum(sum, [&](int r, float v) {
    args.y[seat.row(r) * s.lanes + seat.lane] = activated<T, kGeluTwice>(v);
  });
}

template <class T>
bool takes(const LaneArgs<T>& args) {
  const auto aligned = [](const float* p) { return allows_vectors(p, 0, 0, kOwn); };
  return takes(args.sizes) && aligned(args.a) && aligned(args.a_low) && aligned(args.W) &&
         aligned(args.state);
}

}  // namespace
}  // namespace state_step

void lane_scan_step(Context& ctx, const LaneScanStep& a) {
  using namespace state_step;  // NOLINT(google-build-using-namespace)
  const detail::LaneScanSizes sizes(a.a, a.W, a.v);
  const bool gelu_twice = a.activation == Activation::Gelu && a.twice;
  visit_float("lane_scan_step", a.v.dtype(), [&]<class T>() {
    const LaneArgs<T> args{{sizes.batch, sizes.lanes, sizes.plane()},
                           a.a.data<float>(),
                           lane::data_or_null<float>(a.a_low),
                           a.W.data<float>(),
                           lane::data_or_null<float>(a.skip),
                           a.v.data<T>(),
                           a.y.data<T>(),
                           a.state.data<float>(),
                           sizes.real_weight};
    if (sizes.groups > 1 || sizes.channels > 1 || !takes(args) ||
        (a.activation != Activation::Identity && !gelu_twice))
      return lrnn::detail::lane_scan_step_by_parts(ctx, a);
    visit(args.sizes, [&]<int kParts, int kRows>() {
      const auto launch = [&]<bool kGeluTwice>() {
        launch_overlapped(lane_scan_step_kernel<T, kParts, kRows, kGeluTwice>,
                          blocks<kParts, kRows>(args.sizes), kThreads, 0, ctx.stream().handle,
                          args);
      };
      gelu_twice ? launch.template operator()<true>() : launch.template operator()<false>();
    });
  });
}

}  // namespace lrnn::cuda
