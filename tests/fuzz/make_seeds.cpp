// Writes the files that the fuzzers start from into the folder that is named: small ones of every
// kind, as the library writes them.

#include <filesystem>
#include <fstream>
#include <iterator>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "fuzz/tiny_models.hpp"
#include "io/manifest.hpp"

namespace lrnn::fuzz {
namespace {

namespace fs = std::filesystem;

std::string prefixed(std::size_t first_byte, const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return static_cast<char>(first_byte) + std::string(std::istreambuf_iterator<char>(in), {});
}

// A model and its configuration, both behind the byte that their fuzzers read first.
void write_models(Context& ctx, const fs::path& out) {
  const fs::path folder = out / "scratch";
  const auto models = tiny_models();
  for (std::size_t i = 0; i < models.size(); ++i) {
    const LRNNLMHeadModel model(ctx, models[i], {.seed = i});
    for (const bool lrnnx_names : {false, true}) {
      model.save_pretrained(ctx, folder, {.lrnnx_names = lrnnx_names});
      const std::string name = std::to_string(i) + (lrnnx_names ? "_lrnnx" : "");
      write_text_file(out / "model" / name, prefixed(i, folder / "model.safetensors"));
    }
    write_text_file(out / "config" / std::to_string(i), prefixed(0, folder / "config.json"));
  }
  fs::remove_all(folder);
}

void write_cache(Context& ctx, const fs::path& out) {
  const LRNNLMHeadModel model(ctx, tiny({MixerType::LRU, MixerType::Attn}));
  const auto cache = model.allocate_inference_cache(ctx, {.batch_size = 2, .max_seqlen = 3});
  cache.save(ctx, out / "cache" / "empty");
}

void write_manifest(const fs::path& out) {
  const detail::Manifest manifest{.step = 3,
                                  .settings = {{"seed", "1"}},
                                  .files = {{"model.safetensors", 8, 1}, {"config.json", 3, 2}}};
  write_text_file(out / "manifest" / "whole", detail::manifest_to_json(manifest));
}

void write_safetensors_file(const fs::path& out) {
  write_safetensors(out / "safetensors" / "dtypes",
                    {safetensors_item<double>("a", {1, 2}, {1.0, -0.0}),
                     safetensors_item<float>("b", {}, {2.5F}),
                     safetensors_item<bfloat16>("c", {0, 3}, {}),
                     safetensors_item<std::int64_t>("d", {1}, {-1}),
                     safetensors_item<std::int32_t>("e", {1, 1, 1, 1, 1, 1}, {7}),
                     {"f", FileDType::F16, {1}, [] { return std::vector<std::byte>(2); }}},
                    {{"format", "pt"}});
}

}  // namespace
}  // namespace lrnn::fuzz

int main(int argc, char** argv) {
  using namespace lrnn::fuzz;
  if (argc != 2) return 2;
  const fs::path out = argv[1];
  for (const char* name : {"cache", "config", "manifest", "model", "safetensors"})
    fs::create_directories(out / name);
  lrnn::Context ctx = lrnn::Context::cpu();
  write_models(ctx, out);
  write_cache(ctx, out);
  write_manifest(out);
  write_safetensors_file(out);
}
