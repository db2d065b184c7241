// Lanes are taken in blocks, which the compiler vectorises over, and time in chunks. Inside a chunk
// the sub-states come one after another, each with all its time steps, so that its state and
// multiplier stay in registers. Sums within a chunk are in T, across chunks in double. Chunks in
// float have kernels of their own: lane_scan_float.hpp.
#include "ops/lane_scan.hpp"

#include <algorithm>
#include <type_traits>

#include "common/eigen.hpp"
#include "common/lanes.hpp"
#include "lane_scan_float.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kChunk = kLaneScanChunk;
constexpr std::int64_t kLanes = kBlockLanes;

template <class T>
Pair<T> times(const Pair<T>& a, const Pair<T>& b) {
  Pair<T> out;
  for (std::size_t i = 0; i < kLanes; ++i) {
    out.re[i] = a.re[i] * b.re[i] - a.im[i] * b.im[i];
    out.im[i] = a.re[i] * b.im[i] + a.im[i] * b.re[i];
  }
  return out;
}
// a conj(b)
template <class T>
Pair<T> times_conj(const Pair<T>& a, const Pair<T>& b) {
  Pair<T> out;
  for (std::size_t i = 0; i < kLanes; ++i) {
    out.re[i] = a.re[i] * b.re[i] + a.im[i] * b.im[i];
    out.im[i] = a.im[i] * b.re[i] - a.re[i] * b.im[i];
  }
  return out;
}
template <class T>
Pair<T> scaled(const Lanes<T>& factor, const Pair<T>& value) {
  Pair<T> out;
  for (std::size_t i = 0; i < kLanes; ++i) {
    out.re[i] = factor[i] * value.re[i];
    out.im[i] = factor[i] * value.im[i];
  }
  return out;
}

// `count` lanes from element `first` of rows with one element per lane at distance `step`.
template <class T>
Lanes<T> load(const T* first, std::int64_t step, std::int64_t count) {
  Lanes<T> out{};
  for (std::int64_t i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = first[i * step];
  return out;
}
template <class T>
void store(T* first, std::int64_t step, std::int64_t count, const Lanes<T>& value) {
  for (std::int64_t i = 0; i < count; ++i) first[i * step] = value[static_cast<std::size_t>(i)];
}

// A block of lanes and the columns of v and y that it uses.
struct Block {
  std::int64_t lane;  // the first
  std::int64_t count;
  std::int64_t column;  // of v for the first lane
};

template <class T>
struct Problem : detail::LaneScanSizes {
  const T* a;
  const T* a_low;
  const T* W;
  const T* skip;
  const T* v;
  const std::int32_t* lengths;

  template <class Args>
  explicit Problem(const Args& args)
      : LaneScanSizes(args.a, args.W, args.v),
        a(args.a.template data<T>()),
        a_low(args.a_low ? args.a_low.template data<T>() : nullptr),
        W(args.W.template data<T>()),
        skip(args.skip ? args.skip.template data<T>() : nullptr),
        v(args.v.template data<T>()),
        lengths(args.lengths ? args.lengths.template data<std::int32_t>() : nullptr) {}

  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths == nullptr ? seqlen : lengths[b];
  }
  // Lane `lane` + i of sub-state m in one of the planes [2, N, M] that begin at `planes`.
  [[nodiscard]] Pair<T> load_pair(const T* planes, const Block& block, std::int64_t m) const {
    const T* const p = planes + block.lane * substates + m;
    return {load(p, substates, block.count), load(p + plane(), substates, block.count)};
  }
  void store_pair(T* planes, const Block& block, std::int64_t m, const Pair<T>& value) const {
    T* const p = planes + block.lane * substates + m;
    store(p, substates, block.count, value.re);
    store(p + plane(), substates, block.count, value.im);
  }
  [[nodiscard]] Pair<T> weight(std::int64_t c, const Block& block, std::int64_t m) const {
    if (!real_weight) return load_pair(W + c * 2 * plane(), block, m);
    return {load(W + c * plane() + block.lane * substates + m, substates, block.count), {}};
  }
  // (a + a_low)^steps - a^steps, to first order: the rest is below 1e-12 of a^steps.
  [[nodiscard]] Pair<T> gap(const Pair<T>& multiplier, const Block& block, std::int64_t m,
                            std::int64_t steps) const {
    Pair<T> out = load_pair(a_low, block, m);
    for (std::int64_t j = 1; j < steps; ++j) out = times(out, multiplier);
    Lanes<T> factor;
    factor.fill(static_cast<T>(steps));
    return scaled(factor, out);
  }
  [[nodiscard]] Lanes<T> drive(std::int64_t token, const Block& block) const {
    return load_lanes(v + token * inputs + block.column, block.count);
  }
  [[nodiscard]] Block block_at(std::int64_t group, std::int64_t index) const {
    const std::int64_t column = index * kLanes;
    return {group * inputs + column, std::min(kLanes, inputs - column), column};
  }
  // Blocks of the lanes of one group.
  [[nodiscard]] std::int64_t blocks() const { return (inputs + kLanes - 1) / kLanes; }
};

