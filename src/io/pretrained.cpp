/// LRNNLMHeadModel to and from a folder.

#include <system_error>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "io/checkpoint.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = "config.json";
constexpr const char* kWeights = "model.safetensors";
constexpr const char* kHead = "lm_head.weight";
constexpr const char* kHuggingFaceEmbedding = "backbone.embeddings.weight";
constexpr const char* kEmbedding = "backbone.embedding.weight";
constexpr const char* kAlias = ".mixer.layer.kernel.";

template <class F>
auto with_path(const fs::path& path, F&& f) {
  try {
    return f();
  } catch (const ConfigError& error) {
    throw ConfigError(path.string() + ": " + error.what());
  }
}

// The names under which lrnnx's S4 and S4D kernels register their parameters a second time.
void add_lrnnx_names(Context& ctx, const LRNNLMHeadModel& model,
                     std::vector<SafetensorsItem>& items) {
  ParameterStore& parameters = model.parameters();
  const LRNNLMHeadConfig& config = model.config();
  if (config.tie_embeddings)
    items.push_back(safetensors_item(ctx, kHead, parameters.at(kEmbedding).value));
  for (std::size_t i = 0; i < config.mixer_types.size(); ++i) {
    const MixerType type = config.mixer_types[i];
    if (type != MixerType::S4 && type != MixerType::S4D) continue;
    const std::string layer = "backbone.layers." + std::to_string(i);
    for (const char* name : {"A_real", "A_imag", "B", "C", "P", "inv_dt"})
      if (const Parameter* const p = parameters.find(layer + ".mixer." + name))
        items.push_back(safetensors_item(ctx, layer + kAlias + name, p->value));
    if (type == MixerType::S4)
      items.push_back(
          safetensors_item<std::int64_t>(layer + kAlias + "l_kernel", {}, {std::int64_t{0}}));
  }
}

}  // namespace

void LRNNLMHeadModel::load(Context& ctx, detail::Checkpoint&& checkpoint) {
  detail::Checkpoint::Mixers mixers;
  for (std::size_t i = 0; i < blocks_.size(); ++i)
    mixers.emplace_back("backbone.layers." + std::to_string(i) + ".mixer.", &mixer(i));
  std::vector<detail::Checkpoint::Rename> renames{{kHuggingFaceEmbedding, kEmbedding}};
  if (config_.tie_embeddings) renames.push_back({kHead, kEmbedding});
  std::move(checkpoint).load(ctx, *parameters_, dtype(), mixers, renames);
}

LRNNLMHeadModel LRNNLMHeadModel::from_pretrained(Context& ctx, const fs::path& directory,
                                                 const PretrainedOptions& options) {
  const std::string text = read_text_file(directory / kConfig);
  auto checkpoint = detail::Checkpoint::of_directory(directory);
  const auto shapes = checkpoint.shapes();
  LRNNLMHeadModel model = with_path(directory / kConfig, [&] {
    LRNNLMHeadConfig config =
        config_from_json(text, {.mixer_kwargs = options.mixer_kwargs, .shapes = &shapes});
    // Before anything is made for each of them.
    LRNN_CHECK(static_cast<std::size_t>(config.n_layer) <= shapes.size(), ConfigError,
               "n_layer: expected at most ", shapes.size(), ", the tensors of the checkpoint, got ",
               config.n_layer);
    if (options.dtype) config.dtype = options.dtype;
    return LRNNLMHeadModel(ctx.device(), std::move(config));
  });
  model.load(ctx, std::move(checkpoint));
  return model;
}

LRNNLMHeadModel LRNNLMHeadModel::from_safetensors(Context& ctx, LRNNLMHeadConfig config,
                                                  const fs::path& file) {
  return from_safetensors(ctx, std::move(config), SafetensorsFile::open(file));
}

LRNNLMHeadModel LRNNLMHeadModel::from_safetensors(Context& ctx, LRNNLMHeadConfig config,
                                                  SafetensorsFile file) {
  LRNNLMHeadModel model(ctx.device(), std::move(config));
  std::vector<SafetensorsFile> files;
  files.push_back(std::move(file));
  model.load(ctx, detail::Checkpoint(std::move(files)));
  return model;
}

void LRNNLMHeadModel::save_pretrained(Context& ctx, const fs::path& directory,
                                      const SaveOptions& options) const {
  std::error_code error;
  fs::create_directories(directory, error);
  LRNN_CHECK(!error, IoError, directory.string(), ": cannot create: ", error.message());
  std::vector<SafetensorsItem> items;
  for (const Parameter& p : parameters()) items.push_back(safetensors_item(ctx, p.name, p.value));
  if (options.lrnnx_names) add_lrnnx_names(ctx, *this, items);
  // Both are written before either appears: the weights of one model and the configuration of
  // another would be no model.
  AtomicFile config(directory / kConfig);
  config.write(config_to_json(config_));
  write_safetensors(directory / kWeights, std::move(items), {{"format", "pt"}});
  config.commit();
}

}  // namespace lrnn
