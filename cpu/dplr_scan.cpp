// Heads are taken in blocks, which the compiler vectorises over: the sums over the states of a head
// are sums of vectors. Sums over the tokens of a chunk are in T, across chunks in double. Chunks in
// float have kernels of their own: dplr_scan_float.hpp.
#include "ops/dplr_scan.hpp"

#include <algorithm>

#include "common/eigen.hpp"
#include "common/lanes.hpp"
#include "dplr_scan_float.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kChunk = kDplrScanChunk;
constexpr std::int64_t kLanes = kBlockLanes;

// 2 Re sum_n conj(p_n) q_n
template <class T>
Lanes<T> inner_product(const Pairs<T>& p, const Pairs<T>& q) {
  Lanes<T> sum{};
  for (std::size_t n = 0; n < p.size(); ++n)
    for (std::size_t i = 0; i < kLanes; ++i)
      sum[i] += p[n].re[i] * q[n].re[i] + p[n].im[i] * q[n].im[i];
  for (std::size_t i = 0; i < kLanes; ++i) sum[i] *= 2;
  return sum;
}
// q += factor p
template <class T>
void add_scaled(Pairs<T>& q, const Lanes<T>& factor, const Pairs<T>& p) {
  for (std::size_t n = 0; n < p.size(); ++n)
    for (std::size_t i = 0; i < kLanes; ++i) {
      q[n].re[i] += factor[i] * p[n].re[i];
      q[n].im[i] += factor[i] * p[n].im[i];
    }
}
// q += factor conj(p)
template <class T>
void add_scaled_conj(Pairs<T>& q, const Lanes<T>& factor, const Pairs<T>& p) {
  for (std::size_t n = 0; n < p.size(); ++n)
    for (std::size_t i = 0; i < kLanes; ++i) {
      q[n].re[i] += factor[i] * p[n].re[i];
      q[n].im[i] -= factor[i] * p[n].im[i];
    }
}
template <class T>
Lanes<T> scaled(T factor, const Lanes<T>& v) {
  Lanes<T> out;
  for (std::size_t i = 0; i < kLanes; ++i) out[i] = factor * v[i];
  return out;
}

// A block of heads.
struct Block {
  std::int64_t head;  // the first
  std::int64_t count;
};

template <class T>
Lanes<T> load(const T* first, const Block& block) {
  return load_lanes(first + block.head, block.count);
}
template <class T>
void store(T* first, const Block& block, const Lanes<T>& value) {
  store_lanes(first + block.head, block.count, value);
}

template <class T>
struct Problem : detail::DplrScanSizes {
  const T* e;
  const T* w;
  const T* k;
  const T* b;
  const T* C;
  const T* D;
  const T* u;
  const std::int32_t* lengths;

  template <class Args>
  explicit Problem(const Args& args)
      : DplrScanSizes(args.w, args.C, args.u),
        e(args.e.template data<T>()),
        w(args.w.template data<T>()),
        k(args.k.template data<T>()),
        b(args.b.template data<T>()),
        C(args.C.template data<T>()),
        D(args.D ? args.D.template data<T>() : nullptr),
        u(args.u.template data<T>()),
        lengths(args.lengths ? args.lengths.template data<std::int32_t>() : nullptr) {}

