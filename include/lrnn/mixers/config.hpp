/// What the option structs of the mixers share: enumerations and their names in JSON.
///
/// Every option struct has `static void visit(self, v)`, which calls `v(name, member)` for each
/// option under lrnnx's name. Reading and writing JSON, and the list of accepted names, follow
/// from it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lrnn/core/error.hpp"

namespace lrnn {

/// Names of enumerator values in configuration files; the first name of a value is the one written.
template <class E>
struct EnumNames;  // specialised: static constexpr std::pair<E, const char*> table[]

template <class E>
[[nodiscard]] std::string_view enum_name(E value) {
  for (const auto& [v, name] : EnumNames<E>::table)
    if (v == value) return name;
  throw InternalError("enum_name: value without a name");
}
/// @throws ConfigError listing the accepted names.
template <class E>
[[nodiscard]] E enum_value(std::string_view field, std::string_view name) {
  std::string accepted;
  for (const auto& [v, n] : EnumNames<E>::table) {
    if (name == n) return v;
    accepted += (accepted.empty() ? "" : ", ") + std::string(n);
  }
  throw ConfigError(
      detail::concat(field, ": unknown value '", name, "', expected one of: ", accepted));
}

}  // namespace lrnn
