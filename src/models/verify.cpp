#include "lrnn/models/verify.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"

#include "io/checkpoint.hpp"
#include "io/golden.hpp"
#include "models/s4_coordinates.hpp"

namespace lrnn {
namespace {

using detail::GoldenCase;
using Doubles = std::vector<double>;

double largest(const Doubles& values) {
  double m = 0;
  for (const double v : values) m = std::isnan(v) ? INFINITY : std::max(m, std::abs(v));
  return m;
}
double largest_difference(const Doubles& a, const Doubles& b) {
  if (a.size() != b.size()) return INFINITY;
  Doubles difference(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  return largest(difference);
}
double relative_error(const Doubles& a, const Doubles& b) {
  const double difference = largest_difference(a, b);
  return difference == 0 ? 0 : difference / largest(b);
}

// --- what to expect ----------------------------------------------------------------------------

// The coarser of the type computed in and the type recorded in decides. In bfloat16 the rounding of
// every activation, 2^-9, adds up over the layers; recorded bfloat16 numbers come from two layers.
void set_tolerances(DType dtype, const GoldenCase& golden, VerifyResult& result) {
  if (dtype == DType::bfloat16) {
    result.output_tolerance = 5e-2;
    result.gradient_tolerance = 1e-1;
  } else if (golden.compute_dtype == "bfloat16") {
    result.output_tolerance = 2e-2;
    result.gradient_tolerance = 6e-2;
  } else if (dtype == DType::float32 || golden.compute_dtype == "float32") {
    result.output_tolerance = 1e-4;
    result.gradient_tolerance = 1e-3;
  } else {
    result.output_tolerance = 1e-9;
    result.gradient_tolerance = 1e-7;
  }
}

// Why the numbers recorded for a mixer are those of another system, "" if they are not.
std::string other_system(MixerType type, const MixerKwargs& kwargs, const GoldenCase& golden,
                         std::int64_t seqlen) {
  if (!golden.by_lrnnx) return "";
  if (type == MixerType::S5 && mixer_option(type, kwargs, "discretization") == "\"bilinear\"" &&
      golden.correction.find("s5_bilinear") == std::string::npos)
    return "lrnnx's bilinear S5 has the signs flipped";
  if (type == MixerType::S4 || type == MixerType::S4D) {
    const std::string l_max = mixer_option(type, kwargs, "l_max");
    if (!l_max.empty() && l_max != "null" && std::stoll(l_max) > 0 && std::stoll(l_max) < seqlen)
      return "lrnnx cuts the kernel at l_max in forward";
  }
  return "";
}

bool can_step(MixerType type, const MixerKwargs& kwargs) {
  return type != MixerType::Attn || mixer_option(type, kwargs, "causal") != "false";
}

// --- comparisons -------------------------------------------------------------------------------

// Gradients by name, largest relative error last. A parameter whose recorded gradient vanishes next
// to the others' is held against rounding errors of the size of theirs.
class Gradients {
 public:
  Gradients(DType dtype, const VerifyResult& result)
      : floor_((dtype == DType::float64 ? 2.3e-16 : 1.2e-7) / result.gradient_tolerance) {}

  void add(const std::string& name, Doubles own, Doubles recorded) {
    scale_ = std::max(scale_, largest(recorded));
    pairs_.push_back({name, std::move(own), std::move(recorded)});
  }
  void write(VerifyResult& result) const {
    for (const Pair& p : pairs_) {
      const double difference = largest_difference(p.own, p.recorded);
      const double reference = std::max(largest(p.recorded), floor_ * scale_);
      const double error = difference == 0 ? 0 : difference / reference;
      if (!(result.gradient_error >= error)) {
        result.gradient_error = error;
        result.worst_gradient = p.name;
      }
    }
  }

 private:
  struct Pair {
    std::string name;
    Doubles own;
    Doubles recorded;
  };
  double floor_;
  double scale_ = 0;
  std::vector<Pair> pairs_;
};

// Values of [B, L, W] at the positions before each length.
Doubles valid_part(const Doubles& values, const std::vector<std::int32_t>& lengths,
                   std::int64_t seqlen, std::int64_t width) {
  if (lengths.empty()) return values;
  Doubles out;
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    const auto begin = values.begin() +
                       static_cast<std::ptrdiff_t>(b) * static_cast<std::ptrdiff_t>(seqlen * width);
    out.insert(out.end(), begin, begin + lengths[b] * width);
  }
  return out;
}

void set_status(VerifyResult& result) {
  std::string reason;
  const auto check = [&](const char* what, double error, double tolerance) {
    if (std::isnan(error) || error <= tolerance) return;
    reason += (reason.empty() ? "" : "; ") + detail::concat(what, ' ', error, " > ", tolerance);
  };
  check("output", result.output_error, result.output_tolerance);
  check("loss", result.loss_error, result.output_tolerance);
  check(("gradient of " + result.worst_gradient).c_str(), result.gradient_error,
        result.gradient_tolerance);
  check("step", result.step_error, result.output_tolerance);
  if (reason.empty()) return;
  result.status = VerifyStatus::Failed;
  result.reason = reason;
}

// Column t of a host matrix [B, L, width], as [B, 1, width].
template <class T>
std::vector<T> column(const std::vector<T>& values, std::int64_t batch, std::int64_t seqlen,
                      std::int64_t t) {
  const auto rows = static_cast<std::size_t>(batch * seqlen);
  const std::size_t width = values.size() / rows;
  std::vector<T> out;
  for (auto i = static_cast<std::size_t>(t); i < rows; i += static_cast<std::size_t>(seqlen))
    out.insert(out.end(), values.begin() + static_cast<std::ptrdiff_t>(i * width),
               values.begin() + static_cast<std::ptrdiff_t>((i + 1) * width));
  return out;
}

// Puts per-step outputs [B, 1, W] of step t into [B, L, W].
void place(const Doubles& step, std::int64_t batch, std::int64_t seqlen, std::int64_t t,
           Doubles& all) {
  const std::size_t width = step.size() / static_cast<std::size_t>(batch);
  for (std::size_t b = 0; b < static_cast<std::size_t>(batch); ++b)
    std::copy_n(step.begin() + static_cast<std::ptrdiff_t>(b * width), width,
                all.begin() + static_cast<std::ptrdiff_t>((b * static_cast<std::size_t>(seqlen) +
                                                           static_cast<std::size_t>(t)) *
                                                          width));
}

// The recorded case, on the device.
struct Recorded {
  explicit Recorded(const std::filesystem::path& directory)
      : file(SafetensorsFile::open(directory / "io.safetensors")) {}