  [[nodiscard]] std::int64_t length(std::int64_t batch_index) const {
    return lengths == nullptr ? seqlen : lengths[batch_index];
  }
  [[nodiscard]] std::int64_t blocks() const { return (heads + kLanes - 1) / kLanes; }
  [[nodiscard]] Block block_at(std::int64_t index) const {
    return {index * kLanes, std::min(kLanes, heads - index * kLanes)};
  }
  // From planes [2, H, N]; absent planes are 0.
  [[nodiscard]] Pairs<T> load_planes(const T* planes, const Block& block) const {
    Pairs<T> out(static_cast<std::size_t>(states));
    for (std::int64_t i = 0; i < block.count && planes != nullptr; ++i)
      for (std::int64_t n = 0; n < states; ++n) {
        Pair<T>& pair = out[static_cast<std::size_t>(n)];
        const T* const at = planes + (block.head + i) * states + n;
        pair.re[static_cast<std::size_t>(i)] = at[0];
        pair.im[static_cast<std::size_t>(i)] = at[plane()];
      }
    return out;
  }
  void store_planes(T* planes, const Block& block, const Pairs<T>& values) const {
    for (std::int64_t i = 0; i < block.count && planes != nullptr; ++i)
      for (std::int64_t n = 0; n < states; ++n) {
        const Pair<T>& pair = values[static_cast<std::size_t>(n)];
        T* const at = planes + (block.head + i) * states + n;
        at[0] = pair.re[static_cast<std::size_t>(i)];
        at[plane()] = pair.im[static_cast<std::size_t>(i)];
      }
  }
  // From [H, N, 2].
  [[nodiscard]] Pairs<T> load_interleaved(const T* pairs, const Block& block) const {
    Pairs<T> out(static_cast<std::size_t>(states));
    for (std::int64_t i = 0; i < block.count; ++i)
      for (std::int64_t n = 0; n < states; ++n) {
        Pair<T>& pair = out[static_cast<std::size_t>(n)];
        const T* const at = pairs + 2 * ((block.head + i) * states + n);
        pair.re[static_cast<std::size_t>(i)] = at[0];
        pair.im[static_cast<std::size_t>(i)] = at[1];
      }
    return out;
  }
};

template <class T, class View>
auto* row_of(const View& planes, std::int64_t row, std::int64_t size) {
  return planes ? planes.template data<T>() + row * size : nullptr;
}

// What one block of heads does at a token.
template <class T>
struct Model {
  Pairs<T> e;
  Pairs<T> e_low = {};  // forward alone
  Pairs<T> b;
  std::vector<Pairs<T>> w;
  std::vector<Pairs<T>> k;
  std::vector<Pairs<T>> C;
  std::vector<Lanes<T>> D;

  Model(const Problem<T>& problem, const Block& block)
      : e(problem.load_planes(problem.e, block)), b(problem.load_planes(problem.b, block)) {
    for (std::int64_t r = 0; r < problem.rank; ++r) {
      w.push_back(problem.load_planes(problem.w + r * 2 * problem.plane(), block));
      k.push_back(problem.load_planes(problem.k + r * 2 * problem.plane(), block));
    }
    for (std::int64_t c = 0; c < problem.channels; ++c) {
      C.push_back(problem.load_interleaved(problem.C + c * 2 * problem.plane(), block));
      D.push_back(problem.D == nullptr ? Lanes<T>{} : load(problem.D + c * problem.heads, block));
    }
  }

