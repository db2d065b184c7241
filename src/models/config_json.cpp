#include <limits>
#include <set>

#include "lrnn/models/lm_config.hpp"

#include "io/json.hpp"
#include "models/foreign_config.hpp"

namespace lrnn {
namespace {

using Json = nlohmann::ordered_json;
using Keys = std::set<std::string>;
using detail::kVersionKey;

constexpr std::int64_t kVersion = 1;

using detail::shown;

[[noreturn]] void expected(const std::string& field, const char* what, const Json& got) {
  throw ConfigError(field + ": expected " + what + ", got " + shown(got));
}

// --- reading one value -------------------------------------------------------------------------

void read(const std::string& field, const Json& json, bool& out) {
  if (!json.is_boolean()) expected(field, "true or false", json);
  out = json.get<bool>();
}
void read(const std::string& field, const Json& json, std::int64_t& out) {
  if (!json.is_number_integer()) expected(field, "an integer", json);
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > INT64_MAX)
    expected(field, "a 64-bit integer", json);
  out = json.get<std::int64_t>();
}
// As in Python, an integer stands for the number, but 8.0 is not an integer.
void read(const std::string& field, const Json& json, double& out) {
  if (!json.is_number()) expected(field, "a number", json);
  out = json.get<double>();
}
const std::string& read_name(const std::string& field, const Json& json) {
  if (!json.is_string()) expected(field, "a string", json);
  const auto& name = json.get_ref<const std::string&>();
  if (!detail::is_printable_name(name)) expected(field, "a printable name", json);
  return name;
}
void read(const std::string& field, const Json& json, std::string& out) {
  out = read_name(field, json);
}
template <class E>
requires std::is_enum_v<E>
void read(const std::string& field, const Json& json, E& out) {
  out = enum_value<E>(field, read_name(field, json));
}
template <class T>
void read(const std::string& field, const Json& json, std::optional<T>& out) {
  const bool automatic =
      std::is_same_v<T, std::int64_t> && json.is_string() && json.get<std::string>() == "auto";
  if (json.is_null() || automatic) {
    out.reset();
    return;
  }
  T value{};
  read(field, json, value);
  out = std::move(value);
}
template <std::size_t n>
void read(const std::string& field, const Json& json, std::array<double, n>& out) {
  if (!json.is_array() || json.size() != n)
    expected(field, ("a list of " + std::to_string(n) + " numbers").c_str(), json);
  for (std::size_t i = 0; i < n; ++i) read(field + "[" + std::to_string(i) + "]", json[i], out[i]);
}

// --- writing one value -------------------------------------------------------------------------

Json written(bool value) {
  return value;
}
Json written(std::int64_t value) {
  return value;
}
Json written(double value) {
  return value;
}
Json written(const std::string& value) {
  return value;
}
template <class E>
requires std::is_enum_v<E> Json written(E value) {
  return std::string(enum_name(value));
}
template <class T>
Json written(const std::optional<T>& value) {
  return value ? written(*value) : Json();
}
template <std::size_t n>
Json written(const std::array<double, n>& value) {
  return Json(value);
}

template <class Options>
Json write_options(const Options& options) {
  Json out = Json::object();
  Options::visit(options,
                 [&](const char* name, const auto& member) { out[name] = written(member); });
  return out;
}

// --- option structs ----------------------------------------------------------------------------

template <class Options>
Keys keys_of() {
  Keys keys;
  const Options options{};
  Options::visit(options, [&](const char* name, const auto&) { keys.insert(name); });
  return keys;
}

// Assigns the members that `object` names; other keys are left to the caller.
template <class Options>
void read_options(const std::string& path, const Json& object, Options& options) {
  Options::visit(options, [&](const char* name, auto& member) {
    const auto it = object.find(name);
    if (it != object.end()) read(path + name, *it, member);
  });
}

// Calls `f` with the options of `type`.
template <class Kwargs, class F>
auto with_options(MixerType type, Kwargs& kwargs, F&& f) {
  switch (type) {
    case MixerType::LRU:
      return f(kwargs.lru);
    case MixerType::S4:
      return f(kwargs.s4);
    case MixerType::S4D:
      return f(kwargs.s4d);
    case MixerType::S5:
      return f(kwargs.s5);
    case MixerType::Centaurus:
      return f(kwargs.centaurus);
    case MixerType::Mamba:
      return f(kwargs.mamba);
    case MixerType::RGLRU:
      return f(kwargs.rglru);
    case MixerType::S7:
      return f(kwargs.s7);
    case MixerType::Attn:
      return f(kwargs.attn);
  }
  throw InternalError("unknown MixerType");
}

Keys keys_of(MixerType type) {
  const MixerKwargs kwargs;
  return with_options(type, kwargs, [](const auto& options) {
    return keys_of<std::remove_cvref_t<decltype(options)>>();
  });
}
Json write_mixer(MixerType type, const MixerKwargs& kwargs) {
  return with_options(type, kwargs, [](const auto& options) { return write_options(options); });
}
void read_mixer(const std::string& path, const Json& object, MixerType type, MixerKwargs& kwargs) {
  with_options(type, kwargs, [&](auto& options) { read_options(path, object, options); });
}

std::string joined(const Keys& keys) {
  std::string text;
  for (const std::string& key : keys) text += (text.empty() ? "" : ", ") + key;
  return text;
}
void check_keys(const std::string& path, const Json& object, const Keys& accepted) {
  for (const auto& [key, value] : object.items())
    LRNN_CHECK(accepted.contains(key), ConfigError, path, key,
               ": unknown option, expected one of: ", joined(accepted));
}

// --- mixer_kwargs ------------------------------------------------------------------------------

// What lrnnx's mixers do where no option says otherwise, in a text that is not this library's.
MixerKwargs lrnnx_defaults() {
  MixerKwargs kwargs;
  const Json causal = {{"causal", false}};
  read_mixer("", causal, MixerType::Attn, kwargs);
  return kwargs;
}

// An object per mixer type when all keys are type names, flat when none is.
bool is_per_type(const std::string& path, const Json& object) {
  Keys names;
  for (const MixerType type : all_mixer_types()) names.insert(std::string(mixer_name(type)));
  std::size_t count = 0;
  for (const auto& [key, value] : object.items())
    if (names.contains(key)) ++count;
  LRNN_CHECK(
      count == 0 || count == object.size(), ConfigError, path,
      ": expected either only mixer names or only options as keys, got a mixture: ", shown(object));
  return count > 0;
}

// Applies `json` to the options of `used` types and reports which keys each of them was given.
std::map<MixerType, Keys> read_mixer_kwargs(const std::string& path, const Json& json,
                                            const std::set<MixerType>& used, MixerKwargs& kwargs) {
  std::map<MixerType, Keys> given;
  if (json.is_null()) return given;
  if (!json.is_object()) expected(path, "an object", json);
  if (is_per_type(path, json)) {
    for (const auto& [name, object] : json.items()) {
      const MixerType type = mixer_type(name);
      const std::string inner = path + "." + name;
      if (object.is_null()) continue;
      if (!object.is_object()) expected(inner, "an object", object);
      check_keys(inner + ".", object, keys_of(type));
      read_mixer(inner + ".", object, type, kwargs);
      for (const auto& [key, value] : object.items()) given[type].insert(key);
    }
    return given;
  }
  Keys accepted;
  for (const MixerType type : used) accepted.merge(keys_of(type));
  check_keys(path + ".", json, accepted);
  for (const MixerType type : used) {
    read_mixer(path + ".", json, type, kwargs);
    const Keys own = keys_of(type);
    for (const auto& [key, value] : json.items())
      if (own.contains(key)) given[type].insert(key);
  }
  return given;
}

// Options that lrnnx requires and this library has a default for: a checkpoint of lrnnx that does
// not name them could have been trained with anything.
void require_option(MixerType type, const char* key, std::int64_t layer, const Keys& given) {
  LRNN_CHECK(
      given.contains(key), ConfigError, "mixer_kwargs.", mixer_name(type), ".", key,
      ": missing; lrnnx has no default for it and does not save it, so it must be given (layer ",
      layer, ")");
}

const Shape* find_shape(const ReadConfigOptions& options, std::int64_t layer, const char* name) {
  if (options.shapes == nullptr) return nullptr;
  const auto it = options.shapes->find(detail::concat("backbone.layers.", layer, ".mixer.", name));
  return it == options.shapes->end() ? nullptr : &it->second;
}

// Returns what the shapes of a checkpoint say about options that `given` lacks.
Json options_from_shapes(MixerType type, std::int64_t layer, std::int64_t d_model,
                         const Keys& given, const ReadConfigOptions& options) {
  Json found = Json::object();
  if (type != MixerType::Centaurus) return found;
  const Shape* const A = find_shape(options, layer, "A");
  const Shape* const B = find_shape(options, layer, "B");
  if (A == nullptr || B == nullptr || A->rank() < 2 || B->rank() < 1) return found;
  if (!given.contains("sub_state_dim")) found["sub_state_dim"] = (*A)[1];
  if (given.contains("mode")) return found;
  // B is (N, H) in neck, (N M, H) in pointwise, (H) in dws and (H^2) in full; pointwise has no E.
  if (find_shape(options, layer, "E") == nullptr)
    found["mode"] = "pointwise";
  else if (B->rank() == 2)
    found["mode"] = "neck";
  else
    found["mode"] = (*B)[0] == d_model ? "dws" : "full";
  return found;
}

void read_all_mixer_kwargs(const Json& json, bool own_format, const ReadConfigOptions& options,
                           LRNNLMHeadConfig& config) {
  const std::set<MixerType> used(config.mixer_types.begin(), config.mixer_types.end());
  if (options.mixer_kwargs) {
    config.mixer_kwargs = *options.mixer_kwargs;
    return;
  }
  if (!own_format) config.mixer_kwargs = lrnnx_defaults();
  std::map<MixerType, Keys> given;
  if (const auto it = json.find("mixer_kwargs"); it != json.end())
    given = read_mixer_kwargs("mixer_kwargs", *it, used, config.mixer_kwargs);

  const auto n_layer = config.mixer_types.size();
  std::vector<std::map<MixerType, Keys>> given_to(n_layer, given);
  const auto it = json.find("mixer_kwargs_per_layer");
  if (it != json.end() && !it->is_null() && !(it->is_array() && it->empty())) {
    if (!it->is_array() || it->size() != n_layer)
      expected("mixer_kwargs_per_layer", "a list with one entry per layer", *it);
    config.mixer_kwargs_per_layer.assign(n_layer, config.mixer_kwargs);
    for (std::size_t i = 0; i < n_layer; ++i) {
      auto own = read_mixer_kwargs(detail::concat("mixer_kwargs_per_layer[", i, "]"), (*it)[i],
                                   {config.mixer_types[i]}, config.mixer_kwargs_per_layer[i]);
      for (auto& [type, keys] : own) given_to[i][type].merge(keys);
    }
  }
  if (own_format) return;
  for (std::size_t i = 0; i < n_layer; ++i) {
    const MixerType type = config.mixer_types[i];
    const auto layer = static_cast<std::int64_t>(i);
    Keys& keys = given_to[i][type];
    const Json found = options_from_shapes(type, layer, config.d_model, keys, options);
    if (!found.empty()) {
      if (config.mixer_kwargs_per_layer.empty())
        config.mixer_kwargs_per_layer.assign(n_layer, config.mixer_kwargs);
      read_mixer("", found, type, config.mixer_kwargs_per_layer[i]);
      for (const auto& [key, value] : found.items()) keys.insert(key);
    }
    if (type == MixerType::Attn) require_option(type, "num_heads", layer, keys);
    if (type == MixerType::S5) require_option(type, "discretization", layer, keys);
    if (type == MixerType::Centaurus) require_option(type, "sub_state_dim", layer, keys);
  }
}

void refuse_lrnnx_bilinear_s5(const LRNNLMHeadConfig& config) {
  for (std::int64_t i = 0; i < config.n_layer; ++i) {
    const bool is_s5 = config.mixer_types[static_cast<std::size_t>(i)] == MixerType::S5;
    LRNN_CHECK(
        !is_s5 ||
            write_mixer(MixerType::S5, config.layer_kwargs(i)).value("discretization", Json()) !=
                "bilinear",
        ConfigError,
        "mixer_kwargs.S5.discretization: \"bilinear\" in a checkpoint of lrnnx "
        "means its sign-flipped, unstable system, which has no counterpart here (layer ",
        i, ")");
  }
}

// --- the whole text ----------------------------------------------------------------------------

Json parse(std::string_view text) {
  Json json = detail::parse_json<ConfigError, Json>("config", text);
  if (!json.is_object()) expected("config", "an object", json);
  return json;
}

void read_mixer_types(const Json& json, LRNNLMHeadConfig& config) {
  if (!json.is_array()) expected("mixer_types", "a list of names", json);
  for (const Json& name : json) {
    if (!name.is_string()) expected("mixer_types", "a list of names", json);
    config.mixer_types.push_back(mixer_type(read_name("mixer_types", name)));
  }
}

void read_dtype(const Json& json, LRNNLMHeadConfig& config) {
  if (json.is_null()) return;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16})
    if (json == name_of(dtype)) {
      config.dtype = dtype;
      return;
    }
  expected("dtype", "float32, float64, bfloat16 or null", json);
}