// What all chunks of one block of lanes share.
template <class T>
struct Model {
  Pairs<T> a;        // [M]
  Pairs<T> weights;  // [C, M]
  Pairs<T> gaps;     // [M], for as many steps
  std::int64_t gap_steps = 0;

  Model(const Problem<T>& problem, const Block& block)
      : gaps(problem.a_low == nullptr ? 0 : static_cast<std::size_t>(problem.substates)) {
    for (std::int64_t m = 0; m < problem.substates; ++m)
      a.push_back(problem.load_pair(problem.a, block, m));
    for (std::int64_t c = 0; c < problem.channels; ++c)
      for (std::int64_t m = 0; m < problem.substates; ++m)
        weights.push_back(problem.weight(c, block, m));
  }
  [[nodiscard]] const Pair<T>& weight(std::size_t c, std::size_t m) const {
    return weights[c * a.size() + m];
  }
  // Most chunks have as many steps as the one before them.
  void prepare_gaps(const Problem<T>& problem, const Block& block, std::int64_t steps) {
    if (steps == gap_steps) return;
    gap_steps = steps;
    for (std::size_t m = 0; m < gaps.size(); ++m)
      gaps[m] = problem.gap(a[m], block, static_cast<std::int64_t>(m), steps);
  }
};

FloatLaneChunk float_chunk(const Model<float>& model, const std::array<Lanes<float>, kChunk>& v,
                           std::size_t steps, const std::vector<Lines>& next) {
  const std::size_t substates = model.a.size();
  return {.v = v.front().data(),
          .a = numbers(model.a),
          .weights = numbers(model.weights),
          .steps = static_cast<std::int64_t>(steps),
          .substates = static_cast<std::int64_t>(substates),
          .channels = static_cast<std::int64_t>(model.weights.size() / substates),
          .next = next.data(),
          .nexts = static_cast<std::int64_t>(next.size())};
}

// The states of one block of lanes in a row of planes, for the kernels in float to fetch.
template <class T>
void add_lines(const Problem<T>& problem, const TensorView& states, std::int64_t row,
               const Block& block, std::vector<Lines>& lines) {
  if (!states) return;
  const T* const planes =
      states.data<T>() + row * 2 * problem.plane() + block.lane * problem.substates;
  lines.push_back(lines_of_row(planes, block.count * problem.substates));
  lines.push_back(lines_of_row(planes + problem.plane(), block.count * problem.substates));
}

// States of one block of lanes, [M].
template <class T>
Pairs<T> load_states(const Problem<T>& problem, const TensorView& states, std::int64_t row,
                     const Block& block) {
  Pairs<T> out(static_cast<std::size_t>(problem.substates));
  if (!states) return out;
  const T* const planes = states.data<T>() + row * 2 * problem.plane();
  for (std::int64_t m = 0; m < problem.substates; ++m)
    out[static_cast<std::size_t>(m)] = problem.load_pair(planes, block, m);
  return out;
}
template <class T>
void store_states(const Problem<T>& problem, const MutableTensorView& states, std::int64_t row,
                  const Block& block, const Pairs<T>& values) {
  if (!states) return;
  T* const planes = states.data<T>() + row * 2 * problem.plane();
  for (std::int64_t m = 0; m < problem.substates; ++m)
    problem.store_pair(planes, block, m, values[static_cast<std::size_t>(m)]);
}

