/// Of a build without PCRE2 and utf8proc: see unicode_text.hpp.
#include "lrnn/core/error.hpp"

#include "io/unicode_text.hpp"

namespace lrnn::detail {
namespace {

[[noreturn]] void refuse() {
  throw ConfigError(
      "tokenizer.json: expected a build with PCRE2 and utf8proc (-Dtokenizer=enabled), got one "
      "that reads bytes only");
}

}  // namespace

struct WordSplitter::Pattern {};

bool has_unicode_text() noexcept {
  return false;
}
std::string nfc(std::string_view) {
  refuse();
}
WordSplitter::WordSplitter() {
  refuse();
}
void WordSplitter::split(std::string_view, const std::function<void(std::string_view)>&) const {
  refuse();
}

}  // namespace lrnn::detail