  [[nodiscard]] Doubles doubles(const std::string& name) const {
    return file.read_doubles(file.at(name));
  }
  [[nodiscard]] std::vector<std::int32_t> integers(const std::string& name) const {
    std::vector<std::int32_t> out;
    for (const std::int64_t value : file.read_integers(file.at(name))) {
      LRNN_CHECK(value >= INT32_MIN && value <= INT32_MAX, IoError, file.path().string(), ": '",
                 name, "': expected 32-bit integers, got ", value);
      out.push_back(static_cast<std::int32_t>(value));
    }
    return out;
  }
  void check_shape(const std::string& name, const Shape& expected) const {
    const Shape& got = file.at(name).shape;
    LRNN_CHECK(got == expected, IoError, file.path().string(), ": '", name, "': expected ",
               expected, ", got ", got);
  }

  SafetensorsFile file;
};

using NamedGradients = std::map<std::string, Doubles>;

NamedGradients own_gradients(Context& ctx, const ParameterStore& parameters) {
  NamedGradients own;
  for (const Parameter& p : parameters) own.emplace(p.name, ctx.to_host_as_double(p.grad));
  return own;
}

void add_parameter_gradients(const NamedGradients& own, const Recorded& recorded,
                             Gradients& gradients) {
  constexpr std::string_view kPrefix = "grad.";
  for (const auto& [name, entry] : recorded.file.entries()) {
    if (!name.starts_with(kPrefix)) continue;
    const std::string parameter = name.substr(kPrefix.size());
    const auto it = own.find(parameter);
    gradients.add(it == own.end() ? parameter + " (no such parameter)" : parameter,
                  it == own.end() ? Doubles() : it->second, recorded.file.read_doubles(entry));
  }
}

// lrnnx's l_kernel of an S4 layer after its forward pass, 0 if it kept C as it was.
std::int64_t kernel_length(const std::filesystem::path& directory, const std::string& prefix) {
  for (const char* file : {"model_after.safetensors", "model.safetensors"}) {
    if (!std::filesystem::exists(directory / file)) continue;
    const auto tensors = SafetensorsFile::open(directory / file);
    if (const auto* const entry = tensors.find(prefix + "layer.kernel.l_kernel"))
      return tensors.read_integers(*entry).at(0);
  }
  return 0;
}

void s4_gradients_to_lrnnx(Context& ctx, ParameterStore& parameters, const std::string& prefix,
                           const MixerKwargs& kwargs, const std::filesystem::path& directory,
                           NamedGradients& own) {
  const std::int64_t length = kernel_length(directory, prefix);
  if (length == 0) return;
  const auto value = [&](const char* name) {
    return ctx.to_host_as_double(parameters.at(prefix + name).value);
  };
  const auto gradient = [&](const char* name) -> Doubles& { return own.at(prefix + name); };
  const auto option = [&](const char* name, const char* otherwise) {
    const std::string text = mixer_option(MixerType::S4, kwargs, name);
    return text.size() < 2 ? std::string(otherwise) : text.substr(1, text.size() - 2);
  };
  const Shape C = parameters.at(prefix + "C").shape;  // (channels, H, N/2, 2)
  const Shape P = parameters.at(prefix + "P").shape;  // (rank, n_ssm, N/2, 2)
  detail::S4Layer layer{.channels = C[0],
                        .heads = C[1],
                        .states = C[2],
                        .ssm_copies = P[1],
                        .rank = P[0],
                        .dt_tied = parameters.at(prefix + "inv_dt").shape[1] == 1,
                        .A_real = value("A_real"),
                        .A_imag = value("A_imag"),
                        .inv_dt = value("inv_dt"),
                        .P = value("P"),
                        .C = value("C"),
                        .dA_real = gradient("A_real"),
                        .dA_imag = gradient("A_imag"),
                        .dinv_dt = gradient("inv_dt"),
                        .dP = gradient("P"),
                        .dC = gradient("C"),
                        .real_transform = option("real_transform", "exp"),
                        .imag_transform = option("imag_transform", "none"),
                        .dt_transform = option("dt_transform", "exp"),
                        .dt_fast = mixer_option(MixerType::S4, kwargs, "dt_fast") == "true"};
  detail::to_lrnnx_coordinates(layer, length);
  gradient("A_real") = layer.dA_real;
  gradient("A_imag") = layer.dA_imag;
  gradient("inv_dt") = layer.dinv_dt;
  gradient("P") = layer.dP;
  gradient("C") = layer.dC;
}

// --- language models ---------------------------------------------------------------------------

// What config.json of a checkpoint cannot say about the recording.
void describe_recording(const std::filesystem::path& directory, GoldenCase& golden) {
  const Recorded recorded(directory);
  golden.event = recorded.file.find("integration_timesteps") != nullptr;
  if (const auto* const entry = recorded.file.find("lengths"))
    golden.lengths = recorded.file.read_integers(*entry);
  switch (recorded.file.at("logits").dtype) {
    case FileDType::F64:
      golden.compute_dtype = "float64";
      break;
    case FileDType::F32:
      golden.compute_dtype = "float32";
      break;
    default:
      golden.compute_dtype = "bfloat16";
  }
}

LRNNLMHeadModel load_model(Context& ctx, DType dtype, const std::filesystem::path& directory,
                           const GoldenCase& golden) {
  if (golden.kind == "checkpoint")
    return LRNNLMHeadModel::from_pretrained(ctx, directory, {.dtype = dtype});
  LRNNLMHeadConfig config = config_from_json(golden.constructor, {.constructor_arguments = true});
  config.dtype = dtype;
  return LRNNLMHeadModel::from_safetensors(ctx, config, directory / "model.safetensors");
}

void verify_steps(Context& ctx, const LRNNLMHeadModel& model, const std::vector<std::int32_t>& ids,
                  const Doubles& tau, const Shape& shape, const Doubles& logits,
                  VerifyResult& result) {
  const std::int64_t batch = shape[0];
  const std::int64_t seqlen = shape[1];
  auto cache = model.allocate_inference_cache(ctx, {.batch_size = batch, .max_seqlen = seqlen});
  Doubles steps(logits.size());
  for (std::int64_t t = 0; t < seqlen; ++t) {
    const Tensor token = ctx.from_host<std::int32_t>({batch, 1}, column(ids, batch, seqlen, t));
    Tensor dt;
    if (!tau.empty())
      dt = ctx.from_host_as({batch, 1}, accumulate_dtype(model.dtype()),
                            column(tau, batch, seqlen, t));
    const auto out = model.step(ctx, token, cache, {.integration_timesteps = dt});
    place(ctx.to_host_as_double(out.logits), batch, seqlen, t, steps);
  }
  result.step_error = relative_error(steps, logits);
}

void verify_model(Context& ctx, DType dtype, const std::filesystem::path& directory,
                  const GoldenCase& golden, VerifyResult& result) {
  auto model = load_model(ctx, dtype, directory, golden);
  const Recorded recorded(directory);
  const Shape shape = recorded.file.at("input_ids").shape;
  LRNN_CHECK(shape.rank() == 2, IoError, recorded.file.path().string(),
             ": 'input_ids': expected [B, L], got ", shape);
  const std::int64_t seqlen = shape[1];
  const auto ids = recorded.integers("input_ids");
  const Tensor input_ids = ctx.from_host<std::int32_t>(shape, ids);

  ForwardOptions options;
  const Doubles tau = golden.event ? recorded.doubles("integration_timesteps") : Doubles();
  Tensor tau_tensor;
  if (golden.event) {
    tau_tensor = ctx.from_host_as(shape, accumulate_dtype(dtype), tau);
    options.integration_timesteps = tau_tensor;
  }
  std::vector<std::int32_t> lengths(golden.lengths.begin(), golden.lengths.end());
  if (lengths.size() == 1) lengths.assign(static_cast<std::size_t>(shape[0]), lengths.front());
  Tensor lengths_tensor;
  if (!lengths.empty()) {
    lengths_tensor = ctx.from_host<std::int32_t>({shape[0]}, lengths);
    options.lengths = lengths_tensor;
  }

  bool steps = lengths.empty();
  for (std::int64_t i = 0; i < model.config().n_layer; ++i) {
    const MixerType type = model.config().mixer_types[static_cast<std::size_t>(i)];
    const MixerKwargs& kwargs = model.config().layer_kwargs(i);
    steps = steps && can_step(type, kwargs);
    if (result.reason.empty()) result.reason = other_system(type, kwargs, golden, seqlen);
  }
  const auto own = ctx.to_host_as_double(model.forward(ctx, input_ids, options).logits);
  if (steps) verify_steps(ctx, model, ids, tau, shape, own, result);
  if (!result.reason.empty()) {
    result.status = VerifyStatus::NotComparable;
    return;
  }
  const std::int64_t vocab_size = model.config().vocab_size;
  recorded.check_shape("logits", {shape[0], seqlen, vocab_size});
  result.output_error =
      relative_error(valid_part(own, lengths, seqlen, vocab_size),
                     valid_part(recorded.doubles("logits"), lengths, seqlen, vocab_size));
  if (golden.num_last_tokens > 0) {
    options.num_last_tokens = golden.num_last_tokens;
    const auto last = ctx.to_host_as_double(model.forward(ctx, input_ids, options).logits);
    result.output_error =
        std::max(result.output_error, relative_error(last, recorded.doubles("logits_last")));
    options.num_last_tokens = 0;
  }
  // lrnnx counts padded positions in the loss.
  if (!lengths.empty() || golden.kind == "checkpoint") return;
  const Tensor targets = ctx.from_host<std::int32_t>(shape, recorded.integers("targets"));
  const Tensor loss = model.loss_and_backward(ctx, input_ids, targets, options);
  result.loss_error = relative_error(ctx.to_host_as_double(loss), recorded.doubles("loss"));
  NamedGradients own_grads = own_gradients(ctx, model.parameters());
  for (std::int64_t i = 0; i < model.config().n_layer; ++i)
    if (model.config().mixer_types[static_cast<std::size_t>(i)] == MixerType::S4)
      s4_gradients_to_lrnnx(ctx, model.parameters(),
                            "backbone.layers." + std::to_string(i) + ".mixer.",
                            model.config().layer_kwargs(i), directory, own_grads);
  Gradients gradients(dtype, result);
  add_parameter_gradients(own_grads, recorded, gradients);
  gradients.write(result);
}

// --- mixers on their own -----------------------------------------------------------------------

void verify_mixer(Context& ctx, DType dtype, const std::filesystem::path& directory,
                  const GoldenCase& golden, VerifyResult& result) {
  constexpr std::int64_t kUnusedState = 16;  // the options name d_state where it matters
  const MixerType type = mixer_type(golden.mixer_type);
  const MixerBuild build{.d_model = golden.d_model, .d_state = kUnusedState};
  const MixerKwargs kwargs =
      resolve_mixer_kwargs(type, mixer_kwargs_from_json(type, golden.constructor), build);
  ParameterStore parameters;
  const auto mixer = make_mixer(type, kwargs, build, ParameterScope(parameters, ""));
  detail::Checkpoint({directory / "model.safetensors"})
      .load(ctx, parameters, dtype, {{"", mixer.get()}});
  parameters.enable_grad(ctx);

  const Recorded recorded(directory);
  const Shape shape = recorded.file.at("x").shape;
  const std::int64_t batch = shape[0];
  const std::int64_t seqlen = shape[1];
  const Doubles x_values = recorded.doubles("x");
  const Tensor x = ctx.from_host_as(shape, dtype, x_values);
  const DType wide = accumulate_dtype(dtype);
  const Doubles tau = golden.event ? recorded.doubles("integration_timesteps") : Doubles();
  const Tensor tau_tensor = golden.event ? ctx.from_host_as({batch, seqlen}, wide, tau) : Tensor();
  Tensor y = ctx.empty(shape, dtype);
  const auto saved =
      mixer->forward(ctx, {.x = x, .integration_timesteps = tau_tensor, .y = y}, true);
  const Doubles own = ctx.to_host_as_double(y);

  if (can_step(type, kwargs)) {
    const auto state = mixer->make_state(ctx, batch, seqlen, dtype);
    Doubles steps(own.size());
    Tensor y_step = ctx.empty({batch, 1, shape[2]}, dtype);
    for (std::int64_t t = 0; t < seqlen; ++t) {
      const Tensor x_step =
          ctx.from_host_as({batch, 1, shape[2]}, dtype, column(x_values, batch, seqlen, t));
      Tensor dt;
      if (golden.event) dt = ctx.from_host_as({batch, 1}, wide, column(tau, batch, seqlen, t));
      mixer->step(ctx, {.x = x_step, .integration_timesteps = dt, .y = y_step, .state = *state});
      place(ctx.to_host_as_double(y_step), batch, seqlen, t, steps);
    }
    result.step_error = relative_error(steps, own);
  }
  result.reason = other_system(type, kwargs, golden, seqlen);
  if (!result.reason.empty()) {
    result.status = VerifyStatus::NotComparable;
    return;
  }
  result.output_error = relative_error(own, recorded.doubles("y"));
  const Tensor dy = ctx.from_host_as(shape, dtype, recorded.doubles("dy"));
  Tensor dx = ctx.empty(shape, dtype);
  mixer->backward(ctx, *saved, {.dy = dy, .dx = dx});
  Gradients gradients(dtype, result);
  gradients.add("x", ctx.to_host_as_double(dx), recorded.doubles("dx"));
  NamedGradients own_grads = own_gradients(ctx, parameters);
  if (type == MixerType::S4)
    s4_gradients_to_lrnnx(ctx, parameters, "", kwargs, directory, own_grads);
  add_parameter_gradients(own_grads, recorded, gradients);
  gradients.write(result);
}

}  // namespace

const char* name_of(VerifyStatus status) {
  switch (status) {
    case VerifyStatus::Ok:
      return "ok";
    case VerifyStatus::Failed:
      return "FAILED";
    case VerifyStatus::NotComparable:
      return "not comparable";
    case VerifyStatus::Unsupported:
      return "unsupported";
  }
  throw InternalError("unknown VerifyStatus");
}

VerifyResult verify_case(Context& ctx, DType dtype, const std::filesystem::path& directory) {
  GoldenCase golden = detail::read_golden_case(directory);
  if (golden.kind == "checkpoint") describe_recording(directory, golden);
  VerifyResult result;
  result.name = golden.name;
  set_tolerances(dtype, golden, result);
  try {
    if (golden.kind == "mixer")
      verify_mixer(ctx, dtype, directory, golden, result);
    else
      verify_model(ctx, dtype, directory, golden, result);
  } catch (const ConfigError& error) {
    result.status = VerifyStatus::Unsupported;
    result.reason = error.what();
    return result;
  } catch (const InvalidArgument& error) {
    result.status = VerifyStatus::Failed;
    result.reason = error.what();
    return result;
  }
  set_status(result);
  return result;
}

}  // namespace lrnn
