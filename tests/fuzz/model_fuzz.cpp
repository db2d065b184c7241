// Any bytes as the weights of a small model, one per mixer: refused with an IoError, or a model all
// of whose parameters have values of their shapes.

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "fuzz/fuzz.hpp"
#include "fuzz/safetensors_mutator.hpp"
#include "fuzz/tiny_models.hpp"

namespace lrnn::fuzz {
namespace {

void load(Context& ctx, const LRNNLMHeadConfig& config, std::vector<std::byte> bytes) {
  const auto model = LRNNLMHeadModel::from_safetensors(
      ctx, config, SafetensorsFile::parse(kName, std::move(bytes)));
  for (const Parameter& p : model.parameters())
    require(ctx.to_host_as_double(p.value).size() == static_cast<std::size_t>(p.shape.numel()),
            "every value of a parameter is there");
}

}  // namespace
}  // namespace lrnn::fuzz

// The first byte picks the model.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  static lrnn::Context ctx = lrnn::Context::cpu();
  static const std::vector<lrnn::LRNNLMHeadConfig> models = tiny_models();
  if (size == 0) return 0;
  const auto bytes = bytes_of(data + 1, size - 1);
  accepts<lrnn::IoError>(kName, [&] { load(ctx, models[data[0] % models.size()], bytes); });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  if (size < 2 || seed % 64 == 2) return LLVMFuzzerMutate(data, size, max_size);
  return 1 + lrnn::fuzz::mutate_safetensors(data + 1, size - 1, max_size - 1, seed);
}
