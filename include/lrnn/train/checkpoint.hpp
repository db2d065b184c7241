/// Checkpoints of a training run, from which it continues with the same bytes.
///
///   DIRECTORY/step-00000020/model.safetensors      values of all parameters
///                           optimizer.safetensors  masters, both moments, step counters
///                           ...                    text files of the caller, e.g. config.json
///                           manifest.json          step, settings, size and checksum of each file
///   DIRECTORY/latest                               name of the newest checkpoint
///
/// A checkpoint is written under a temporary name, synchronised with the disk, its manifest last,
/// and renamed. A run that is killed at any moment leaves the checkpoints before it intact. With
/// config.json among the files, a checkpoint is a model that from_pretrained() reads.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "lrnn/train/adamw.hpp"

namespace lrnn {

struct SaveCheckpoint {
  std::filesystem::path directory;  ///< of the run; created where it does not exist
  std::int64_t step;                ///< optimizer steps taken
  std::map<std::string, std::string> settings = {};  ///< of the caller, returned by the search
  std::map<std::string, std::string> files = {};     ///< further text files by name
  std::int64_t keep = 0;  ///< older checkpoints beyond this number are deleted; 0: none
};

/// Returns the directory of the checkpoint. One run at a time writes to a directory.
/// @throws IoError
std::filesystem::path save_checkpoint(Context& ctx, const SaveCheckpoint& args,
                                      ParameterStore& parameters, AdamW& optimizer);

struct FoundCheckpoint {
  std::filesystem::path path;
  std::int64_t step = 0;
  std::map<std::string, std::string> settings;
};
struct CheckpointSearch {
  std::optional<FoundCheckpoint> found;
  std::vector<std::string> rejected;  ///< why newer ones were passed over
};
/// The newest checkpoint of a run whose manifest and files are as they were written. Temporary
/// directories are passed over; a missing directory holds no checkpoint.
[[nodiscard]] CheckpointSearch find_checkpoint(const std::filesystem::path& directory);

/// Reads values and optimizer state of one checkpoint. Nothing is changed unless all tensors are
/// there with their shapes and dtypes.
/// @throws IoError naming file and tensor
void load_checkpoint(Context& ctx, const std::filesystem::path& path, ParameterStore& parameters,
                     AdamW& optimizer);

}  // namespace lrnn