// A chunk of `steps` tokens, without gaps: advances the states and overwrites w, [C, chunk].
template <class T>
void advance_chunk(const Model<T>& model, const std::array<Lanes<T>, kChunk>& v, std::size_t steps,
                   Pairs<T>& states, std::vector<Lanes<T>>& w, const std::vector<Lines>& next) {
  if constexpr (std::is_same_v<T, float>) {
    run_float_lanes({.in = float_chunk(model, v, steps, next),
                     .states = numbers(states),
                     .w = w.front().data()});
    return;
  }
  std::fill(w.begin(), w.end(), Lanes<T>{});
  for (std::size_t m = 0; m < states.size(); ++m) {
    Pair<T> x = states[m];
    for (std::size_t j = 0; j < steps; ++j) {
      x = times(model.a[m], x);
      for (std::size_t i = 0; i < kLanes; ++i) x.re[i] += v[j][i];
      for (std::size_t c = 0; c < w.size() / kChunk; ++c) {
        Lanes<T>& sum = w[c * kChunk + j];
        const Pair<T>& weight = model.weight(c, m);
        for (std::size_t i = 0; i < kLanes; ++i)
          sum[i] += weight.re[i] * x.re[i] - weight.im[i] * x.im[i];
      }
    }
    states[m] = x;
  }
}

// What forward reads and writes in the tokens of a chunk.
template <class T>
std::vector<Lines> forward_lines(const Problem<T>& problem, const LaneScanForward& args,
                                 std::int64_t b, const Block& block, std::int64_t chunk) {
  std::vector<Lines> lines;
  const std::int64_t steps =
      std::clamp(problem.length(b) - chunk * kChunk, std::int64_t{0}, kChunk);
  if (steps == 0) return lines;
  const std::int64_t token = b * problem.seqlen + chunk * kChunk;
  lines.push_back(
      lines_at(problem.v + token * problem.inputs + block.column, problem.inputs, steps));
  for (std::int64_t c = 0; c < problem.channels && problem.groups == 1; ++c)
    lines.push_back(lines_at(static_cast<const T*>(args.y.data<T>()) + token * problem.outputs +
                                 c * problem.inputs + block.column,
                             problem.outputs, steps));
  add_lines(problem, args.chunk_states, b * problem.chunks + chunk, block, lines);
  return lines;
}

// One sequence and one block of lanes, forward. Calls emit(t, c, w) with the read-out of channel c
// at every valid position.
template <class T, class Emit>
void forward_block(const Problem<T>& problem, const LaneScanForward& args, std::int64_t b,
                   const Block& block, Emit&& emit) {
  const std::int64_t length = problem.length(b);
  const auto channels = static_cast<std::size_t>(problem.channels);
  Model<T> model(problem, block);
  Pairs<T> states = load_states(problem, args.state_in, b, block);
  Pairs<T> entering;
  std::vector<Lanes<T>> w(channels * kChunk);
  std::array<Lanes<T>, kChunk> v;
  for (std::int64_t chunk = 0; chunk < problem.chunks; ++chunk) {
    const std::int64_t begin = chunk * kChunk;
    const std::int64_t steps = std::clamp(length - begin, std::int64_t{0}, kChunk);
    store_states(problem, args.chunk_states, b * problem.chunks + chunk, block, states);
    if (steps == 0) continue;
    for (std::int64_t j = 0; j < steps; ++j)
      v[static_cast<std::size_t>(j)] = problem.drive(b * problem.seqlen + begin + j, block);
    model.prepare_gaps(problem, block, steps);
    if (problem.a_low != nullptr) entering = states;
    advance_chunk(model, v, static_cast<std::size_t>(steps), states, w,
                  forward_lines(problem, args, b, block, chunk + 1));
    for (std::size_t m = 0; m < model.gaps.size(); ++m)
      add(states[m], times(model.gaps[m], entering[m]));
    for (std::size_t c = 0; c < channels; ++c)
      for (std::size_t j = 0; j < static_cast<std::size_t>(steps); ++j)
        emit(begin + static_cast<std::int64_t>(j), static_cast<std::int64_t>(c), w[c * kChunk + j],
             v[j]);
  }
  store_states(problem, args.state_out, b, block, states);
}

