/// Mutations of safetensors files that keep the header's length right: a wrong one is refused
/// before anything else is looked at.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace lrnn::fuzz {

/// Mutates the header, the data or (one time in eight each) anything of the file in `data`.
/// Returns the new size, at most `max_size`.
inline std::size_t mutate_safetensors(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                      unsigned seed) {
  std::uint64_t length = 0;
  if (size >= sizeof(length)) std::memcpy(&length, data, sizeof(length));
  const bool has_parts = size >= sizeof(length) && length <= size - sizeof(length);
  if (!has_parts || seed % 8 == 0 || size > max_size)
    return LLVMFuzzerMutate(data, std::min(size, max_size), max_size);
  std::uint8_t* const begin = data + sizeof(length);
  std::vector<std::uint8_t> header(begin, begin + length);
  std::vector<std::uint8_t> rest(begin + length, data + size);
  std::vector<std::uint8_t>& part = seed % 8 == 1 ? rest : header;
  const std::size_t old_size = part.size();
  part.resize(old_size + max_size - size);
  part.resize(LLVMFuzzerMutate(part.data(), old_size, part.size()));
  length = header.size();
  std::memcpy(data, &length, sizeof(length));
  std::copy(header.begin(), header.end(), begin);
  std::copy(rest.begin(), rest.end(), begin + length);
  return sizeof(length) + header.size() + rest.size();
}

}  // namespace lrnn::fuzz
