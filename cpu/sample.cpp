#include "lrnn/ops/sample.hpp"

#include <algorithm>
#include <omp.h>
#include <vector>

#include "common/eigen.hpp"
#include "ops/dispatch.hpp"
#include "ops/sample_math.hpp"

namespace lrnn::cpu {
namespace {

using detail::SamplePlan;

// A token as (distance, index) in one number: their order is the order of the filters.
using Token = std::uint64_t;
Token token_of(std::uint32_t distance, std::size_t index) {
  return (Token{distance} << 32) | index;
}
std::uint32_t distance_of(Token token) {
  return static_cast<std::uint32_t>(token >> 32);
}

// Buffers of one thread, allocated outside the parallel region.
struct Workspace {
  explicit Workspace(std::int64_t vocab_size)
      : keys(static_cast<std::size_t>(vocab_size)), tokens(keys.size()) {}
  std::vector<std::uint32_t> keys;
  std::vector<Token> tokens;
};

// Fills the keys of a row and returns its best candidate.
template <class T>
std::uint64_t read_row(const T* logits, const std::int32_t* seen, const SamplePlan& plan,
                       std::vector<std::uint32_t>& keys) {
  std::uint64_t best = 0;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = detail::penalised_key(static_cast<float>(logits[i]), seen,
                                    static_cast<std::int64_t>(i), plan);
    best = std::max(best, detail::pack_candidate(keys[i], static_cast<std::uint32_t>(i)));
  }
  return best;
}

std::uint64_t total_weight(const std::vector<Token>& tokens) {
  std::uint64_t total = 0;
  for (const Token token : tokens) total += detail::weight_of(distance_of(token));
  return total;
}

// Leaves a prefix of the order (distance, index) that holds at least `target` of the weight.
void keep_weight(std::vector<Token>& tokens, std::uint64_t target) {
  std::sort(tokens.begin(), tokens.end());
  std::uint64_t sum = 0;
  std::size_t count = 0;
  while (sum < target) sum += detail::weight_of(distance_of(tokens[count++]));
  tokens.resize(count);
}

// Leaves in `tokens` what passes the filters, in the order of the indices.
void filter(const std::vector<std::uint32_t>& keys, std::uint32_t best, const SamplePlan& plan,
            std::vector<Token>& tokens) {
  tokens.clear();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::uint32_t distance = detail::distance_of(best, keys[i], plan);
    if (distance < detail::kDistanceEnd) tokens.push_back(token_of(distance, i));
  }
  const auto limit = static_cast<std::size_t>(plan.top_k);
  if (limit > 0 && limit < tokens.size()) {
    std::nth_element(tokens.begin(), tokens.begin() + plan.top_k, tokens.end());
    tokens.resize(limit);
  }
  if (plan.has_top_p) keep_weight(tokens, detail::top_p_target(plan, total_weight(tokens)));
  std::erase_if(tokens, [&](Token t) { return distance_of(t) >= plan.distance_end; });
  if (plan.top_k == 0 && !plan.has_top_p) return;  // nothing was reordered
  std::sort(tokens.begin(), tokens.end(), [](Token a, Token b) {
    return static_cast<std::uint32_t>(a) < static_cast<std::uint32_t>(b);
  });
}

// The first token in the order of the indices at which the sum of the weights exceeds `number`.
std::int32_t token_at(const std::vector<Token>& tokens, std::uint64_t number) {
  std::uint64_t sum = 0;
  for (const Token token : tokens) {
    sum += detail::weight_of(distance_of(token));
    if (sum > number) return static_cast<std::int32_t>(static_cast<std::uint32_t>(token));
  }
  return 0;
}

void add_seen(std::int32_t* seen, std::int32_t id) {
  std::int32_t& word = seen[id >> 5];
  word = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) | (1U << (id & 31)));
}

}  // namespace

void sample_forward(Context&, const SampleForward& a) {
  const SamplePlan plan = detail::plan_of(a.options);
  const std::int64_t vocab_size = a.logits.dim(-1);
  const std::int64_t rows = a.logits.numel() / vocab_size;
  const std::int64_t words = seen_words(vocab_size);
  const std::int64_t stride = detail::row_stride(a.logits);
  std::int32_t* const ids = a.ids.data<std::int32_t>();
  std::int32_t* const seen_masks = a.seen ? a.seen.data<std::int32_t>() : nullptr;
  std::int64_t* const counters = plan.greedy ? nullptr : a.counters.data<std::int64_t>();
  std::vector<Workspace> workspaces(static_cast<std::size_t>(omp_get_max_threads()),
                                    Workspace(vocab_size));
  visit_float("sample_forward", a.logits.dtype(), [&]<class T>() {
    const T* const logits = a.logits.data<T>();
#pragma omp parallel for
    for (std::int64_t r = 0; r < rows; ++r) {
      Workspace& work = workspaces[static_cast<std::size_t>(omp_get_thread_num())];
      std::int32_t* const seen = seen_masks != nullptr ? seen_masks + r * words : nullptr;
      const std::uint64_t best = read_row(logits + r * stride, seen, plan, work.keys);
      const auto best_key = static_cast<std::uint32_t>(best >> 32);
      std::int32_t id = detail::index_of_best(best);
      if (!plan.greedy) {
        const auto counter = static_cast<std::uint64_t>(counters[r]++);
        if (best_key > detail::kKeyOfMinusInfinity) {
          filter(work.keys, best_key, plan, work.tokens);
          id = token_at(work.tokens, detail::draw(a.seed, static_cast<std::uint64_t>(r), counter,
                                                  total_weight(work.tokens)));
        }
      }
      ids[r] = id;
      if (seen != nullptr) add_seen(seen, id);
    }
  });
}

void mark_seen(Context&, const MarkSeen& a) {
  const std::int64_t rows = a.ids.dim(0);
  const std::int64_t count = a.ids.dim(1);
  const std::int64_t words = seen_words(a.vocab_size);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int32_t* const ids = a.ids.data<std::int32_t>() + r * count;
    std::int32_t* const seen = a.seen.data<std::int32_t>() + r * words;
    const std::int64_t valid = a.lengths ? a.lengths.data<std::int32_t>()[r] : count;
    for (std::int64_t i = 0; i < std::min(count, valid); ++i) {
      const std::int32_t id = ids[i];
      if (id < 0 || id >= a.vocab_size) continue;
      seen[id >> 5] =
          static_cast<std::int32_t>(static_cast<std::uint32_t>(seen[id >> 5]) | (1U << (id & 31)));
    }
  }
}

}  // namespace lrnn::cpu