// Lanes with outputs of their own.
template <class T>
void forward_lanes(const Problem<T>& problem, const LaneScanForward& args, std::int64_t b,
                   std::int64_t index) {
  const Block block = problem.block_at(0, index);
  T* const y = args.y.data<T>() + b * problem.seqlen * problem.outputs + block.column;
  const auto at = [&](std::int64_t t, std::int64_t c) {
    return y + t * problem.outputs + c * problem.inputs;
  };
  std::vector<Lanes<T>> skip(static_cast<std::size_t>(problem.channels));
  for (std::int64_t c = 0; c < problem.channels && problem.skip != nullptr; ++c)
    skip[static_cast<std::size_t>(c)] =
        load_lanes(problem.skip + c * problem.lanes + block.lane, block.count);
  forward_block(problem, args, b, block,
                [&](std::int64_t t, std::int64_t c, Lanes<T> w, const Lanes<T>& v) {
                  const Lanes<T>& D = skip[static_cast<std::size_t>(c)];
                  for (std::size_t i = 0; i < kLanes; ++i) w[i] += D[i] * v[i];
                  store_lanes(at(t, c), block.count, w);
                });
  for (std::int64_t t = problem.length(b); t < problem.seqlen; ++t)
    for (std::int64_t c = 0; c < problem.channels; ++c)
      store_lanes(at(t, c), block.count, Lanes<T>{});
}

// All lanes of one group, whose outputs are summed block by block.
template <class T>
void forward_group(const Problem<T>& problem, const LaneScanForward& args, std::int64_t b,
                   std::int64_t group) {
  std::vector<T> sums(static_cast<std::size_t>(problem.seqlen), T(0));
  for (std::int64_t index = 0; index < problem.blocks(); ++index)
    forward_block(problem, args, b, problem.block_at(group, index),
                  [&](std::int64_t t, std::int64_t, const Lanes<T>& w, const Lanes<T>&) {
                    T sum = 0;
                    for (std::size_t i = 0; i < kLanes; ++i) sum += w[i];
                    sums[static_cast<std::size_t>(t)] += sum;
                  });
  T* const y = args.y.data<T>() + b * problem.seqlen * problem.outputs + group;
  for (std::int64_t t = 0; t < problem.seqlen; ++t)
    y[t * problem.outputs] = sums[static_cast<std::size_t>(t)];
}

// Gradients of what all tokens share: of one sequence in [2 + 2 C, N, M] (da, dW) and [C, N].
struct Partial {
  std::vector<double> planes;
  std::vector<double> skip;
};

// One sequence and one block of lanes, backward: chunk by chunk from the right, each time the
// states of a chunk, then its adjoints.
template <class T>
class BackwardBlock {
 public:
  BackwardBlock(const Problem<T>& problem, const LaneScanBackward& args, std::int64_t b,
                const Block& block, Partial& partial)
      : problem_(problem),
        args_(args),
        b_(b),
        block_(block),
        partial_(partial),
        channels_(static_cast<std::size_t>(problem.channels)),
        model_(problem, block),
        dy_(channels_ * kChunk),
        da_(model_.a.size()),
        dW_(model_.weights.size()),
        sums_(da_.size() + dW_.size()),
        skip_(channels_),
        dskip_(channels_) {
    for (std::size_t c = 0; c < channels_ && problem.skip != nullptr; ++c)
      skip_[c] = load_lanes(
          problem.skip + static_cast<std::int64_t>(c) * problem.lanes + block.lane, block.count);
  }

