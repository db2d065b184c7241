/// What a model remembers of a batch of sequences between calls.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "lrnn/mixers/mixer.hpp"

namespace lrnn {

class SafetensorsFile;

/// The state of every layer for one batch of sequences, and how many tokens each sequence has seen.
/// Made by LRNNLMHeadModel::allocate_inference_cache; the model must outlive it. After a change of
/// parameters step() is right again behind a forward pass, or with a new cache: see
/// Mixer::make_state.
class InferenceCache {
 public:
  using States = std::vector<std::unique_ptr<MixerState>>;
  using MakeStates = std::function<States(Context&)>;

  InferenceCache(Context& ctx, std::int64_t batch_size, std::int64_t max_seqlen,
                 MakeStates make_states);

  /// Back to the start of the sequences. Enqueued, recordable.
  void reset(Context& ctx);
  /// Copies are explicit. Used to branch a generation and to keep a prompt.
  [[nodiscard]] InferenceCache clone(Context& ctx) const;
  /// Copies the content of a cache of the same model and size. @throws InvalidArgument
  void copy_from(Context& ctx, const InferenceCache& other);
  /// Makes sequence `to` of this cache a copy of sequence `from` of `other`, a cache of the same
  /// model and max_seqlen with any batch size: one prefix may serve many continuations.
  /// @throws InvalidArgument
  void copy_sequence(Context& ctx, std::int64_t to, const InferenceCache& other, std::int64_t from);

  /// Writes the states to a safetensors file. @throws IoError
  void save(Context& ctx, const std::filesystem::path& path) const;
  /// Reads them back into a cache of the same model and size. A file that is refused leaves the
  /// cache as it was.
  /// @throws IoError naming file, tensor, what was expected and what came
  void load(Context& ctx, const std::filesystem::path& path);
  /// The same for a file that is open or in memory.
  void load(Context& ctx, const SafetensorsFile& file);

  [[nodiscard]] std::int64_t batch_size() const noexcept {
    return static_cast<std::int64_t>(positions_.size());
  }
  [[nodiscard]] std::int64_t max_seqlen() const noexcept { return max_seqlen_; }
  /// Tokens seen by each sequence.
  [[nodiscard]] const std::vector<std::int64_t>& positions() const noexcept { return positions_; }
  [[nodiscard]] MixerState& state(std::size_t layer) const { return *states_.at(layer); }

  /// @throws InvalidArgument naming `op` if any sequence would exceed max_seqlen
  void check_room(const char* op, std::int64_t tokens) const;
  /// Counts tokens that were processed. To be called for every replay of a recorded step.
  void advance(std::int64_t tokens);
  void advance(const std::vector<std::int64_t>& tokens);

 private:
  using Visitor = std::function<void(const std::string& name, MutableTensorView tensor)>;
  void visit(const Visitor& visitor) const;

  std::int64_t max_seqlen_;
  MakeStates make_states_;
  States states_;
  std::vector<std::int64_t> positions_;
};

}  // namespace lrnn
