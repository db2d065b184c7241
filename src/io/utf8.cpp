#include "io/utf8.hpp"

#include <cstring>

namespace lrnn::detail {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Lead {
  std::size_t length;     // of the character; 0: no character begins so
  unsigned char low = 0;  // bounds of the second byte
  unsigned char high = 0;
};

// Table 3-7 of the Unicode standard.
Lead lead_of(unsigned char byte) noexcept {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

std::size_t ascii_prefix(std::string_view text) noexcept {
  std::size_t n = 0;
  for (std::uint64_t word = 0; n + sizeof word <= text.size(); n += sizeof word) {
    std::memcpy(&word, text.data() + n, sizeof word);
    if ((word & 0x8080808080808080U) != 0) break;
  }
  while (n < text.size() && static_cast<unsigned char>(text[n]) < 0x80) ++n;
  return n;
}

}  // namespace

Utf8Part utf8_part(std::string_view text) noexcept {
  const Lead lead = lead_of(static_cast<unsigned char>(text[0]));
  if (lead.length == 0) return {Utf8Kind::Bad, 1};
  for (std::size_t i = 1; i < lead.length; ++i) {
    if (i == text.size()) return {Utf8Kind::Partial, i};
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool goes_on =
        i == 1 ? byte >= lead.low && byte <= lead.high : byte >= 0x80 && byte <= 0xBF;
    if (!goes_on) return {Utf8Kind::Bad, i};
  }
  return {Utf8Kind::Whole, lead.length};
}

std::size_t find_invalid_utf8(std::string_view text) noexcept {
  std::size_t at = 0;
  while (true) {
    at += ascii_prefix(text.substr(at));
    if (at == text.size()) return std::string_view::npos;
    const Utf8Part part = utf8_part(text.substr(at));
    if (part.kind != Utf8Kind::Whole) return at;
    at += part.length;
  }
}

char32_t utf8_code_point(std::string_view character) noexcept {
  const auto lead = static_cast<unsigned char>(character[0]);
  if (character.size() == 1) return lead;
  char32_t code_point = lead & (0xFFU >> (character.size() + 1));
  for (const char c : character.substr(1))
    code_point = (code_point << 6U) | (static_cast<unsigned char>(c) & 0x3FU);
  return code_point;
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto add = [&](char32_t byte) {
    out += static_cast<char>(static_cast<unsigned char>(byte));
  };
  if (code_point < 0x80) {
    add(code_point);
    return;
  }
  const unsigned following = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  add((0xFF00U >> (following + 1) & 0xFFU) | code_point >> (6 * following));
  for (unsigned i = following; i-- > 0;) add(0x80U | (code_point >> (6 * i) & 0x3FU));
}

std::size_t append_repaired_utf8(std::string& out, std::string_view text, bool is_end) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Utf8Part part = utf8_part(text.substr(at));
    if (part.kind == Utf8Kind::Partial && !is_end) break;
    out += part.kind == Utf8Kind::Whole ? text.substr(at, part.length) : kReplacement;
    at += part.length;
  }
  return at;
}

}  // namespace lrnn::detail
