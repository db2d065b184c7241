#include "lrnn/train/checkpoint.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <unistd.h>

#include "lrnn/io/safetensors.hpp"

#include "io/manifest.hpp"
#include "io/temporary_directory.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPrefix = "step-";
constexpr const char* kTemporaryPrefix = ".tmp-step-";
constexpr const char* kModelFile = "model.safetensors";
constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr const char* kManifestFile = "manifest.json";

std::string name_of_step(std::int64_t step) {
  const std::string digits = std::to_string(step);
  return kPrefix + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
}

std::optional<std::int64_t> step_of_name(const std::string& name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string digits = name.substr(std::strlen(kPrefix));
  const bool number =
      !digits.empty() && digits.size() <= 18 &&
      std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!number) return std::nullopt;
  return std::stoll(digits);
}

struct Candidate {
  std::int64_t step;
  fs::path path;
};

// Newest first.
std::vector<Candidate> list_checkpoints(const fs::path& directory) {
  std::vector<Candidate> all;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error))
    if (const auto step = step_of_name(it->path().filename().string()))
      all.push_back({*step, it->path()});
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.step > b.step; });
  return all;
}

// What was being written when an earlier run was killed.
void remove_temporaries(const fs::path& directory) {
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(directory))
    if (entry.path().filename().string().starts_with(kTemporaryPrefix))
      stale.push_back(entry.path());
  for (const fs::path& path : stale) fs::remove_all(path);
}

template <class F>
void visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f.template operator()<float>();
    case DType::float64:
      return f.template operator()<double>();
    case DType::bfloat16:
      return f.template operator()<bfloat16>();
    case DType::int32:
      return f.template operator()<std::int32_t>();
    case DType::int64:
      return f.template operator()<std::int64_t>();
  }
  throw InternalError("visit_dtype: unknown dtype");
}

struct NamedTensor {
  std::string name;
  MutableTensorView tensor;
};

std::vector<NamedTensor> model_tensors(ParameterStore& parameters) {
  std::vector<NamedTensor> all;
  for (Parameter& p : parameters) all.push_back({p.name, p.value});
  return all;
}

std::vector<NamedTensor> optimizer_tensors(AdamW& optimizer) {
  std::vector<NamedTensor> all;
  for (auto& [name, tensor] : optimizer.state()) all.push_back({name, tensor});
  all.push_back({"counters", optimizer.counters()});
  return all;
}

std::vector<std::byte> bytes_of(Context& ctx, const TensorView& tensor) {
  std::vector<std::byte> bytes;
  visit_dtype(tensor.dtype(), [&]<class T>() {
    const std::vector<T> values = ctx.to_host<T>(tensor);
    const auto raw = std::as_bytes(std::span(values));
    bytes.assign(raw.begin(), raw.end());
  });
  return bytes;
}

void write_tensors(Context& ctx, const fs::path& path, const std::vector<NamedTensor>& tensors) {
  std::vector<SafetensorsItem> items;
  items.reserve(tensors.size());
  for (const NamedTensor& t : tensors)
    items.push_back({t.name, file_dtype(t.tensor.dtype()), t.tensor.shape(),
                     [&ctx, tensor = t.tensor] { return bytes_of(ctx, tensor); }});
  write_safetensors(path, std::move(items), {{"format", "pt"}});
}

void check_tensors(const SafetensorsFile& file, const std::vector<NamedTensor>& tensors) {
  for (const NamedTensor& t : tensors) {
    const SafetensorsEntry& entry = file.at(t.name);
    LRNN_CHECK(entry.shape == t.tensor.shape() && entry.dtype == file_dtype(t.tensor.dtype()),
               IoError, file.path().string(), ": ", t.name, ": expected ", t.tensor.dtype(), ' ',
               t.tensor.shape(), ", got ", entry.dtype, ' ', entry.shape);
  }
  LRNN_CHECK(file.entries().size() == tensors.size(), IoError, file.path().string(), ": expected ",
             tensors.size(), " tensors, got ", file.entries().size());
}

