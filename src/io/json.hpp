/// JSON from outside, which is not trusted.
#pragma once

#include <concepts>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lrnn/core/error.hpp"

#include "io/names.hpp"

namespace lrnn::detail {

struct JsonLimits {
  int depth = 8;            ///< a copy or a print of nested values recurses
  std::size_t keys = 1024;  ///< of one object; ordered_json looks them up one by one
  std::size_t values = std::size_t{1} << 20;  ///< of the whole text; one may take 100 bytes
};

/// The beginning of a text that may be as long as its file, for an error message.
[[nodiscard]] inline std::string shortened(const std::string& text, std::size_t length) {
  return text.size() > length ? text.substr(0, length) + "..." : text;
}
/// `value` as JSON for an error message: one line, never a failure.
template <class Json>
[[nodiscard]] std::string shown(const Json& value) {
  return shortened(value.dump(-1, ' ', false, Json::error_handler_t::replace), 80);
}

/// Parses `text`, which errors call `where`.
/// @throws E if it is malformed, has a key twice in an object or one that cannot be printed, or
/// exceeds `limits`
template <class E, class Json = nlohmann::json>
[[nodiscard]] Json parse_json(const std::string& where, std::string_view text,
                              const JsonLimits& limits = {}) {
  using Event = typename Json::parse_event_t;
  std::vector<std::set<std::string>> open;
  std::size_t values = 0;
  const auto check = [&](int depth, Event event, Json& parsed) {
    LRNN_CHECK(depth <= limits.depth, E, where, ": nested deeper than ", limits.depth);
    if (event == Event::object_start) open.emplace_back();
    if (event == Event::object_end) open.pop_back();
    if (event != Event::key) {
      LRNN_CHECK(++values <= limits.values, E, where, ": more than ", limits.values, " values");
      return true;
    }
    const auto key = parsed.template get<std::string>();
    LRNN_CHECK(is_printable_name(key), E, where, ": expected a printable key, got ", shown(parsed));
    LRNN_CHECK(open.back().insert(key).second, E, where, ": duplicate key ", shown(parsed));
    LRNN_CHECK(open.back().size() <= limits.keys, E, where, ": more than ", limits.keys,
               " keys in an object");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const typename Json::exception& error) {
    throw E(concat(where, ": malformed JSON: ", shortened(error.what(), 200)));
  }
}

/// An integer that `T` can hold. @throws E naming `where`, which ends in the field
template <class E, std::integral T, class Json>
[[nodiscard]] T integer_of(const std::string& where, const Json& value) {
  const bool fits =
      value.is_number_unsigned()
          ? std::in_range<T>(value.template get<std::uint64_t>())
          : value.is_number_integer() && std::in_range<T>(value.template get<std::int64_t>());
  LRNN_CHECK(fits, E, where, ": expected an integer of ", std::is_signed_v<T> ? "" : "unsigned ",
             8 * sizeof(T), " bits, got ", shown(value));
  return value.template get<T>();
}

}  // namespace lrnn::detail