bool read_version(const Json& json) {
  const auto it = json.find(kVersionKey);
  if (it == json.end()) return false;
  std::int64_t version = 0;
  read(kVersionKey, *it, version);
  LRNN_CHECK(version == kVersion, ConfigError, kVersionKey, ": expected ", kVersion, ", got ",
             version);
  return true;
}

}  // namespace

LRNNLMHeadConfig config_from_json(std::string_view text, const ReadConfigOptions& options) {
  const Json json = detail::translate_foreign_config(parse(text));
  LRNNLMHeadConfig config{
      .d_model = 0, .d_state = 0, .n_layer = 0, .vocab_size = 0, .mixer_types = {}};
  Keys accepted = keys_of<LRNNLMHeadConfig>();
  accepted.insert({"mixer_types", "mixer_kwargs", "mixer_kwargs_per_layer", "initializer_cfg",
                   "dtype", kVersionKey});
  check_keys("", json, accepted);
  for (const char* required : {"d_model", "d_state", "n_layer", "vocab_size", "mixer_types"})
    LRNN_CHECK(json.contains(required), ConfigError, required, ": missing");
  const bool own_format = read_version(json);
  read_options("", json, config);
  read_mixer_types(json["mixer_types"], config);
  if (const auto it = json.find("initializer_cfg"); it != json.end() && !it->is_null()) {
    if (!it->is_object()) expected("initializer_cfg", "an object", *it);
    check_keys("initializer_cfg.", *it, keys_of<InitializerConfig>());
    read_options("initializer_cfg.", *it, config.initializer_cfg);
  }
  if (const auto it = json.find("dtype"); it != json.end()) read_dtype(*it, config);
  config.validate();  // before anything is made for each layer
  read_all_mixer_kwargs(json, own_format, options, config);
  if (!own_format && !options.constructor_arguments) refuse_lrnnx_bilinear_s5(config);
  return config;
}