void read_tensors(Context& ctx, const SafetensorsFile& file,
                  const std::vector<NamedTensor>& tensors) {
  for (const NamedTensor& t : tensors) {
    const std::vector<std::byte> bytes = file.read_bytes(file.at(t.name));
    visit_dtype(t.tensor.dtype(), [&]<class T>() {
      std::vector<T> values(bytes.size() / sizeof(T));
      std::memcpy(values.data(), bytes.data(), bytes.size());
      const Tensor loaded = ctx.from_host<T>(t.tensor.shape(), std::span<const T>(values));
      ctx.copy(t.tensor, loaded);
    });
  }
}

FoundCheckpoint verify(const Candidate& candidate) {
  const fs::path manifest_path = candidate.path / kManifestFile;
  const detail::Manifest manifest =
      detail::manifest_from_json(manifest_path, read_text_file(manifest_path));
  LRNN_CHECK(manifest.step == candidate.step, IoError, manifest_path.string(), ": step: expected ",
             candidate.step, ", got ", manifest.step);
  for (const detail::ManifestFile& want : manifest.files) {
    const detail::ManifestFile got = detail::describe_file(candidate.path, want.name);
    LRNN_CHECK(got.bytes == want.bytes, IoError, (candidate.path / want.name).string(),
               ": expected ", want.bytes, " bytes, got ", got.bytes);
    LRNN_CHECK(got.crc32 == want.crc32, IoError, (candidate.path / want.name).string(),
               ": damaged: the checksum does not match");
  }
  return {candidate.path, manifest.step, manifest.settings};
}

void write_content(Context& ctx, const fs::path& path, const SaveCheckpoint& args,
                   ParameterStore& parameters, AdamW& optimizer) {
  write_tensors(ctx, path / kModelFile, model_tensors(parameters));
  write_tensors(ctx, path / kOptimizerFile, optimizer_tensors(optimizer));
  detail::Manifest manifest{args.step, args.settings, {}};
  for (const char* name : {kModelFile, kOptimizerFile})
    manifest.files.push_back(detail::describe_file(path, name));
  for (const auto& [name, text] : args.files) {
    write_text_file(path / name, text);
    manifest.files.push_back(detail::describe_file(path, name));
  }
  write_text_file(path / kManifestFile, detail::manifest_to_json(manifest));
  sync_directory(path);
}

}  // namespace

fs::path save_checkpoint(Context& ctx, const SaveCheckpoint& args, ParameterStore& parameters,
                         AdamW& optimizer) {
  try {
    fs::create_directories(args.directory);
    remove_temporaries(args.directory);
    const std::string name = name_of_step(args.step);
    fs::path final_path = args.directory / name;
    const std::string suffix = std::to_string(args.step) + "-" + std::to_string(::getpid());
    const detail::TemporaryDirectory temporary(args.directory / (kTemporaryPrefix + suffix));
    write_content(ctx, temporary.path(), args, parameters, optimizer);
    // A checkpoint of this step that a search rejected makes room.
    const detail::TemporaryDirectory replaced(args.directory /
                                              (kTemporaryPrefix + suffix + "-replaced"));
    if (fs::exists(final_path)) fs::rename(final_path, replaced.path());
    fs::rename(temporary.path(), final_path);
    sync_directory(args.directory);
    write_text_file(args.directory / "latest", name + "\n");
    const auto all = list_checkpoints(args.directory);
    for (std::size_t i = 0; args.keep > 0 && i < all.size(); ++i)
      if (static_cast<std::int64_t>(i) >= args.keep && all[i].step < args.step)
        fs::remove_all(all[i].path);
    return final_path;
  } catch (const fs::filesystem_error& e) {
    throw IoError(e.what());
  }
}

CheckpointSearch find_checkpoint(const fs::path& directory) {
  CheckpointSearch search;
  for (const Candidate& candidate : list_checkpoints(directory)) {
    try {
      search.found = verify(candidate);
      return search;
    } catch (const IoError& e) {
      search.rejected.emplace_back(e.what());
    }
  }
  return search;
}

void load_checkpoint(Context& ctx, const fs::path& path, ParameterStore& parameters,
                     AdamW& optimizer) {
  const SafetensorsFile model = SafetensorsFile::open(path / kModelFile);
  const SafetensorsFile state = SafetensorsFile::open(path / kOptimizerFile);
  const auto values = model_tensors(parameters);
  const auto states = optimizer_tensors(optimizer);
  check_tensors(model, values);
  check_tensors(state, states);
  read_tensors(ctx, model, values);
  read_tensors(ctx, state, states);
}

}  // namespace lrnn
