/// Byte pair encoding of one word.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace lrnn::detail {

/// Tokens `left` and `right`, side by side, become `product`.
struct BpeMerge {
  std::int32_t left;
  std::int32_t right;
  std::int32_t product;
};

class Bpe {
 public:
  class Encoder;
  /// `symbols`: the token of each byte, -1 where there is none. `merges`: no pair twice, the first
  /// is done first. All ids are in [0, vocab_size).
  Bpe(const std::array<std::int32_t, 256>& symbols, std::span<const BpeMerge> merges,
      std::int64_t vocab_size);

 private:
  struct Entry {
    std::int32_t right;
    std::int32_t product;
    std::size_t rank;
  };
  /// The merge of two neighbours; null if there is none.
  [[nodiscard]] const Entry* find(std::int32_t left, std::int32_t right) const;

  std::array<std::int32_t, 256> symbols_;
  // The merges with left token t are entries_[begin_[t]] .. entries_[begin_[t + 1] - 1], in the
  // order of `right`: unlike a hash table's, the time of a search does not depend on what a file
  // holds.
  std::vector<std::size_t> begin_;
  std::vector<Entry> entries_;
};

/// Encodes one word after the other in the same memory.
class Bpe::Encoder {
 public:
  explicit Encoder(const Bpe& bpe) : bpe_(bpe) {}

  /// Appends the tokens of `word`: of all neighbours that can be merged, those of the first merge,
  /// of these the leftmost, until none is left. O(n log n) for n bytes.
  /// Returns the offset of the first byte without a token, in which case `out` is as before, or
  /// npos.
  std::size_t encode(std::string_view word, std::vector<std::int32_t>& out);

 private:
  static constexpr std::int32_t kMerged = -1;
  // Of a list that is linked both ways.
  struct Node {
    std::int32_t token;  // kMerged: is part of a token further left
    std::size_t previous;
    std::size_t next;  // the number of nodes at the end
  };
  // A merge that was possible when it was queued.
  struct Candidate {
    const Entry* entry;
    std::size_t position;  // of the left token
    std::int32_t left;
  };
  static bool is_later(const Candidate& a, const Candidate& b);
  void begin(std::string_view word);
  void merge(const Candidate& c);
  void push(std::size_t position);
  [[nodiscard]] bool is_current(const Candidate& c) const;

  const Bpe& bpe_;
  std::vector<Node> nodes_;
  std::vector<Candidate> queue_;  // a heap with the first at its top
};

}  // namespace lrnn::detail
