// Any text as a config.json: refused with a ConfigError, or a configuration that is written and
// read back as itself, and of which a model is made or refused, both without its memory.

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "fuzz/fuzz.hpp"

namespace lrnn::fuzz {
namespace {

constexpr std::string_view kEmptyFile{"\x02\0\0\0\0\0\0\0{}", 10};

// The names and shapes of all parameters are made before the file is found to have none of them.
void build(const LRNNLMHeadConfig& config) {
  static Context ctx = Context::cpu();
  constexpr std::int64_t kManyLayers = 8;  // more say nothing new, slowly
  if (config.n_layer > kManyLayers) return;
  const auto bytes = std::as_bytes(std::span(kEmptyFile));
  const bool built = accepts<IoError, InvalidArgument>("", [&] {
    (void)LRNNLMHeadModel::from_safetensors(
        ctx, config, SafetensorsFile::parse(kName, {bytes.begin(), bytes.end()}));
  });
  require(!built, "parameters must be in the file");
}

void check(std::string_view text, const ReadConfigOptions& options) {
  LRNNLMHeadConfig config{};
  if (!accepts<ConfigError>("", [&] { config = config_from_json(text, options); })) return;
  const std::string written = config_to_json(config);
  require(config_to_json(config_from_json(written)) == written, "what is written is read back");
  build(config);
}

}  // namespace
}  // namespace lrnn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  static const std::map<std::string, lrnn::Shape, std::less<>> shapes = {
      {"backbone.layers.0.mixer.A", {4, 2}},
      {"backbone.layers.0.mixer.B", {8, 3}},
      {"backbone.layers.0.mixer.E", {4, 2}},
      {"backbone.layers.1.mixer.A", {4}},
      {"backbone.layers.1.mixer.B", {}}};
  // The first byte decides how the text is read.
  if (size == 0) return 0;
  lrnn::ReadConfigOptions options;
  if ((data[0] & 1U) != 0) options.shapes = &shapes;
  if ((data[0] & 2U) != 0) options.constructor_arguments = true;
  check(text_of(data + 1, size - 1), options);
  return 0;
}
