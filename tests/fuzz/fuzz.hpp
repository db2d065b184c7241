/// What the fuzzers share. A fuzzer hands bytes to one reader, which may refuse them with a typed
/// error and nothing else; whatever it accepts must keep the promises that the fuzzer checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <span>
#include <string_view>
#include <vector>

#include "lrnn/core/error.hpp"

namespace lrnn::fuzz {

constexpr const char* kName = "hostile.file";

inline void require(bool condition, std::string_view what) {
  if (condition) return;
  std::cerr << "broken promise: " << what << '\n';
  std::abort();
}

/// Calls `read`, which must return or throw an E or an F whose message names `where`. Returns
/// whether it returned. Errors of another type end the program.
template <class E, class F = E, class Read>
bool accepts(std::string_view where, Read&& read) {
  const auto named = [&](const Error& error) {
    const std::string_view message = error.what();
    require(message.find(where) != std::string_view::npos, "errors name the file");
    require(message.size() > where.size() + 2, "errors give a reason");
    return false;
  };
  try {
    read();
    return true;
  } catch (const E& error) {
    return named(error);
  } catch (const F& error) {
    return named(error);
  }
}

inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}
inline std::vector<std::byte> bytes_of(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  return {bytes.begin(), bytes.end()};
}

}  // namespace lrnn::fuzz