  // dv is added to what is there unless `first`.
  void run(bool first) {
    Pairs<T> carries = load_states(problem_, args_.dstate_out, b_, block_);
    const std::int64_t length = problem_.length(b_);
    for (std::int64_t chunk = problem_.chunks - 1; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * kChunk;
      steps_ = static_cast<std::size_t>(std::clamp(length - begin, std::int64_t{0}, kChunk));
      load_chunk(begin);
      if (steps_ > 0) walk_chunk(chunk, carries);
      store_chunk(begin, first);
    }
    store_states(problem_, args_.dstate_in, b_, block_, carries);
    write_partial();
    for (std::size_t c = 0; c < channels_ && problem_.groups == 1; ++c)
      store_lanes(
          partial_.skip.data() + static_cast<std::int64_t>(c) * problem_.lanes + block_.lane,
          block_.count, dskip_[c]);
  }

 private:
  [[nodiscard]] std::int64_t token(std::int64_t begin, std::size_t j) const {
    return b_ * problem_.seqlen + begin + static_cast<std::int64_t>(j);
  }

  void load_chunk(std::int64_t begin) {
    const T* const dy = args_.dy.data<T>();
    const std::int64_t group = block_.lane / problem_.inputs;
    for (std::size_t j = 0; j < steps_; ++j) {
      v_[j] = problem_.drive(token(begin, j), block_);
      dv_[j] = {};
      for (std::size_t c = 0; c < channels_; ++c) {
        const T* const row = dy + token(begin, j) * problem_.outputs;
        Lanes<T>& g = dy_[c * kChunk + j];
        if (problem_.groups == 1)
          g = load_lanes(row + static_cast<std::int64_t>(c) * problem_.inputs + block_.column,
                         block_.count);
        else
          g.fill(row[group]);
      }
    }
  }

  // What it reads and writes in the tokens of a chunk.
  [[nodiscard]] std::vector<Lines> lines(std::int64_t chunk) const {
    std::vector<Lines> lines;
    if (chunk < 0) return lines;
    const auto rows = [&](const T* first, std::int64_t stride) {
      const std::int64_t t = b_ * problem_.seqlen + chunk * kChunk;
      lines.push_back(lines_at(first + t * stride + block_.column, stride, kChunk));
    };
    rows(problem_.v, problem_.inputs);
    rows(args_.dv.data<T>(), problem_.inputs);
    for (std::size_t c = 0; c < channels_ && problem_.groups == 1; ++c)
      rows(args_.dy.data<T>() + static_cast<std::int64_t>(c) * problem_.inputs, problem_.outputs);
    add_lines(problem_, args_.chunk_states, b_ * problem_.chunks + chunk, block_, lines);
    return lines;
  }

  void walk_chunk(std::int64_t chunk, Pairs<T>& carries) {
    const auto before =
        load_states(problem_, args_.chunk_states, b_ * problem_.chunks + chunk, block_);
    model_.prepare_gaps(problem_, block_, static_cast<std::int64_t>(steps_));
    Pairs<T> entering;
    if (problem_.a_low != nullptr) entering = carries;
    if constexpr (std::is_same_v<T, float>)
      run_float_lanes_backward({.in = float_chunk(model_, v_, steps_, lines(chunk - 1)),
                                .states = numbers(before),
                                .dy = dy_.front().data(),
                                .carries = numbers(carries),
                                .dv = dv_.front().data(),
                                .da = numbers(da_),
                                .dW = numbers(dW_)});
    else
      for (std::size_t m = 0; m < carries.size(); ++m) substate(m, before[m], carries[m]);
    for (std::size_t m = 0; m < model_.gaps.size(); ++m)
      add(carries[m], times_conj(entering[m], model_.gaps[m]));
    for (std::size_t i = 0; i < da_.size(); ++i) add(sums_[i], da_[i]);
    for (std::size_t i = 0; i < dW_.size(); ++i) add(sums_[da_.size() + i], dW_[i]);
  }

