// In double; rglru_scan_float.hpp has the passes in float. Channels are the vector lanes: a pack of
// channels keeps its states in registers while time runs.
// Work items are (sequence, pack), so that sums do not depend on the number of threads.
#include "lrnn/ops/rglru_scan.hpp"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "common/pack.hpp"
#include "common/rows.hpp"
#include "rglru_scan_float.hpp"

namespace lrnn::cpu {
namespace {

/// Operands as pointers, and sizes.
template <class T>
struct Problem {
  Rows<const T> v, pre_r, pre_i;
  const T* a_log;
  const std::int32_t* lengths;
  T c;
  std::int64_t batch, seqlen, channels, packs;

  explicit Problem(const RglruScanInputs& in)
      : v(rows_of<T>(in.v)),
        pre_r(rows_of<T>(in.pre_r)),
        pre_i(rows_of<T>(in.pre_i)),
        a_log(in.a_log.data<T>()),
        lengths(data_or_null<std::int32_t>(in.lengths)),
        c(static_cast<T>(in.c)),
        batch(in.v.dim(0)),
        seqlen(in.v.dim(1)),
        channels(in.v.dim(2)),
        packs((channels + kLanes<T> - 1) / kLanes<T>) {}
  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
  [[nodiscard]] std::int64_t chunk_row(std::int64_t b, std::int64_t t) const {
    return b * rglru_scan_chunks(seqlen) + t / kRglruScanChunk;
  }
};

/// What the gates of one token give.
template <class T>
struct Gates {
  Pack<T> log_a, a, m, i;
};

/// One pack of channels of one sequence.
template <class T>
struct Lanes {
  const Problem<T>& p;
  std::int64_t b, first, count;
  Pack<T> rate;  // c softplus(-a_log)

  Lanes(const Problem<T>& problem, std::int64_t sequence, std::int64_t pack)
      : p(problem),
        b(sequence),
        first(pack * kLanes<T>),
        count(std::min<std::int64_t>(kLanes<T>, problem.channels - first)),
        rate(p.c * softplus<T>(-load(p.a_log + first, count))) {}

  [[nodiscard]] std::int64_t row(std::int64_t t) const { return b * p.seqlen + t; }
  [[nodiscard]] Pack<T> read(const Rows<const T>& rows, std::int64_t t) const {
    return load(rows[row(t)] + first, count);
  }
  void write(const Pack<T>& value, const Rows<T>& rows, std::int64_t t) const {
    store<T>(value, rows[row(t)] + first, count);
  }
  // Element (row, channel) of a dense [.., E] tensor.
  [[nodiscard]] Pack<T> read_state(const T* base, std::int64_t r) const {
    if (base == nullptr) return Pack<T>::Zero();
    return load(base + r * p.channels + first, count);
  }
  void write_state(const Pack<T>& value, T* base, std::int64_t r) const {
    if (base != nullptr) store<T>(value, base + r * p.channels + first, count);
  }
  [[nodiscard]] Gates<T> gates(std::int64_t t) const {
    Gates<T> g;
    g.log_a = -rate * sigmoid<T>(read(p.pre_r, t));
    g.a = g.log_a.exp();
    g.m = (-(T(2) * g.log_a).expm1()).sqrt();
    g.i = sigmoid<T>(read(p.pre_i, t));
    return g;
  }
};

template <class T>
void forward_pack(const RglruScanForward& args, const Problem<T>& p, std::int64_t b,
                  std::int64_t pack) {
  const Lanes<T> lanes(p, b, pack);
  const auto out = rows_of<T>(args.h);
  T* const chunk_states = data_or_null<T>(args.chunk_states);
  Pack<T> h = lanes.read_state(data_or_null<T>(args.in.state_in), b);
  const std::int64_t length = p.length(b);
  for (std::int64_t t = 0; t < p.seqlen; ++t) {
    if (t % kRglruScanChunk == 0) lanes.write_state(h, chunk_states, p.chunk_row(b, t));
    if (t >= length) {
      lanes.write(Pack<T>::Zero(), out, t);
      continue;
    }
    const Gates<T> g = lanes.gates(t);
    h = g.a * h + g.m * (g.i * lanes.read(p.v, t));
    lanes.write(h, out, t);
  }
  lanes.write_state(h, data_or_null<T>(args.state_out), b);
}

template <class T>
void forward(const RglruScanForward& args) {
  const Problem<T> p(args.in);
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t pack = 0; pack < p.packs; ++pack) forward_pack(args, p, b, pack);
}

/// Tokens that backward walks forth and back at once: several chunks, because the way back through
/// a few tokens alone is slow.
constexpr std::int64_t kSpan = 8 * kRglruScanChunk;

template <class T>
class BackwardPack {
 public:
  BackwardPack(const RglruScanBackward& args, const Problem<T>& p, std::int64_t b,
               std::int64_t pack)
      : args_(args),
        p_(p),
        lanes_(p, b, pack),
        dh_(rows_of<T>(args.dh)),
        dv_(rows_of<T>(args.dv)),
        dpre_r_(rows_of<T>(args.dpre_r)),
        dpre_i_(rows_of<T>(args.dpre_i)) {}

