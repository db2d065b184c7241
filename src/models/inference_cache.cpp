#include "lrnn/models/inference_cache.hpp"

#include <algorithm>

#include "lrnn/io/safetensors.hpp"

namespace lrnn {
namespace {

constexpr const char* kPositions = "positions";

}  // namespace

InferenceCache::InferenceCache(Context& ctx, std::int64_t batch_size, std::int64_t max_seqlen,
                               MakeStates make_states)
    : max_seqlen_(max_seqlen),
      make_states_(std::move(make_states)),
      states_(make_states_(ctx)),
      positions_(static_cast<std::size_t>(batch_size), 0) {}

void InferenceCache::visit(const Visitor& visitor) const {
  for (std::size_t i = 0; i < states_.size(); ++i)
    states_[i]->visit([&](std::string_view name, MutableTensorView tensor) {
      visitor("layers." + std::to_string(i) + "." + std::string(name), tensor);
    });
}

void InferenceCache::reset(Context& ctx) {
  visit([&](const std::string&, MutableTensorView tensor) { ctx.zero(tensor); });
  std::fill(positions_.begin(), positions_.end(), 0);
}

InferenceCache InferenceCache::clone(Context& ctx) const {
  InferenceCache copy(ctx, batch_size(), max_seqlen_, make_states_);
  copy.copy_from(ctx, *this);
  return copy;
}

void InferenceCache::copy_from(Context& ctx, const InferenceCache& other) {
  LRNN_CHECK(other.batch_size() == batch_size() && other.max_seqlen_ == max_seqlen_ &&
                 other.states_.size() == states_.size(),
             InvalidArgument, "InferenceCache::copy_from: expected a cache of ", states_.size(),
             " layers, batch ", batch_size(), ", max_seqlen ", max_seqlen_, ", got ",
             other.states_.size(), ", ", other.batch_size(), ", ", other.max_seqlen_);
  std::vector<TensorView> sources;
  other.visit([&](const std::string&, MutableTensorView tensor) { sources.push_back(tensor); });
  auto source = sources.begin();
  visit([&](const std::string& name, MutableTensorView tensor) {
    LRNN_CHECK(source != sources.end() && source->shape() == tensor.shape(), InvalidArgument,
               "InferenceCache::copy_from: ", name, " differs between the caches");
    ctx.copy(tensor, *source++);
  });
  positions_ = other.positions_;
}

void InferenceCache::copy_sequence(Context& ctx, std::int64_t to, const InferenceCache& other,
                                   std::int64_t from) {
  constexpr const char* op = "InferenceCache::copy_sequence";
  LRNN_CHECK(to >= 0 && to < batch_size(), InvalidArgument, op, ": to: expected 0..",
             batch_size() - 1, ", got ", to);
  LRNN_CHECK(from >= 0 && from < other.batch_size(), InvalidArgument, op, ": from: expected 0..",
             other.batch_size() - 1, ", got ", from);
  LRNN_CHECK(other.max_seqlen_ == max_seqlen_ && other.states_.size() == states_.size(),
             InvalidArgument, op, ": expected a cache of ", states_.size(), " layers, max_seqlen ",
             max_seqlen_, ", got ", other.states_.size(), ", ", other.max_seqlen_);
  std::vector<TensorView> sources;
  other.visit([&](const std::string&, MutableTensorView tensor) {
    sources.push_back(tensor.slice(0, from, 1));
  });
  std::vector<MutableTensorView> targets;
  visit([&](const std::string& name, MutableTensorView tensor) {
    targets.push_back(tensor.slice(0, to, 1));
    LRNN_CHECK(targets.size() <= sources.size() &&
                   sources[targets.size() - 1].shape() == targets.back().shape(),
               InvalidArgument, op, ": ", name, " differs between the caches");
  });
  for (std::size_t i = 0; i < targets.size(); ++i) ctx.copy(targets[i], sources[i]);
  positions_[static_cast<std::size_t>(to)] = other.positions_[static_cast<std::size_t>(from)];
}

void InferenceCache::save(Context& ctx, const std::filesystem::path& path) const {
  std::vector<SafetensorsItem> items{safetensors_item(kPositions, {batch_size()}, positions_)};
  visit([&](const std::string& name, MutableTensorView tensor) {
    items.push_back(safetensors_item(ctx, name, tensor));
  });
  write_safetensors(path, std::move(items),
                    {{"max_seqlen", std::to_string(max_seqlen_)}, {"format", "lrnn_cache"}});
}

void InferenceCache::load(Context& ctx, const std::filesystem::path& path) {
  load(ctx, SafetensorsFile::open(path));
}

void InferenceCache::load(Context& ctx, const SafetensorsFile& file) {
  const std::filesystem::path& path = file.path();
  std::vector<std::pair<const SafetensorsEntry*, MutableTensorView>> tensors;
  const auto checked = [&](const std::string& name, const Shape& shape) -> const SafetensorsEntry& {
    const SafetensorsEntry& entry = file.at(name);
    LRNN_CHECK(entry.shape == shape, IoError, path.string(), ": '", name, "': expected ", shape,
               ", got ", entry.shape);
    return entry;
  };
  const auto positions = file.read_integers(checked(kPositions, {batch_size()}));
  for (const std::int64_t p : positions)
    LRNN_CHECK(p >= 0 && p <= max_seqlen_, IoError, path.string(), ": '", kPositions,
               "': expected 0..", max_seqlen_, ", got ", p);
  visit([&](const std::string& name, MutableTensorView tensor) {
    const SafetensorsEntry& entry = checked(name, tensor.shape());
    LRNN_CHECK(tensor.dtype() == DType::int32 ||
                   (entry.dtype != FileDType::I32 && entry.dtype != FileDType::I64),
               IoError, path.string(), ": '", name, "': expected a float dtype, got ", entry.dtype);
    // Integers of a state are positions, which index memory.
    LRNN_CHECK(tensor.dtype() != DType::int32 || file.read_integers(entry) == positions, IoError,
               path.string(), ": '", name, "' differs from '", kPositions, "'");
    tensors.emplace_back(&entry, tensor);
  });
  LRNN_CHECK(tensors.size() + 1 == file.entries().size(), IoError, path.string(), ": ",
             file.entries().size(), " tensors, expected ", tensors.size() + 1);
  for (const auto& [entry, tensor] : tensors) read_tensor(ctx, file, *entry, tensor);
  positions_ = positions;
}

void InferenceCache::check_room(const char* op, std::int64_t tokens) const {
  for (std::size_t b = 0; b < positions_.size(); ++b)
    LRNN_CHECK(positions_[b] + tokens <= max_seqlen_, InvalidArgument, op, ": sequence ", b,
               " would reach ", positions_[b] + tokens,
               " tokens, but the cache holds max_seqlen = ", max_seqlen_);
}

void InferenceCache::advance(std::int64_t tokens) {
  for (std::int64_t& p : positions_) p += tokens;
}
void InferenceCache::advance(const std::vector<std::int64_t>& tokens) {
  for (std::size_t b = 0; b < positions_.size(); ++b) positions_[b] += tokens.at(b);
}

}  // namespace lrnn