  void substate(std::size_t m, Pair<T> x, Pair<T>& carry) {
    const Pair<T>& a = model_.a[m];
    Pair<T>& da = da_[m];
    da = {};
    for (std::size_t c = 0; c < channels_; ++c) dW_[c * da_.size() + m] = {};
    for (std::size_t j = 0; j < steps_; ++j) {
      states_[j] = x;
      x = times(a, x);
      for (std::size_t i = 0; i < kLanes; ++i) x.re[i] += v_[j][i];
    }
    states_[steps_] = x;
    for (std::size_t j = steps_; j-- > 0;) {
      Pair<T> p = carry;
      for (std::size_t c = 0; c < channels_; ++c) {
        const Lanes<T>& g = dy_[c * kChunk + j];
        const Pair<T>& weight = model_.weight(c, m);
        for (std::size_t i = 0; i < kLanes; ++i) {
          p.re[i] += g[i] * weight.re[i];
          p.im[i] -= g[i] * weight.im[i];
        }
        const Pair<T>& after = states_[j + 1];
        Pair<T>& dW = dW_[c * da_.size() + m];
        for (std::size_t i = 0; i < kLanes; ++i) {
          dW.re[i] += g[i] * after.re[i];
          dW.im[i] -= g[i] * after.im[i];
        }
      }
      for (std::size_t i = 0; i < kLanes; ++i) dv_[j][i] += p.re[i];
      add(da, times_conj(p, states_[j]));
      carry = times_conj(p, a);
    }
  }

  // Those of a are row 0 of the planes, those of the weights of channel c row 2 + 2 c.
  void write_partial() const {
    for (std::size_t row = 0; row <= channels_; ++row)
      for (std::size_t m = 0; m < da_.size(); ++m) {
        const Pair<double>& sum = sums_[row * da_.size() + m];
        double* const out = partial_.planes.data() +
                            (2 * static_cast<std::int64_t>(row) * problem_.lanes + block_.lane) *
                                problem_.substates +
                            static_cast<std::int64_t>(m);
        for (std::int64_t i = 0; i < block_.count; ++i) {
          out[i * problem_.substates] = sum.re[static_cast<std::size_t>(i)];
          out[problem_.plane() + i * problem_.substates] = sum.im[static_cast<std::size_t>(i)];
        }
      }
  }

  void store_chunk(std::int64_t begin, bool first) {
    const auto size = static_cast<std::size_t>(std::min(kChunk, problem_.seqlen - begin));
    for (std::size_t j = 0; j < size; ++j) {
      T* const out = args_.dv.data<T>() + token(begin, j) * problem_.inputs + block_.column;
      Lanes<T> dv{};
      if (j < steps_) {
        dv = dv_[j];
        for (std::size_t c = 0; c < channels_; ++c) {
          const Lanes<T>& g = dy_[c * kChunk + j];
          for (std::size_t i = 0; i < kLanes; ++i) {
            dv[i] += g[i] * skip_[c][i];
            dskip_[c][i] += static_cast<double>(g[i]) * static_cast<double>(v_[j][i]);
          }
        }
      }
      if (!first) {
        const Lanes<T> there = load_lanes(static_cast<const T*>(out), block_.count);
        for (std::size_t i = 0; i < kLanes; ++i) dv[i] += there[i];
      }
      store_lanes(out, block_.count, dv);
    }
  }

  const Problem<T>& problem_;
  const LaneScanBackward& args_;
  std::int64_t b_;
  Block block_;
  Partial& partial_;
  std::size_t channels_;
  Model<T> model_;
  std::size_t steps_ = 0;           // valid positions of the chunk
  std::array<Lanes<T>, kChunk> v_;  // of the chunk
  std::array<Lanes<T>, kChunk> dv_;
  std::vector<Lanes<T>> dy_;                // [C, chunk]
  Pairs<T> da_;                             // of the chunk, [M]
  Pairs<T> dW_;                             // of the chunk, [C, M]
  Pairs<double> sums_;                      // of all chunks, [1 + C, M]
  std::array<Pair<T>, kChunk + 1> states_;  // of a sub-state
  std::vector<Lanes<T>> skip_;
  std::vector<Lanes<double>> dskip_;
};

