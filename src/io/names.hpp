/// Names that come from files.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

namespace lrnn::detail {

/// Whether an error message can hold `name`: a zero would end it, a line end break its line.
[[nodiscard]] inline bool is_printable_name(std::string_view name) {
  constexpr std::size_t kMaxLength = 1024;
  return name.size() <= kMaxLength && std::none_of(name.begin(), name.end(), [](char c) {
           return (c >= 0 && c < ' ') || c == '\x7f';
         });
}

/// Whether `name` stays inside its folder. The system would cut a name at a zero.
[[nodiscard]] inline bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

}  // namespace lrnn::detail