  // x_t from x_{t-1}; s[r] = <k_r, x_{t-1}>.
  void advance(const Pairs<T>& before, const Lanes<T>& u, Lanes<T>* s, Pairs<T>& x) const {
    for (std::size_t r = 0; r < k.size(); ++r) s[r] = inner_product(k[r], before);
    for (std::size_t n = 0; n < before.size(); ++n) {
      const Pair<T> x0 = before[n];
      Pair<T> step;
      for (std::size_t i = 0; i < kLanes; ++i) {
        step.re[i] = b[n].re[i] * u[i] + (e[n].re[i] * x0.re[i] - e[n].im[i] * x0.im[i]);
        step.im[i] = b[n].im[i] * u[i] + (e[n].re[i] * x0.im[i] + e[n].im[i] * x0.re[i]);
      }
      for (std::size_t i = 0; i < kLanes && !e_low.empty(); ++i) {
        step.re[i] += e_low[n].re[i] * x0.re[i] - e_low[n].im[i] * x0.im[i];
        step.im[i] += e_low[n].re[i] * x0.im[i] + e_low[n].im[i] * x0.re[i];
      }
      for (std::size_t r = 0; r < w.size(); ++r)
        for (std::size_t i = 0; i < kLanes; ++i) {
          step.re[i] -= w[r][n].re[i] * s[r][i];
          step.im[i] -= w[r][n].im[i] * s[r][i];
        }
      for (std::size_t i = 0; i < kLanes; ++i) {
        x[n].re[i] = x0.re[i] + step.re[i];
        x[n].im[i] = x0.im[i] + step.im[i];
      }
    }
  }
  // Without the skip.
  [[nodiscard]] Lanes<T> read(std::size_t c, const Pairs<T>& x) const {
    Lanes<T> sum{};
    for (std::size_t n = 0; n < x.size(); ++n)
      for (std::size_t i = 0; i < kLanes; ++i)
        sum[i] += C[c][n].re[i] * x[n].re[i] - C[c][n].im[i] * x[n].im[i];
    return scaled(T(2), sum);
  }
  // q becomes M^* q; r[j] = <w_j, q>.
  void retreat(Pairs<T>& q, Lanes<T>* r) const {
    for (std::size_t j = 0; j < w.size(); ++j) r[j] = inner_product(w[j], q);
    for (std::size_t n = 0; n < q.size(); ++n) {
      const Pair<T> q0 = q[n];
      for (std::size_t i = 0; i < kLanes; ++i) {
        q[n].re[i] += e[n].re[i] * q0.re[i] + e[n].im[i] * q0.im[i];
        q[n].im[i] += e[n].re[i] * q0.im[i] - e[n].im[i] * q0.re[i];
      }
      for (std::size_t j = 0; j < k.size(); ++j)
        for (std::size_t i = 0; i < kLanes; ++i) {
          q[n].re[i] -= k[j][n].re[i] * r[j][i];
          q[n].im[i] -= k[j][n].im[i] * r[j][i];
        }
    }
  }
};

/// Chunks of one block of heads, token by token.
template <class T>
class Chunks {
 public:
  Chunks(const Model<T>& model, const Problem<T>& problem)
      : model_(model),
        states_(static_cast<std::size_t>(kChunk + 1),
                Pairs<T>(static_cast<std::size_t>(problem.states))),
        s_(static_cast<std::size_t>(kChunk * problem.rank)),
        r_(static_cast<std::size_t>(problem.rank)),
        fields_(static_cast<std::size_t>(problem.fields())) {}

  // Overwrites y, [C, chunk], without the skip.
  void forward(std::int64_t steps, const std::vector<Lanes<T>>& u, Pairs<T>& x,
               std::vector<Lanes<T>>& y, const std::vector<Lines>&) {
    for (std::size_t j = 0; j < static_cast<std::size_t>(steps); ++j) {
      model_.advance(x, u[j], s_.data(), x);
      for (std::size_t c = 0; c < model_.C.size(); ++c) y[c * kChunk + j] = model_.read(c, x);
    }
  }
  // Overwrites du without the skip, and the gradients of e, b, w, k, C; x is before the chunk.
  void backward(std::int64_t steps, const std::vector<Lanes<T>>& u, const Pairs<T>& x,
                const std::vector<Lanes<T>>& dy, Pairs<T>& carry, std::vector<Lanes<T>>& du,
                Pairs<T>& fields, const std::vector<Lines>&) {
    const std::size_t rank = r_.size();
    states_[0] = x;
    for (std::size_t j = 0; j < static_cast<std::size_t>(steps); ++j)
      model_.advance(states_[j], u[j], &s_[j * rank], states_[j + 1]);
    for (auto& field : fields_) field.assign(x.size(), {});
    for (auto j = static_cast<std::size_t>(steps); j-- > 0;) du[j] = retrace(j, u[j], dy, carry);
    for (std::size_t f = 0; f < fields_.size(); ++f)
      std::copy(fields_[f].begin(), fields_[f].end(),
                fields.begin() + static_cast<std::ptrdiff_t>(f * x.size()));
  }

