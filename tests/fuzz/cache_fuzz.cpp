// Any bytes as a saved inference cache: refused with an IoError that leaves the cache as it was, or
// loaded with positions that lie inside it.

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "fuzz/fuzz.hpp"
#include "fuzz/safetensors_mutator.hpp"
#include "fuzz/tiny_models.hpp"

namespace lrnn::fuzz {
namespace {

struct Caches {
  Context ctx = Context::cpu();
  LRNNLMHeadModel model{ctx, tiny({MixerType::LRU, MixerType::Attn})};
  InferenceCache cache = model.allocate_inference_cache(ctx, {.batch_size = 2, .max_seqlen = 3});

  std::vector<double> values() {
    std::vector<double> all;
    for (std::size_t i = 0; i < model.config().mixer_types.size(); ++i)
      cache.state(i).visit([&](std::string_view, MutableTensorView tensor) {
        const auto values = ctx.to_host_as_double(tensor);
        all.insert(all.end(), values.begin(), values.end());
      });
    return all;
  }
};

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

}  // namespace
}  // namespace lrnn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  static Caches caches;
  const auto values = caches.values();
  const auto positions = caches.cache.positions();
  const bool loaded = accepts<lrnn::IoError>(kName, [&] {
    caches.cache.load(caches.ctx, lrnn::SafetensorsFile::parse(kName, bytes_of(data, size)));
  });
  if (!loaded) {
    require(same(caches.values(), values) && caches.cache.positions() == positions,
            "a file that is refused leaves the cache as it was");
    return 0;
  }
  for (const std::int64_t p : caches.cache.positions())
    require(p >= 0 && p <= caches.cache.max_seqlen(), "positions lie inside the cache");
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  return lrnn::fuzz::mutate_safetensors(data, size, max_size, seed);
}
