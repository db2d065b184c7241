#include "io/checkpoint.hpp"

#include <algorithm>
#include <system_error>

#include "io/json.hpp"
#include "io/names.hpp"

namespace lrnn::detail {
namespace {

namespace fs = std::filesystem;
using Source = Checkpoint::Source;
using Sources = Checkpoint::Sources;

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kPickle = "pytorch_model.bin";
constexpr const char* kAlias = "layer.kernel.";

std::vector<fs::path> files_of_index(const fs::path& directory) {
  const fs::path path = directory / kIndex;
  std::vector<fs::path> files;
  for (const std::string& name : names_of_index(path, read_text_file(path)))
    files.push_back(directory / name);
  return files;
}

void check_equal(const Source& a, const Source& b) {
  LRNN_CHECK(a.entry->shape == b.entry->shape &&
                 a.file->read_doubles(*a.entry) == b.file->read_doubles(*b.entry),
             IoError, a.where(), ": differs from '", b.entry->name,
             "', of which it is another name");
}

// Makes `second` the name `first`, after a comparison where both exist.
void rename(Sources& sources, const std::string& second, const std::string& first) {
  const auto it = sources.find(second);
  if (it == sources.end()) return;
  const auto [kept, is_new] = sources.emplace(first, it->second);
  if (!is_new) check_equal(it->second, kept->second);
  sources.erase(it);
}

std::vector<std::string> names_with(const Sources& sources, const std::string& prefix) {
  std::vector<std::string> names;
  for (auto it = sources.lower_bound(prefix); it != sources.end() && it->first.starts_with(prefix);
       ++it)
    names.push_back(it->first);
  return names;
}

// Values that a mixer made out of what it found, by parameter name.
using Imported = std::map<std::string, HostTensor, std::less<>>;

// Hands the tensors of a layer to its mixer if the layer has names that are no parameters.
void import_layer(const std::string& where, const Mixer& mixer, const std::string& prefix,
                  ParameterStore& parameters, Sources& sources, Imported& imported) {
  const auto names = names_with(sources, prefix);
  const bool known = std::all_of(names.begin(), names.end(), [&](const std::string& name) {
    return parameters.find(name) != nullptr;
  });
  // A mixer without a prefix (a mixer on its own) owns all names.
  if (known) return;
  HostTensors tensors;
  for (const std::string& name : names) {
    const Source& source = sources.at(name);
    tensors.emplace(name.substr(prefix.size()),
                    HostTensor{source.entry->shape, source.file->read_doubles(*source.entry)});
    sources.erase(name);
  }
  try {
    mixer.import_tensors(tensors);
  } catch (const InvalidArgument& error) {
    throw IoError(concat(where, ": '", prefix, "': ", error.what()));
  }
  for (auto& [name, tensor] : tensors) imported.emplace(prefix + name, std::move(tensor));
}

std::string listed(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 8;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i)
    text += (i > 0 ? ", " : "") + names[i];
  return names.size() > kShown ? text + ", ... (" + std::to_string(names.size()) + ")" : text;
}

void check_names(const std::string& where, ParameterStore& parameters, const Sources& sources,
                 const Imported& imported) {
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  for (const Parameter& p : parameters)
    if (!p.options.optional_on_load && !sources.contains(p.name) && !imported.contains(p.name))
      missing.push_back(p.name);
  for (const auto& [name, source] : sources)
    if (parameters.find(name) == nullptr) unexpected.push_back(name);
  for (const auto& [name, tensor] : imported)
    if (parameters.find(name) == nullptr) unexpected.push_back(name);
  LRNN_CHECK(missing.empty() && unexpected.empty(), IoError, where, ": ",
             missing.empty() ? "" : "missing tensors: " + listed(missing),
             missing.empty() || unexpected.empty() ? "" : "; ",
             unexpected.empty() ? "" : "unexpected tensors: " + listed(unexpected));
}

void check_shapes(const std::string& where, ParameterStore& parameters, const Sources& sources,
                  const Imported& imported) {
  for (const auto& [name, source] : sources) {
    const SafetensorsEntry& entry = *source.entry;
    LRNN_CHECK(entry.shape == parameters.at(name).shape, IoError, source.where(), ": expected ",
               parameters.at(name).shape, ", got ", entry.shape);
    LRNN_CHECK(entry.dtype != FileDType::I64 && entry.dtype != FileDType::I32, IoError,
               source.where(), ": expected a float dtype, got ", entry.dtype);
  }
  for (const auto& [name, tensor] : imported)
    LRNN_CHECK(tensor.shape == parameters.at(name).shape &&
                   static_cast<std::size_t>(tensor.shape.numel()) == tensor.values.size(),
               IoError, where, ": '", name, "': expected ", parameters.at(name).shape, ", got ",
               tensor.shape);
}

std::vector<SafetensorsFile> opened(const std::vector<fs::path>& paths) {
  std::vector<SafetensorsFile> files;
  for (const fs::path& path : paths) files.push_back(SafetensorsFile::open(path));
  return files;
}

}  // namespace