  // Leaves sum t of this sequence in sums[b, :].
  void run(T* sums) {
    const std::int64_t b = lanes_.b;
    const std::int64_t length = p_.length(b);
    carry_ = lanes_.read_state(data_or_null<T>(args_.dstate_out), b);
    for (std::int64_t t = length; t < p_.seqlen; ++t) clear(t);
    for (std::int64_t first = (length - 1) / kSpan * kSpan; first >= 0; first -= kSpan) {
      const std::int64_t last = std::min(length, first + kSpan);
      recompute(first, last);
      span_sum_ = Pack<T>::Zero();
      for (std::int64_t t = last - 1; t >= first; --t)
        token(t, static_cast<std::size_t>(t - first));
      sum_ += span_sum_;
    }
    lanes_.write_state(carry_, data_or_null<T>(args_.dstate_in), b);
    lanes_.write_state(sum_, sums, b);
  }

 private:
  void clear(std::int64_t t) {
    lanes_.write(Pack<T>::Zero(), dv_, t);
    lanes_.write(Pack<T>::Zero(), dpre_r_, t);
    lanes_.write(Pack<T>::Zero(), dpre_i_, t);
  }

  // The gates of a span and the states before its tokens.
  void recompute(std::int64_t first, std::int64_t last) {
    Pack<T> h = lanes_.read_state(args_.chunk_states.data<T>(), p_.chunk_row(lanes_.b, first));
    for (std::int64_t t = first; t < last; ++t) {
      const auto i = static_cast<std::size_t>(t - first);
      before_[i] = h;
      gates_[i] = lanes_.gates(t);
      const Gates<T>& g = gates_[i];
      h = g.a * h + g.m * (g.i * lanes_.read(p_.v, t));
    }
  }

  // carry_ holds a_{t+1} g_{t+1} on entry and a_t g_t on return.
  void token(std::int64_t t, std::size_t i) {
    const Gates<T>& gates = gates_[i];
    const Pack<T> v = lanes_.read(p_.v, t);
    const Pack<T> g = lanes_.read(dh_, t) + carry_;
    const Pack<T> q = (gates.m > T(0)).select(gates.log_a / gates.m, Pack<T>::Zero());
    const Pack<T> gated = gates.i * v;
    const Pack<T> term = g * (gates.log_a * gates.a * before_[i] - gated * gates.a.square() * q);
    span_sum_ += term;
    // 1 - sig(x) = sig(-x), without cancellation.
    lanes_.write(term * sigmoid<T>(-lanes_.read(p_.pre_r, t)), dpre_r_, t);
    lanes_.write(g * gates.m * gated * sigmoid<T>(-lanes_.read(p_.pre_i, t)), dpre_i_, t);
    lanes_.write(g * gates.m * gates.i, dv_, t);
    carry_ = gates.a * g;
  }