 private:
  // Token j of the chunk; returns what goes to u through the state.
  Lanes<T> retrace(std::size_t j, const Lanes<T>& u, const std::vector<Lanes<T>>& dy,
                   Pairs<T>& carry) {
    const std::size_t rank = r_.size();
    for (std::size_t c = 0; c < model_.C.size(); ++c) {
      const Lanes<T> twice = scaled(T(2), dy[c * kChunk + j]);
      add_scaled_conj(carry, twice, model_.C[c]);
      add_scaled_conj(fields_[2 + 2 * rank + c], twice, states_[j + 1]);
    }
    const Lanes<T> through = scaled(T(0.5), inner_product(model_.b, carry));
    add_products(fields_[0], carry, states_[j]);
    add_scaled(fields_[1], u, carry);
    for (std::size_t r = 0; r < rank; ++r)
      add_scaled(fields_[2 + r], scaled(T(-1), s_[j * rank + r]), carry);
    model_.retreat(carry, r_.data());
    for (std::size_t r = 0; r < rank; ++r)
      add_scaled(fields_[2 + rank + r], scaled(T(-1), r_[r]), states_[j]);
    return through;
  }
  // sum += q conj(x)
  static void add_products(Pairs<T>& sum, const Pairs<T>& q, const Pairs<T>& x) {
    for (std::size_t n = 0; n < sum.size(); ++n)
      for (std::size_t i = 0; i < kLanes; ++i) {
        sum[n].re[i] += q[n].re[i] * x[n].re[i] + q[n].im[i] * x[n].im[i];
        sum[n].im[i] += q[n].im[i] * x[n].re[i] - q[n].re[i] * x[n].im[i];
      }
  }

  const Model<T>& model_;
  std::vector<Pairs<T>> states_;  // of the chunk
  std::vector<Lanes<T>> s_;       // of the chunk, [chunk, R]
  std::vector<Lanes<T>> r_;
  std::vector<Pairs<T>> fields_;  // gradients of the chunk
};

/// In float, by the kernels.
template <>
class Chunks<float> {
 public:
  Chunks(const Model<float>& model, const Problem<float>& problem)
      : w_(pointers(model.w)),
        k_(pointers(model.k)),
        C_(pointers(model.C)),
        scratch_(
            static_cast<std::size_t>(float_dplr_scratch(problem.states, problem.rank) / kLanes)),
        model_{.states = problem.states,
               .rank = problem.rank,
               .channels = problem.channels,
               .e = numbers(model.e),
               .e_low = numbers(model.e_low),
               .b = numbers(model.b),
               .w = w_.data(),
               .k = k_.data(),
               .C = C_.data()} {}

  void forward(std::int64_t steps, const std::vector<Lanes<float>>& u, Pairs<float>& x,
               std::vector<Lanes<float>>& y, const std::vector<Lines>& next) {
    run_float_dplr({.model = model_,
                    .steps = steps,
                    .u = u.front().data(),
                    .x = numbers(x),
                    .y = y.front().data(),
                    .scratch = scratch(),
                    .next = next.data(),
                    .nexts = static_cast<std::int64_t>(next.size())});
  }
  void backward(std::int64_t steps, const std::vector<Lanes<float>>& u, const Pairs<float>& x,
                const std::vector<Lanes<float>>& dy, Pairs<float>& carry,
                std::vector<Lanes<float>>& du, Pairs<float>& fields,
                const std::vector<Lines>& next) {
    run_float_dplr_backward({.model = model_,
                             .steps = steps,
                             .u = u.front().data(),
                             .x = numbers(x),
                             .dy = dy.front().data(),
                             .carry = numbers(carry),
                             .du = du.front().data(),
                             .fields = numbers(fields),
                             .scratch = scratch(),
                             .next = next.data(),
                             .nexts = static_cast<std::int64_t>(next.size())});
  }

 private:
  static std::vector<const float*> pointers(const std::vector<Pairs<float>>& from) {
    std::vector<const float*> to;
    for (const auto& pairs : from) to.push_back(numbers(pairs));
    return to;
  }
  float* scratch() { return scratch_.front().data(); }

  std::vector<const float*> w_, k_, C_;
  std::vector<Lanes<float>> scratch_;
  FloatDplrModel model_;
};