// out[r, i] += the sum over the sequences of row `row` + r of their partial sums, in order.
template <class T>
void add_rows(const MutableTensorView& out, const std::vector<Partial>& partials,
              std::vector<double> Partial::*member, std::int64_t first, T* target,
              std::int64_t count) {
  if (!out) return;
#pragma omp parallel for
  for (std::int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (const Partial& p : partials) sum += (p.*member)[static_cast<std::size_t>(first + i)];
    target[i] += static_cast<T>(sum);
  }
}

template <class T>
void add_parameter_gradients(const Problem<T>& problem, const LaneScanBackward& args,
                             const std::vector<Partial>& partials) {
  const std::int64_t plane = problem.plane();
  const auto data = [](const MutableTensorView& t) { return t ? t.data<T>() : nullptr; };
  add_rows(args.da, partials, &Partial::planes, 0, data(args.da), 2 * plane);
  const std::int64_t kept = problem.real_weight ? 1 : 2;
  for (std::int64_t c = 0; c < problem.channels && args.dW; ++c)
    add_rows(args.dW, partials, &Partial::planes, (2 + 2 * c) * plane,
             data(args.dW) + c * kept * plane, kept * plane);
  add_rows(args.dskip, partials, &Partial::skip, 0, data(args.dskip),
           problem.channels * problem.lanes);
  if (!args.dlog_a) return;
  T* const out = args.dlog_a.data<T>();
  const auto value = [&](const T* planes, std::int64_t i) {
    return planes == nullptr ? 0.0 : static_cast<double>(planes[i]);
  };
#pragma omp parallel for
  for (std::int64_t i = 0; i < plane; ++i) {
    double re = 0;
    double im = 0;
    for (const Partial& p : partials) {
      re += p.planes[static_cast<std::size_t>(i)];
      im += p.planes[static_cast<std::size_t>(plane + i)];
    }
    const double a_re = value(problem.a, i) + value(problem.a_low, i);
    const double a_im = value(problem.a, plane + i) + value(problem.a_low, plane + i);
    out[i] += static_cast<T>(re * a_re + im * a_im);
    out[plane + i] += static_cast<T>(im * a_re - re * a_im);
  }
}

}  // namespace

void lane_scan_forward(Context&, const LaneScanForward& args) {
  visit_float("lane_scan_forward", args.v.dtype(), [&]<class T>() {
    const Problem<T> problem(args);
    const bool sums = problem.groups > 1;
    const std::int64_t items = sums ? problem.groups : problem.blocks();
#pragma omp parallel for
    for (std::int64_t item = 0; item < problem.batch * items; ++item) {
      if (sums)
        forward_group(problem, args, item / items, item % items);
      else
        forward_lanes(problem, args, item / items, item % items);
    }
  });
}

void lane_scan_backward(Context&, const LaneScanBackward& args) {
  visit_float("lane_scan_backward", args.v.dtype(), [&]<class T>() {
    const Problem<T> problem(args);
    std::vector<Partial> partials(static_cast<std::size_t>(problem.batch));
    for (Partial& p : partials) {
      p.planes.assign(static_cast<std::size_t>((2 + 2 * problem.channels) * problem.plane()), 0.0);
      p.skip.assign(static_cast<std::size_t>(problem.channels * problem.lanes), 0.0);
    }
    const std::int64_t items = problem.blocks();
#pragma omp parallel for
    for (std::int64_t item = 0; item < problem.batch * items; ++item) {
      const std::int64_t b = item / items;
      for (std::int64_t group = 0; group < problem.groups; ++group)
        BackwardBlock<T>(problem, args, b, problem.block_at(group, item % items),
                         partials[static_cast<std::size_t>(b)])
            .run(group == 0);
    }
    add_parameter_gradients(problem, args, partials);
  });
}

void lane_scan_step(Context& ctx, const LaneScanStep& args) {
  detail::lane_scan_step_by_parts(ctx, args);
}

}  // namespace lrnn::cpu
