#include "io/unicode_text.hpp"

#include <algorithm>
#include <array>
#include <utf8proc.h>
#include <vector>

#include "lrnn/core/error.hpp"

#include "io/utf8.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace lrnn::detail {
namespace {

// --- normalisation form C ----------------------------------------------------------------------

struct Range {
  char32_t first;
  char32_t last;
};
// What Unicode 10 to 17 added of combining marks and of the parts of composed characters. Printed
// by tests/fixtures/tokenizer/unicode_tables.py.
constexpr std::array kLaterThanUnicode9 = std::to_array<Range>({
    {0x5C8, 0x5C9},     {0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},
    {0x9FE, 0x9FE},     {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},
    {0x1715, 0x1715},   {0x1ABF, 0x1AF0},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},
    {0x105D2, 0x105D2}, {0x105DA, 0x105DA}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D},
    {0x10EAB, 0x10EAC}, {0x10ECB, 0x10ECF}, {0x10EF0, 0x10EFB}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11382, 0x11382}, {0x11384, 0x11384}, {0x1138B, 0x1138B}, {0x11390, 0x11390},
    {0x113B8, 0x113B8}, {0x113BB, 0x113BB}, {0x113C2, 0x113C2}, {0x113C9, 0x113C9},
    {0x113CE, 0x113D0}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930},
    {0x11935, 0x11935}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0},
    {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42},
    {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x1611E, 0x16122},
    {0x16129, 0x16129}, {0x1612F, 0x1612F}, {0x16D63, 0x16D63}, {0x16D67, 0x16D67},
    {0x16D69, 0x16D69}, {0x16FF0, 0x16FF1}, {0x1D127, 0x1D128}, {0x1D250, 0x1D252},
    {0x1D25F, 0x1D25F}, {0x1D280, 0x1D281}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136},
    {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF},
    {0x1E6E3, 0x1E6E3}, {0x1E6E6, 0x1E6E6}, {0x1E6EE, 0x1E6EF}, {0x1E6F5, 0x1E6F5},
});

// Every later character is of class 0 in Unicode 9 and composes with nothing.
bool is_later(char32_t c) {
  const auto* const it =
      std::lower_bound(kLaterThanUnicode9.begin(), kLaterThanUnicode9.end(), c,
                       [](const Range& range, char32_t value) { return range.last < value; });
  return it != kLaterThanUnicode9.end() && it->first <= c;
}

/// Code points between two of which nothing is reordered or composed.
class Segment {
 public:
  void push(char32_t c) {
    std::array<utf8proc_int32_t, 8> parts{};  // the longest decomposition has 4
    int last_boundclass = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts.data(),
                                           static_cast<utf8proc_ssize_t>(parts.size()), kDecompose,
                                           &last_boundclass);
    LRNN_CHECK(n > 0 && n <= static_cast<utf8proc_ssize_t>(parts.size()), InternalError,
               "utf8proc cannot decompose U+", std::hex, static_cast<std::uint32_t>(c));
    points_.insert(points_.end(), parts.begin(), parts.begin() + n);
  }
  [[nodiscard]] std::size_t size() const noexcept { return points_.size(); }

  /// Appends the composed segment to `out` and starts a new one.
  void flush(std::string& out) {
    reorder();
    const auto n = utf8proc_normalize_utf32(
        points_.data(), static_cast<utf8proc_ssize_t>(points_.size()), kCompose);
    LRNN_CHECK(n >= 0, InternalError, "utf8proc: ", utf8proc_errmsg(n));
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
      append_utf8(out, static_cast<char32_t>(points_[i]));
    points_.clear();
  }

 private:
  static constexpr auto kDecompose =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  static constexpr auto kCompose =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  static auto combining_class(utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  }
  // utf8proc's own reordering takes quadratic time for a long run of marks.
  void reorder() {
    const auto is_starter = [](utf8proc_int32_t c) { return combining_class(c) == 0; };
    for (auto it = points_.begin(); it != points_.end();) {
      const auto first = std::find_if_not(it, points_.end(), is_starter);
      it = std::find_if(first, points_.end(), is_starter);
      std::ranges::stable_sort(first, it, {}, combining_class);
    }
  }

  std::vector<utf8proc_int32_t> points_;
};