// The states of a block in a row of planes, and its tokens in a chunk of rows [.., heads]: what
// kernels in float fetch.
template <class T>
void add_planes(const Problem<T>& problem, const T* planes, const Block& block,
                std::vector<Lines>& lines) {
  if (planes == nullptr) return;
  for (const T* plane : {planes, planes + problem.plane()})
    lines.push_back(
        lines_of_row(plane + block.head * problem.states, block.count * problem.states));
}
template <class T>
void add_rows(const Problem<T>& problem, const T* rows, std::int64_t batch, std::int64_t chunk,
              const Block& block, std::vector<Lines>& lines, std::int64_t channels = 1) {
  const std::int64_t steps =
      std::clamp(problem.length(batch) - chunk * kChunk, std::int64_t{0}, kChunk);
  const std::int64_t token = batch * problem.seqlen + chunk * kChunk;
  for (std::int64_t c = 0; c < channels && steps > 0; ++c)
    lines.push_back(lines_at(rows + (token * channels + c) * problem.heads + block.head,
                             channels * problem.heads, steps));
}

template <class T>
void forward_block(const Problem<T>& problem, const DplrScanForward& args, std::int64_t batch,
                   const Block& block) {
  Model<T> model(problem, block);
  if (args.e_low) model.e_low = problem.load_planes(args.e_low.data<T>(), block);
  const std::int64_t size = 2 * problem.plane();
  const std::int64_t length = problem.length(batch);
  Pairs<T> x = problem.load_planes(row_of<T>(args.state_in, batch, size), block);
  std::vector<Lanes<T>> u(kChunk);
  std::vector<Lanes<T>> y(model.C.size() * kChunk);
  Chunks<T> chunks(model, problem);
  const auto lines = [&](std::int64_t chunk) {
    std::vector<Lines> to;
    if (chunk == problem.chunks) return to;
    add_rows<T>(problem, problem.u, batch, chunk, block, to);
    add_rows<T>(problem, args.y.data<T>(), batch, chunk, block, to, problem.channels);
    add_planes<T>(problem, row_of<T>(args.chunk_states, batch * problem.chunks + chunk, size),
                  block, to);
    return to;
  };
  for (std::int64_t chunk = 0; chunk < problem.chunks; ++chunk) {
    const std::int64_t begin = chunk * kChunk;
    const std::int64_t steps = std::clamp(length - begin, std::int64_t{0}, kChunk);
    problem.store_planes(row_of<T>(args.chunk_states, batch * problem.chunks + chunk, size), block,
                         x);
    for (std::int64_t j = 0; j < steps; ++j)
      u[static_cast<std::size_t>(j)] =
          load(problem.u + (batch * problem.seqlen + begin + j) * problem.heads, block);
    if (steps > 0) chunks.forward(steps, u, x, y, lines(chunk + 1));
    for (std::int64_t t = begin; t < std::min(begin + kChunk, problem.seqlen); ++t)
      for (std::size_t c = 0; c < model.C.size(); ++c) {
        const auto j = static_cast<std::size_t>(t - begin);
        T* const out = args.y.data<T>() + ((batch * problem.seqlen + t) * problem.channels +
                                           static_cast<std::int64_t>(c)) *
                                              problem.heads;
        Lanes<T> value{};
        for (std::size_t i = 0; i < kLanes && t < length; ++i)
          value[i] = y[c * kChunk + j][i] + model.D[c][i] * u[j][i];
        store(out, block, value);
      }
  }
  problem.store_planes(row_of<T>(args.state_out, batch, size), block, x);
}

// Gradients of what all tokens share, of one sequence: e, b, w, k, C as planes [fields, 2, H, N],
// and D as [C, H].
struct Partial {
  std::vector<double> planes;
  std::vector<double> skip;
};

// One sequence and one block of heads, backward: chunk by chunk from the right, each time the
// states of a chunk, then its adjoints.
template <class T>
class BackwardBlock {
 public:
  BackwardBlock(const Problem<T>& problem, const DplrScanBackward& args, std::int64_t batch,
                const Block& block, Partial& partial)
      : problem_(problem),
        args_(args),
        batch_(batch),
        block_(block),
        partial_(partial),
        model_(problem, block),
        chunks_(model_, problem),
        u_(kChunk),
        du_(kChunk),
        dy_(static_cast<std::size_t>(problem.channels * kChunk)),
        fields_(static_cast<std::size_t>(problem.fields() * problem.states)),
        sums_(fields_.size()) {}

