/// UTF-8 as the Unicode standard defines it: no surrogates, nothing longer than needed, nothing
/// above U+10FFFF.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lrnn::detail {

enum class Utf8Kind : std::uint8_t {
  Whole,    ///< a character
  Partial,  ///< all there is, and it may begin a character
  Bad,      ///< the longest beginning of a character that does not go on, or one byte of none
};
struct Utf8Part {
  Utf8Kind kind;
  std::size_t length;  ///< in bytes, at least 1
};
/// What `text`, which is not empty, begins with.
[[nodiscard]] Utf8Part utf8_part(std::string_view text) noexcept;

/// Offset of the first part that is not a whole character; npos if there is none.
[[nodiscard]] std::size_t find_invalid_utf8(std::string_view text) noexcept;

/// The code point of a whole character.
[[nodiscard]] char32_t utf8_code_point(std::string_view character) noexcept;
void append_utf8(std::string& out, char32_t code_point);

/// Appends `text` to `out` with U+FFFD for each bad part. A partial end is bad as well if `is_end`,
/// else it is left out. Returns the number of bytes of `text` that were used.
std::size_t append_repaired_utf8(std::string& out, std::string_view text, bool is_end);

}  // namespace lrnn::detail