  const RglruScanBackward& args_;
  const Problem<T>& p_;
  Lanes<T> lanes_;
  Rows<const T> dh_;
  Rows<T> dv_, dpre_r_, dpre_i_;
  std::array<Pack<T>, kSpan> before_;
  std::array<Gates<T>, kSpan> gates_;
  Pack<T> carry_;
  // Sums of spans first: two short sums round less than one long one.
  Pack<T> span_sum_;
  Pack<T> sum_ = Pack<T>::Zero();
};

// sig(-x) / log sig(x). Both vanish for large x, where the ratio tends to -1.
template <class T>
T slope_over_value(T x) {
  const T y = std::exp(-std::abs(x));
  if (x < T(0)) return T(-1) / ((T(1) + y) * (std::log1p(y) - x));
  return y > T(0) ? -y / ((T(1) + y) * std::log1p(y)) : T(-1);
}

// Sums over the batch, in order.
template <class T>
void add_da_log(const RglruScanBackward& args, const Problem<T>& p, const std::vector<T>& sums) {
  T* const da_log = args.da_log.data<T>();
  for (std::int64_t e = 0; e < p.channels; ++e) {
    T sum = T(0);
    for (std::int64_t b = 0; b < p.batch; ++b)
      sum += sums[static_cast<std::size_t>(b * p.channels + e)];
    da_log[e] += sum * slope_over_value(p.a_log[e]);
  }
}

template <class T>
void backward(const RglruScanBackward& args) {
  const Problem<T> p(args.in);
  std::vector<T> sums(static_cast<std::size_t>(p.batch * p.channels));
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t pack = 0; pack < p.packs; ++pack)
      BackwardPack<T>(args, p, b, pack).run(sums.data());
  add_da_log(args, p, sums);
}

FloatGatedScan float_scan(const Problem<float>& p) {
  return {.v = p.v.data,
          .pre_r = p.pre_r.data,
          .pre_i = p.pre_i.data,
          .v_stride = p.v.stride,
          .pre_r_stride = p.pre_r.stride,
          .pre_i_stride = p.pre_i.stride,
          .a_log = p.a_log,
          .state_in = nullptr,
          .lengths = p.lengths,
          .c = p.c,
          .batch = p.batch,
          .seqlen = p.seqlen,
          .channels = p.channels,
          .chunks = rglru_scan_chunks(p.seqlen)};
}

void forward_float(const RglruScanForward& args) {
  const auto h = rows_of<float>(args.h);
  FloatGatedScan in = float_scan(Problem<float>(args.in));
  in.state_in = data_or_null<float>(args.in.state_in);
  run_float_gated_scan({.in = in,
                        .h = h.data,
                        .state_out = data_or_null<float>(args.state_out),
                        .chunk_states = data_or_null<float>(args.chunk_states),
                        .h_stride = h.stride});
}

void backward_float(const RglruScanBackward& args) {
  const Problem<float> p(args.in);
  const auto dh = rows_of<float>(args.dh);
  const auto dv = rows_of<float>(args.dv);
  const auto dpre_r = rows_of<float>(args.dpre_r);
  const auto dpre_i = rows_of<float>(args.dpre_i);
  std::vector<float> sums(static_cast<std::size_t>(p.batch * p.channels));
  run_float_gated_scan_backward({.in = float_scan(p),
                                 .dh = dh.data,
                                 .chunk_states = args.chunk_states.data<float>(),
                                 .dstate_out = data_or_null<float>(args.dstate_out),
                                 .dv = dv.data,
                                 .dpre_r = dpre_r.data,
                                 .dpre_i = dpre_i.data,
                                 .dstate_in = data_or_null<float>(args.dstate_in),
                                 .dh_stride = dh.stride,
                                 .dv_stride = dv.stride,
                                 .dpre_r_stride = dpre_r.stride,
                                 .dpre_i_stride = dpre_i.stride,
                                 .dlog = sums.data()});
  add_da_log(args, p, sums);
}

}  // namespace

void rglru_scan_forward(Context&, const RglruScanForward& args) {
  visit_float("rglru_scan_forward", args.in.v.dtype(), [&]<class T>() {
    if constexpr (std::is_same_v<T, float>)
      forward_float(args);
    else
      forward<T>(args);
  });
}
void rglru_scan_backward(Context&, const RglruScanBackward& args) {
  visit_float("rglru_scan_backward", args.in.v.dtype(), [&]<class T>() {
    if constexpr (std::is_same_v<T, float>)
      backward_float(args);
    else
      backward<T>(args);
  });
}

}  // namespace lrnn::cpu
