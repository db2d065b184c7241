// Channels are the vector lanes: a pack of channels keeps its states in registers while time runs.
// Work items are (sequence, pack), so that results do not depend on the number of threads.
#include "lrnn/ops/first_order_scan.hpp"

#include "common/pack.hpp"
#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

/// Operands as pointers, and sizes.
template <class T>
struct Problem {
  Rows<const T> gate;  // a or log a
  bool is_log;
  const std::int32_t* lengths;
  std::int64_t batch, seqlen, channels, packs;

  explicit Problem(const FirstOrderScanInputs& in)
      : gate(rows_of<T>(in.a ? in.a : in.log_a)),
        is_log(!in.a),
        lengths(data_or_null<std::int32_t>(in.lengths)),
        batch(in.b.dim(0)),
        seqlen(in.b.dim(1)),
        channels(in.b.dim(2)),
        packs((channels + kLanes<T> - 1) / kLanes<T>) {}
  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths != nullptr ? lengths[b] : seqlen;
  }
};

/// One pack of channels of one sequence.
template <class T>
struct Lanes {
  const Problem<T>& p;
  std::int64_t b, first, count;

  Lanes(const Problem<T>& problem, std::int64_t sequence, std::int64_t pack)
      : p(problem),
        b(sequence),
        first(pack * kLanes<T>),
        count(std::min<std::int64_t>(kLanes<T>, problem.channels - first)) {}

  [[nodiscard]] Pack<T> read(const Rows<const T>& rows, std::int64_t t) const {
    return load(rows[b * p.seqlen + t] + first, count);
  }
  void write(const Pack<T>& value, const Rows<T>& rows, std::int64_t t) const {
    store<T>(value, rows[b * p.seqlen + t] + first, count);
  }
  [[nodiscard]] Pack<T> multiplier(std::int64_t t) const {
    const Pack<T> v = read(p.gate, t);
    return p.is_log ? Pack<T>(v.exp()) : v;
  }
  // Of a dense [B, D] tensor.
  [[nodiscard]] Pack<T> read_state(const T* base) const {
    if (base == nullptr) return Pack<T>::Zero();
    return load(base + b * p.channels + first, count);
  }
  void write_state(const Pack<T>& value, T* base) const {
    if (base != nullptr) store<T>(value, base + b * p.channels + first, count);
  }
};

/// Calls f(lanes) for all packs of all sequences.
template <class T, class F>
void for_each_pack(const Problem<T>& p, F&& f) {
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t pack = 0; pack < p.packs; ++pack) f(Lanes<T>(p, b, pack));
}

template <class T>
void forward(const FirstOrderScanForward& args) {
  const Problem<T> p(args.in);
  const auto b = rows_of<T>(args.in.b);
  const auto out = rows_of<T>(args.h);
  for_each_pack(p, [&](const Lanes<T>& lanes) {
    Pack<T> h = lanes.read_state(data_or_null<T>(args.in.state_in));
    const std::int64_t length = p.length(lanes.b);
    for (std::int64_t t = 0; t < length; ++t) {
      h = lanes.multiplier(t) * h + lanes.read(b, t);
      lanes.write(h, out, t);
    }
    for (std::int64_t t = length; t < p.seqlen; ++t) lanes.write(Pack<T>::Zero(), out, t);
    lanes.write_state(h, data_or_null<T>(args.state_out));
  });
}

template <class T>
void backward(const FirstOrderScanBackward& args) {
  const Problem<T> p(args.in);
  const auto h = rows_of<T>(args.h);
  const auto dh = rows_of<T>(args.dh);
  const auto dgate = rows_of<T>(p.is_log ? args.dlog_a : args.da);
  const auto db = rows_of<T>(args.db);
  for_each_pack(p, [&](const Lanes<T>& lanes) {
    const Pack<T> state_in = lanes.read_state(data_or_null<T>(args.in.state_in));
    Pack<T> carry = lanes.read_state(data_or_null<T>(args.dstate_out));  // a_{t+1} g_{t+1}
    const std::int64_t length = p.length(lanes.b);
    for (std::int64_t t = length; t < p.seqlen; ++t) {
      lanes.write(Pack<T>::Zero(), dgate, t);
      lanes.write(Pack<T>::Zero(), db, t);
    }
    for (std::int64_t t = length - 1; t >= 0; --t) {
      const Pack<T> g = lanes.read(dh, t) + carry;
      const Pack<T> before = t > 0 ? lanes.read(h, t - 1) : state_in;
      carry = lanes.multiplier(t) * g;
      lanes.write((p.is_log ? carry : g) * before, dgate, t);
      lanes.write(g, db, t);
    }
    lanes.write_state(carry, data_or_null<T>(args.dstate_in));
  });
}

}  // namespace

void first_order_scan_forward(Context&, const FirstOrderScanForward& args) {
  visit_float("first_order_scan_forward", args.in.b.dtype(),
              [&]<class T>() { forward<T>(args); });
}
void first_order_scan_backward(Context&, const FirstOrderScanBackward& args) {
  visit_float("first_order_scan_backward", args.in.b.dtype(),
              [&]<class T>() { backward<T>(args); });
}

}  // namespace lrnn::cpu
