#include "io/bpe.hpp"

#include <algorithm>

namespace lrnn::detail {

Bpe::Bpe(const std::array<std::int32_t, 256>& symbols, std::span<const BpeMerge> merges,
         std::int64_t vocab_size)
    : symbols_(symbols), begin_(static_cast<std::size_t>(vocab_size) + 1), entries_(merges.size()) {
  for (const BpeMerge& m : merges) ++begin_[static_cast<std::size_t>(m.left) + 1];
  for (std::size_t t = 1; t < begin_.size(); ++t) begin_[t] += begin_[t - 1];
  std::vector<std::size_t> free(begin_.begin(), begin_.end() - 1);
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const BpeMerge& m = merges[rank];
    entries_[free[static_cast<std::size_t>(m.left)]++] = {m.right, m.product, rank};
  }
  for (std::size_t t = 0; t + 1 < begin_.size(); ++t)
    std::sort(entries_.begin() + static_cast<std::ptrdiff_t>(begin_[t]),
              entries_.begin() + static_cast<std::ptrdiff_t>(begin_[t + 1]),
              [](const Entry& a, const Entry& b) { return a.right < b.right; });
}

const Bpe::Entry* Bpe::find(std::int32_t left, std::int32_t right) const {
  const auto t = static_cast<std::size_t>(left);
  const Entry* const begin = entries_.data() + begin_[t];
  const Entry* const end = entries_.data() + begin_[t + 1];
  const Entry* const it = std::lower_bound(
      begin, end, right, [](const Entry& e, std::int32_t value) { return e.right < value; });
  return it != end && it->right == right ? it : nullptr;
}

bool Bpe::Encoder::is_later(const Candidate& a, const Candidate& b) {
  return a.entry->rank != b.entry->rank ? a.entry->rank > b.entry->rank : a.position > b.position;
}

void Bpe::Encoder::begin(std::string_view word) {
  nodes_.resize(word.size());
  for (std::size_t i = 0; i < word.size(); ++i)
    nodes_[i] = {bpe_.symbols_[static_cast<unsigned char>(word[i])], i - 1, i + 1};
  queue_.clear();
  for (std::size_t i = 0; i + 1 < word.size(); ++i)
    if (const Entry* const e = bpe_.find(nodes_[i].token, nodes_[i + 1].token))
      queue_.push_back({e, i, nodes_[i].token});
  std::make_heap(queue_.begin(), queue_.end(), is_later);
}

void Bpe::Encoder::push(std::size_t position) {
  const Node& node = nodes_[position];
  if (const Entry* const e = bpe_.find(node.token, nodes_[node.next].token)) {
    queue_.push_back({e, position, node.token});
    std::push_heap(queue_.begin(), queue_.end(), is_later);
  }
}

// Either token may have been merged with its other neighbour since.
bool Bpe::Encoder::is_current(const Candidate& c) const {
  const Node& node = nodes_[c.position];
  return node.token == c.left && node.next < nodes_.size() &&
         nodes_[node.next].token == c.entry->right;
}

void Bpe::Encoder::merge(const Candidate& c) {
  Node& node = nodes_[c.position];
  node.token = c.entry->product;
  nodes_[node.next].token = kMerged;
  node.next = nodes_[node.next].next;
  if (node.next < nodes_.size()) {
    nodes_[node.next].previous = c.position;
    push(c.position);
  }
  if (c.position > 0) push(node.previous);
}

std::size_t Bpe::Encoder::encode(std::string_view word, std::vector<std::int32_t>& out) {
  for (std::size_t i = 0; i < word.size(); ++i)
    if (bpe_.symbols_[static_cast<unsigned char>(word[i])] < 0) return i;
  begin(word);
  while (!queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end(), is_later);
    const Candidate c = queue_.back();
    queue_.pop_back();
    if (is_current(c)) merge(c);
  }
  for (std::size_t i = 0; i < nodes_.size(); i = nodes_[i].next) out.push_back(nodes_[i].token);
  return word.npos;
}

}  // namespace lrnn::detail
