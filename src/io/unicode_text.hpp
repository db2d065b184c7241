/// What byte-level BPE needs of Unicode's tables: PCRE2 has letters and numbers, utf8proc has
/// decompositions. Without them unicode_text_none.cpp is compiled in place of unicode_text.cpp.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace lrnn::detail {

/// Whether this build has the two libraries; the rest of this header throws ConfigError if not.
[[nodiscard]] bool has_unicode_text() noexcept;

/// Normalisation form C (Unicode standard annex 15) of valid UTF-8, as of Unicode 9: characters of
/// later versions stay as and where they are. O(n log n).
[[nodiscard]] std::string nfc(std::string_view text);

/// Splits text into words by the pattern of GPT-2; threads may share one.
class WordSplitter {
 public:
  WordSplitter();
  /// Calls `on_word` with the consecutive words of `text`, valid UTF-8, which together are `text`.
  void split(std::string_view text, const std::function<void(std::string_view)>& on_word) const;

 private:
  struct Pattern;
  std::shared_ptr<const Pattern> pattern_;
};

}  // namespace lrnn::detail