std::string config_to_json(const LRNNLMHeadConfig& config) {
  Json json = {{kVersionKey, kVersion}};
  json.update(write_options(config));
  json["mixer_types"] = Json::array();
  for (const MixerType type : config.mixer_types)
    json["mixer_types"].push_back(std::string(mixer_name(type)));
  json["mixer_kwargs"] = Json::object();
  const std::set<MixerType> used(config.mixer_types.begin(), config.mixer_types.end());
  for (const MixerType type : all_mixer_types()) {
    Json options = write_mixer(type, config.mixer_kwargs);
    if (used.contains(type) || options != write_mixer(type, {}))
      json["mixer_kwargs"][std::string(mixer_name(type))] = std::move(options);
  }
  json["mixer_kwargs_per_layer"] = Json();
  for (std::size_t i = 0; i < config.mixer_kwargs_per_layer.size(); ++i)
    json["mixer_kwargs_per_layer"].push_back(
        write_mixer(config.mixer_types.at(i), config.mixer_kwargs_per_layer[i]));
  json["initializer_cfg"] = write_options(config.initializer_cfg);
  json["dtype"] = config.dtype ? Json(name_of(*config.dtype)) : Json();
  return json.dump(2) + "\n";
}

MixerKwargs mixer_kwargs_from_json(MixerType type, std::string_view text) {
  const Json json = parse(text);
  MixerKwargs kwargs = lrnnx_defaults();
  const std::string path = std::string(mixer_name(type)) + ".";
  check_keys(path, json, keys_of(type));
  read_mixer(path, json, type, kwargs);
  return kwargs;
}

std::string mixer_option(MixerType type, const MixerKwargs& kwargs, const std::string& name) {
  const Json options = write_mixer(type, kwargs);
  const auto it = options.find(name);
  return it == options.end() ? "" : it->dump();
}

}  // namespace lrnn
