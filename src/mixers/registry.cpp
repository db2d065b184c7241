#include "lrnn/mixers/registry.hpp"

namespace lrnn {
namespace {

struct Row {
  MixerType type;
  const char* name;
  void (*resolve)(const char* name, MixerKwargs&, const MixerBuild&);
  std::unique_ptr<Mixer> (*make)(const MixerKwargs&, const MixerBuild&, const ParameterScope&);
};

// Sums and products of two options stay within 64 bits, whatever a file says.
constexpr std::int64_t kMaxOption = std::int64_t{1} << 30;

void check_size(const char* mixer, const char* option, std::int64_t value) {
  LRNN_CHECK(value >= -kMaxOption && value <= kMaxOption, ConfigError, "mixer_kwargs.", mixer, ".",
             option, ": expected at most ", kMaxOption, ", got ", value);
}
void check_size(const char* mixer, const char* option, const std::optional<std::int64_t>& value) {
  if (value) check_size(mixer, option, *value);
}
template <class T>
void check_size(const char*, const char*, const T&) {}

// `options` is the member of MixerKwargs that holds the options of mixer M.
template <class M, auto options>
constexpr Row row(MixerType type, const char* name) {
  return {type, name,
          [](const char* mixer, MixerKwargs& kwargs, const MixerBuild& build) {
            M::Config::visit(kwargs.*options, [&](const char* option, const auto& value) {
              check_size(mixer, option, value);
            });
            kwargs.*options = M::resolve(kwargs.*options, build);
          },
          [](const MixerKwargs& kwargs, const MixerBuild& build,
             const ParameterScope& scope) -> std::unique_ptr<Mixer> {
            return std::make_unique<M>(kwargs.*options, build, scope);
          }};
}

const Row kRows[] = {
#if __has_include("mixers/lru.cpp")
    row<Lru, &MixerKwargs::lru>(MixerType::LRU, "LRU"),
#endif
#if __has_include("mixers/s4.cpp")
    row<S4, &MixerKwargs::s4>(MixerType::S4, "S4"),
#endif
#if __has_include("mixers/s4d.cpp")
    row<S4d, &MixerKwargs::s4d>(MixerType::S4D, "S4D"),
#endif
#if __has_include("mixers/s5.cpp")
    row<S5, &MixerKwargs::s5>(MixerType::S5, "S5"),
#endif
#if __has_include("mixers/centaurus.cpp")
    row<Centaurus, &MixerKwargs::centaurus>(MixerType::Centaurus, "Centaurus"),
#endif
#if __has_include("mixers/mamba.cpp")
    row<Mamba, &MixerKwargs::mamba>(MixerType::Mamba, "Mamba"),
#endif
#if __has_include("mixers/rglru.cpp")
    row<Rglru, &MixerKwargs::rglru>(MixerType::RGLRU, "RGLRU"),
#endif
#if __has_include("mixers/s7.cpp")
    row<S7, &MixerKwargs::s7>(MixerType::S7, "S7"),
#endif
#if __has_include("mixers/attn.cpp")
    row<Attention, &MixerKwargs::attn>(MixerType::Attn, "attn"),
#endif
    {MixerType::LRU, nullptr, nullptr, nullptr},
};

const Row& row_of(MixerType type) {
  for (const Row& r : kRows)
    if (r.name != nullptr && r.type == type) return r;
  throw ConfigError("mixer_types: unknown mixer type");
}

}  // namespace

std::string_view mixer_name(MixerType type) {
  return row_of(type).name;
}

MixerType mixer_type(std::string_view name) {
  std::string known;
  for (const Row& r : kRows) {
    if (r.name == nullptr) continue;
    if (name == r.name) return r.type;
    known += (known.empty() ? "" : ", ") + std::string(r.name);
  }
  throw ConfigError(
      detail::concat("mixer_types: unknown mixer '", name, "', expected one of: ", known));
}

std::vector<MixerType> all_mixer_types() {
  std::vector<MixerType> types;
  for (const Row& r : kRows)
    if (r.name != nullptr) types.push_back(r.type);
  return types;
}

MixerKwargs resolve_mixer_kwargs(MixerType type, MixerKwargs kwargs, const MixerBuild& build) {
  const Row& row = row_of(type);
  row.resolve(row.name, kwargs, build);
  return kwargs;
}

std::unique_ptr<Mixer> make_mixer(MixerType type, const MixerKwargs& kwargs,
                                  const MixerBuild& build, const ParameterScope& scope) {
  return row_of(type).make(resolve_mixer_kwargs(type, kwargs, build), build, scope);
}

}  // namespace lrnn