  void run() {
    const std::int64_t size = 2 * problem_.plane();
    carry_ = problem_.load_planes(row_of<T>(args_.dstate_out, batch_, size), block_);
    const std::int64_t length = problem_.length(batch_);
    for (std::int64_t chunk = problem_.chunks - 1; chunk >= 0; --chunk) {
      const std::int64_t begin = chunk * kChunk;
      const std::int64_t steps = std::clamp(length - begin, std::int64_t{0}, kChunk);
      const std::int64_t end = std::min(begin + kChunk, problem_.seqlen);
      for (std::int64_t t = begin + steps; t < end; ++t) store(du(t), block_, Lanes<T>{});
      if (steps > 0) walk_chunk(chunk, begin, steps);
    }
    problem_.store_planes(row_of<T>(args_.dstate_in, batch_, size), block_, carry_);
    for (std::int64_t f = 0; f < problem_.fields(); ++f) write_partial(f);
  }

 private:
  [[nodiscard]] std::int64_t token(std::int64_t t) const { return batch_ * problem_.seqlen + t; }
  [[nodiscard]] T* du(std::int64_t t) const {
    return args_.du.data<T>() + token(t) * problem_.heads;
  }
  void walk_chunk(std::int64_t chunk, std::int64_t begin, std::int64_t steps) {
    const T* const states =
        row_of<T>(args_.chunk_states, batch_ * problem_.chunks + chunk, 2 * problem_.plane());
    for (std::int64_t j = 0; j < steps; ++j) {
      const std::int64_t row = token(begin + j);
      u_[static_cast<std::size_t>(j)] = load(problem_.u + row * problem_.heads, block_);
      for (std::int64_t c = 0; c < problem_.channels; ++c)
        dy_[static_cast<std::size_t>(c * kChunk + j)] =
            load(args_.dy.data<T>() + (row * problem_.channels + c) * problem_.heads, block_);
    }
    chunks_.backward(steps, u_, problem_.load_planes(states, block_), dy_, carry_, du_, fields_,
                     lines(chunk - 1));
    for (std::int64_t j = 0; j < steps; ++j) {
      add_skip(static_cast<std::size_t>(j));
      store(du(begin + j), block_, du_[static_cast<std::size_t>(j)]);
    }
    for (std::size_t i = 0; i < fields_.size(); ++i) add(sums_[i], fields_[i]);
  }

  // What it reads and writes in a chunk.
  [[nodiscard]] std::vector<Lines> lines(std::int64_t chunk) const {
    std::vector<Lines> to;
    if (chunk < 0) return to;
    add_rows<T>(problem_, problem_.u, batch_, chunk, block_, to);
    add_rows<T>(problem_, args_.du.data<T>(), batch_, chunk, block_, to);
    add_rows<T>(problem_, args_.dy.data<T>(), batch_, chunk, block_, to, problem_.channels);
    add_planes<T>(
        problem_,
        row_of<T>(args_.chunk_states, batch_ * problem_.chunks + chunk, 2 * problem_.plane()),
        block_, to);
    return to;
  }

  // What goes through D at token j of the chunk.
  void add_skip(std::size_t j) {
    for (std::size_t c = 0; c < model_.C.size(); ++c) {
      const Lanes<T>& g = dy_[c * kChunk + j];
      double* const skip =
          partial_.skip.data() + static_cast<std::int64_t>(c) * problem_.heads + block_.head;
      for (std::size_t i = 0; i < kLanes; ++i) du_[j][i] += model_.D[c][i] * g[i];
      for (std::size_t i = 0; i < static_cast<std::size_t>(block_.count); ++i)
        skip[i] += static_cast<double>(g[i]) * static_cast<double>(u_[j][i]);
    }
  }