std::set<std::string> names_of_index(const fs::path& path, std::string_view text) {
  constexpr JsonLimits kLimits{.keys = std::size_t{1} << 20};
  const std::string where = path.string();
  const auto json = parse_json<IoError>(where, text, kLimits);
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  LRNN_CHECK(json.is_object() && map != json.end() && map->is_object(), IoError, where,
             ": expected an object with an object weight_map");
  std::set<std::string> names;
  for (const auto& [tensor, file] : map->items()) {
    LRNN_CHECK(file.is_string() && is_plain_name(file.get_ref<const std::string&>()), IoError,
               where, ": weight_map: '", tensor, "': expected a name in this folder, got ",
               shown(file));
    names.insert(file.get<std::string>());
  }
  return names;
}

Checkpoint::Checkpoint(std::vector<SafetensorsFile> files)
    : files_(std::move(files)), name_(files_.empty() ? "" : files_.front().path().string()) {
  for (const SafetensorsFile& file : files_) {
    for (const auto& [name, entry] : file.entries()) {
      const Source source{&file, &entry};
      LRNN_CHECK(sources_.emplace(name, source).second, IoError, source.where(),
                 ": occurs in two files");
    }
  }
}

Checkpoint::Checkpoint(const std::vector<fs::path>& files) : Checkpoint(opened(files)) {}

Checkpoint Checkpoint::of_directory(const fs::path& directory) {
  std::error_code ignored;
  const bool sharded =
      !fs::exists(directory / kWeights, ignored) && fs::exists(directory / kIndex, ignored);
  LRNN_CHECK(sharded || fs::exists(directory / kWeights, ignored) ||
                 !fs::exists(directory / kPickle, ignored),
             IoError, (directory / kWeights).string(), ": missing; ", kPickle,
             " beside it is a pickle, which tools/convert_pickle.py rewrites");
  Checkpoint out(sharded ? files_of_index(directory) : std::vector{directory / kWeights});
  out.name_ = directory.string();
  return out;
}

std::map<std::string, Shape, std::less<>> Checkpoint::shapes() const {
  std::map<std::string, Shape, std::less<>> shapes;
  for (const auto& [name, source] : sources_) shapes.emplace(name, source.entry->shape);
  return shapes;
}

void Checkpoint::load(Context& ctx, ParameterStore& parameters, DType dtype, const Mixers& mixers,
                      const std::vector<Rename>& renames) && {
  for (const auto& [second, first] : renames) rename(sources_, second, first);
  Imported imported;
  for (const auto& [prefix, mixer] : mixers) {
    const std::string alias = prefix + kAlias;
    for (const std::string& name : names_with(sources_, alias))
      rename(sources_, name, prefix + name.substr(alias.size()));
    import_layer(name_, *mixer, prefix, parameters, sources_, imported);
  }
  check_names(name_, parameters, sources_, imported);
  check_shapes(name_, parameters, sources_, imported);

  constexpr std::uint64_t kSeed = 0;
  parameters.materialize(ctx, dtype, kSeed, false);
  for (Parameter& p : parameters) {
    if (const auto source = sources_.find(p.name); source != sources_.end())
      read_tensor(ctx, *source->second.file, *source->second.entry, p.value);
    else if (const auto made = imported.find(p.name); made != imported.end())
      ctx.write_from_host(p.value, made->second.values);
    else
      ParameterStore::initialize(ctx, p, kSeed);
  }
}

}  // namespace lrnn::detail
