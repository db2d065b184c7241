#include "io/golden.hpp"

#include "lrnn/io/file.hpp"

#include "io/json.hpp"
#include "models/foreign_config.hpp"

namespace lrnn::detail {

GoldenCase read_golden_case(const std::filesystem::path& directory) {
  using Json = nlohmann::ordered_json;
  const auto path = directory / "config.json";
  try {
    const auto json = parse_json<IoError, Json>(path.string(), read_text_file(path));
    const auto integer = [&](const char* field, const Json& value) {
      return integer_of<IoError, std::int64_t>(concat(path.string(), ": ", field), value);
    };
    GoldenCase out;
    if (!json.contains("case")) {
      out.name = std::filesystem::absolute(path).lexically_normal().parent_path().filename();
      out.kind = "checkpoint";
      out.by_lrnnx = json.contains("mixer_types") && !json.contains(kVersionKey);
      return out;
    }
    out.name = json.at("case");
    out.kind = json.at("kind");
    out.compute_dtype = json.at("compute_dtype");
    out.event = json.at("event");
    out.num_last_tokens = integer("num_last_tokens", json.value("num_last_tokens", Json(0)));
    if (json.at("lengths").is_array())
      for (const Json& length : json.at("lengths"))
        out.lengths.push_back(integer("lengths", length));
    if (json.at("correction").is_string()) out.correction = json.at("correction");
    Json constructor = json.at("constructor");
    if (out.kind == "mixer") {
      out.mixer_type = constructor.at("mixer_type");
      const char* const size = constructor.contains("embed_dim") ? "embed_dim" : "d_model";
      out.d_model = integer(size, constructor.at(size));
      constructor.erase("mixer_type");
      constructor.erase(size);
    }
    out.constructor = constructor.dump();
    return out;
  } catch (const Json::exception& error) {
    throw IoError(path.string() + ": " + error.what());
  }
}

}  // namespace lrnn::detail