  void write_partial(std::int64_t field) const {
    double* const planes = partial_.planes.data() + field * 2 * problem_.plane();
    for (std::int64_t i = 0; i < block_.count; ++i)
      for (std::int64_t n = 0; n < problem_.states; ++n) {
        const Pair<double>& sum = sums_[static_cast<std::size_t>(field * problem_.states + n)];
        double* const at = planes + (block_.head + i) * problem_.states + n;
        at[0] = sum.re[static_cast<std::size_t>(i)];
        at[problem_.plane()] = sum.im[static_cast<std::size_t>(i)];
      }
  }

  const Problem<T>& problem_;
  const DplrScanBackward& args_;
  std::int64_t batch_;
  Block block_;
  Partial& partial_;
  Model<T> model_;
  Chunks<T> chunks_;
  Pairs<T> carry_;
  std::vector<Lanes<T>> u_;   // of the chunk
  std::vector<Lanes<T>> du_;  // of the chunk
  std::vector<Lanes<T>> dy_;  // of the chunk, [C, chunk]
  Pairs<T> fields_;           // gradients of the chunk, [fields, N]
  Pairs<double> sums_;        // those of all chunks
};

// out += the sums over the sequences of `count` partial sums, in order. Element i of out is
// element `place(i)` of each.
template <class T, class Place>
void add_sums(const MutableTensorView& out, const std::vector<Partial>& partials,
              std::vector<double> Partial::*member, Place&& place) {
  if (!out) return;
  T* const target = out.data<T>();
  const std::int64_t count = out.numel();
#pragma omp parallel for
  for (std::int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (const Partial& p : partials) sum += (p.*member)[static_cast<std::size_t>(place(i))];
    target[i] += static_cast<T>(sum);
  }
}

template <class T>
void add_parameter_gradients(const Problem<T>& problem, const DplrScanBackward& args,
                             const std::vector<Partial>& partials) {
  const std::int64_t plane = problem.plane();
  const auto add_planes = [&](const MutableTensorView& out, std::int64_t field) {
    add_sums<T>(out, partials, &Partial::planes,
                [=](std::int64_t i) { return field * 2 * plane + i; });
  };
  add_planes(args.de, 0);
  add_planes(args.db, 1);
  add_planes(args.dw, 2);
  add_planes(args.dk, 2 + problem.rank);
  const std::int64_t first = (2 + 2 * problem.rank) * 2 * plane;
  add_sums<T>(args.dC, partials, &Partial::planes, [=](std::int64_t i) {
    const std::int64_t pair = i / 2;
    return first + (pair / plane * 2 + i % 2) * plane + pair % plane;
  });
  add_sums<T>(args.dD, partials, &Partial::skip, [](std::int64_t i) { return i; });
}

}  // namespace

void dplr_scan_forward(Context&, const DplrScanForward& args) {
  visit_float("dplr_scan_forward", args.u.dtype(), [&]<class T>() {
    const Problem<T> problem(args);
    const std::int64_t blocks = problem.blocks();
#pragma omp parallel for
    for (std::int64_t item = 0; item < problem.batch * blocks; ++item)
      forward_block(problem, args, item / blocks, problem.block_at(item % blocks));
  });
}

void dplr_scan_backward(Context&, const DplrScanBackward& args) {
  visit_float("dplr_scan_backward", args.u.dtype(), [&]<class T>() {
    const Problem<T> problem(args);
    std::vector<Partial> partials(static_cast<std::size_t>(problem.batch));
    for (Partial& p : partials) {
      p.planes.assign(static_cast<std::size_t>(problem.fields() * 2 * problem.plane()), 0.0);
      p.skip.assign(static_cast<std::size_t>(problem.channels * problem.heads), 0.0);
    }
    const std::int64_t blocks = problem.blocks();
#pragma omp parallel for
    for (std::int64_t item = 0; item < problem.batch * blocks; ++item)
      BackwardBlock<T>(problem, args, item / blocks, problem.block_at(item % blocks),
                       partials[static_cast<std::size_t>(item / blocks)])
          .run();
    add_parameter_gradients(problem, args, partials);
  });
}

void dplr_scan_step(Context& ctx, const DplrScanStep& args) {
  detail::dplr_scan_step_by_parts(ctx, args);
}

}  // namespace lrnn::cpu
