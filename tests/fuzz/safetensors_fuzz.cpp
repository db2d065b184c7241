// Any bytes as a safetensors file: refused with an IoError, or a file whose tensors tile its data,
// can all be read, and come back from a file that is written with them.

#include "lrnn/io/safetensors.hpp"

#include "fuzz/fuzz.hpp"
#include "fuzz/safetensors_mutator.hpp"

namespace lrnn::fuzz {
namespace {

void check_values(const SafetensorsFile& file, const SafetensorsEntry& entry) {
  const auto numel = static_cast<std::uint64_t>(entry.shape.numel());
  require(numel * size_of(entry.dtype) == entry.nbytes, "shape and bytes agree");
  require(file.read_bytes(entry).size() == entry.nbytes, "all bytes are read");
  const auto values = file.read_doubles(entry);
  require(values.size() == numel, "all values are read");
  const bool integral = accepts<IoError>(kName, [&] {
    const auto integers = file.read_integers(entry);
    for (std::size_t i = 0; i < integers.size(); ++i)
      require(static_cast<double>(integers[i]) == values[i], "integers and doubles agree");
  });
  require(integral == (entry.dtype == FileDType::I32 || entry.dtype == FileDType::I64),
          "integers have dtypes of their own");
}

void check_entries(const SafetensorsFile& file, std::size_t size) {
  std::uint64_t bytes = 0;
  for (const auto& [name, entry] : file.entries()) {
    require(entry.name == name && file.find(name) == &entry, "entries are found by their names");
    require(entry.offset <= size && entry.nbytes <= size - entry.offset, "entries lie in the file");
    check_values(file, entry);
    bytes += entry.nbytes;
  }
  require(bytes + 8 <= size, "no two tensors share bytes");
}

}  // namespace
}  // namespace lrnn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace lrnn::fuzz;
  accepts<lrnn::IoError>(kName, [&] {
    check_entries(lrnn::SafetensorsFile::parse(kName, bytes_of(data, size)), size);
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  return lrnn::fuzz::mutate_safetensors(data, size, max_size, seed);
}
