/// The tensors of a checkpoint and how they become parameters.
#pragma once

#include <set>
#include <utility>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/mixers/mixer.hpp"

namespace lrnn::detail {

/// The files that the text of model.safetensors.index.json names.
/// @throws IoError naming `path` and what is wrong with the text
[[nodiscard]] std::set<std::string> names_of_index(const std::filesystem::path& path,
                                                   std::string_view text);

class Checkpoint {
 public:
  struct Source {
    const SafetensorsFile* file;
    const SafetensorsEntry* entry;

    [[nodiscard]] std::string where() const {
      return file->path().string() + ": '" + entry->name + "'";
    }
  };
  using Sources = std::map<std::string, Source, std::less<>>;

  /// @throws IoError if a name occurs in two files
  explicit Checkpoint(std::vector<SafetensorsFile> files);
  explicit Checkpoint(const std::vector<std::filesystem::path>& files);
  /// model.safetensors of a folder, or the files that its index names.
  static Checkpoint of_directory(const std::filesystem::path& directory);

  [[nodiscard]] std::map<std::string, Shape, std::less<>> shapes() const;

  /// A mixer and the prefix of its names.
  using Mixers = std::vector<std::pair<std::string, const Mixer*>>;
  /// A name in the file that stands for another.
  struct Rename {
    std::string second;
    std::string first;
  };
  /// Allocates and fills every parameter. Where both names of a tensor occur (lrnnx's
  /// `layer.kernel.*` of `mixers`, and `renames`, in order), their values must be equal.
  /// @throws IoError naming tensors that are missing, unexpected or of another shape
  void load(Context& ctx, ParameterStore& parameters, DType dtype, const Mixers& mixers,
            const std::vector<Rename>& renames = {}) &&;

 private:
  std::vector<SafetensorsFile> files_;
  Sources sources_;   // into files_
  std::string name_;  // of the folder or file, for messages
};

}  // namespace lrnn::detail