// --- words -------------------------------------------------------------------------------------

// \p{L}, \p{N} and \s of Unicode 16. PCRE2 may have an older Unicode, down to 14: the ranges are
// what 15 and 16 added, printed by tests/fixtures/tokenizer/unicode_tables.py. (With a newer one,
// letters of Unicode 17 and later are letters, which are none to `tokenizers`.) Its own \s holds
// U+180E, which is not white space since Unicode 6.3.
constexpr std::string_view kLetter =
    R"(\p{L})"
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3})"
    R"(\x{10d4a}-\x{10d65}\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240})"
    R"(\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}\x{113b7}\x{113d1})"
    R"(\x{113d3}\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10}\x{11f12}-\x{11f33})"
    R"(\x{1342f}\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d})"
    R"(\x{16d40}-\x{16d6c}\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a})"
    R"(\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739})"
    R"(\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNumber =
    R"(\p{N})"
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59})"
    R"(\x{16130}-\x{16139}\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3})"
    R"(\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";
constexpr std::string_view kSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029})"
    R"(\x{202f}\x{205f}\x{3000})";

std::string word_pattern() {
  const std::string letter(kLetter);
  const std::string number(kNumber);
  const std::string space(kSpace);
  return "'(?:[stmd]|re|ve|ll)| ?[" + letter + "]+| ?[" + number + "]+| ?[^" + space + letter +
         number + "]+|[" + space + "]+(?![^" + space + "])|[" + space + "]+";
}

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

bool has_unicode_text() noexcept {
  return true;
}

std::string nfc(std::string_view text) {
  // Everything below U+0300, whose UTF-8 begins with 0xCC, is in the form, and none of it composes
  // with what precedes it.
  constexpr unsigned char kFirstLead = 0xCC;
  constexpr std::size_t kSegment = 4096;  // bounds the memory, not the result
  if (std::ranges::none_of(text,
                           [](char c) { return static_cast<unsigned char>(c) >= kFirstLead; }))
    return std::string(text);
  std::string out;
  out.reserve(text.size());
  Segment segment;
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view character = text.substr(at, utf8_part(text.substr(at)).length);
    const char32_t c = utf8_code_point(character);
    const bool later = is_later(c);
    if (later || (c < 0x300 && segment.size() >= kSegment)) segment.flush(out);
    if (later)
      out += character;
    else
      segment.push(c);
    at += character.size();
  }
  segment.flush(out);
  return out;
}

struct WordSplitter::Pattern {
  struct FreeCode {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  };
  struct FreeMatch {
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  };
  std::unique_ptr<pcre2_code, FreeCode> code;
};

WordSplitter::WordSplitter() {
  const std::string pattern = word_pattern();
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto made = std::make_shared<Pattern>();
  made->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, nullptr));
  LRNN_CHECK(made->code != nullptr, InternalError, "PCRE2 refuses the pattern of words at ", offset,
             ": ", pcre2_message(error));
  // Where there is no compiler for this machine, patterns are interpreted.
  static_cast<void>(pcre2_jit_compile(made->code.get(), PCRE2_JIT_COMPLETE));
  pattern_ = std::move(made);
}

void WordSplitter::split(std::string_view text,
                         const std::function<void(std::string_view)>& on_word) const {
  const pcre2_code* const code = pattern_->code.get();
  const std::unique_ptr<pcre2_match_data, Pattern::FreeMatch> match(
      pcre2_match_data_create_from_pattern(code, nullptr));
  LRNN_CHECK(match != nullptr, OutOfMemory, "PCRE2: no memory for a match");
  const auto* const subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  for (std::size_t at = 0; at < text.size();) {
    const int n =
        pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    LRNN_CHECK(n > 0, InternalError, "PCRE2 at byte ", at, ": ", pcre2_message(n));
    const std::size_t end = pcre2_get_ovector_pointer(match.get())[1];
    on_word(text.substr(at, end - at));
    at = end;
  }
}

}  // namespace lrnn::detail
