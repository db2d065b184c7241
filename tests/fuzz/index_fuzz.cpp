// Any text as a model.safetensors.index.json: refused with an IoError, or names that stay in the
// folder.

#include <filesystem>

#include "fuzz/fuzz.hpp"
#include "io/checkpoint.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  accepts<lrnn::IoError>(kName, [&] {
    for (const std::string& name : lrnn::detail::names_of_index(kName, text_of(data, size))) {
      const std::filesystem::path path = std::filesystem::path("folder") / name;
      require(path.lexically_normal().parent_path() == "folder" && path.filename() == name &&
                  std::filesystem::path(path.c_str()) == path,
              "files are those of the folder");
    }
  });
  return 0;
}
