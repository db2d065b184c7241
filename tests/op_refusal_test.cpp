/// What every op in the registry does with operands that do not fit: a typed error that names the
/// op and an operand, before anything is written.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <regex>
#include <set>

#include <gtest/gtest.h>

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

class OpRefusal : public ::testing::TestWithParam<OpCase> {};

/// Host memory that says it belongs to a GPU.
class ForeignMemory final : public MemoryResource {
 public:
  explicit ForeignMemory(MemoryResource& host) : host_(&host) {}
  void* allocate(std::size_t bytes, Stream stream) override {
    return host_->allocate(bytes, stream);
  }
  void deallocate(void* ptr, std::size_t bytes, Stream stream) noexcept override {
    host_->deallocate(ptr, bytes, stream);
  }
  [[nodiscard]] Device device() const noexcept override { return {DeviceType::cuda, 0}; }

 private:
  MemoryResource* host_;
};

enum class Damage { Absent, OtherDType, Longer, Shorter, OtherRank, OtherDevice };

const char* name_of(Damage damage) {
  switch (damage) {
    case Damage::Absent:
      return "absent";
    case Damage::OtherDType:
      return "of another dtype";
    case Damage::Longer:
      return "longer";
    case Damage::Shorter:
      return "shorter";
    case Damage::OtherRank:
      return "of another rank";
    case Damage::OtherDevice:
      return "on another device";
  }
  return "";
}

/// The operand that stands in for a sound one. `dim` is the dimension that grows or shrinks.
Tensor damaged(Context& ctx, MemoryResource& foreign, const Tensor& sound, Damage damage, int dim) {
  Shape shape = sound.shape();
  DType dtype = sound.dtype();
  if (damage == Damage::Absent) return {};
  if (damage == Damage::OtherDType) dtype = dtype == DType::int32 ? DType::float32 : DType::int32;
  if (damage == Damage::Longer) shape.set(dim, shape[dim] + 1);
  if (damage == Damage::Shorter) shape.set(dim, shape[dim] - 1);
  if (damage == Damage::OtherRank) {
    shape = {2};
    for (int i = 0; i < sound.shape().rank(); ++i) shape.set(i + 1, sound.shape()[i]);
  }
  Tensor out(shape, dtype, damage == Damage::OtherDevice ? foreign : ctx.memory(), ctx.stream());
  if (out.view().nbytes() > 0) std::memset(out.view().raw(), 0, out.view().nbytes());
  return out;
}

using Pass = std::function<void(Context&, Tensors&)>;

struct Outcome {
  std::string message;  ///< empty if the pass ran
  bool right_type = true;
};

Outcome run(const Pass& pass, Context& ctx, Tensors& t, Damage damage) {
  try {
    pass(ctx, t);
    return {};
  } catch (const DTypeError& e) {
    return {e.what(), damage == Damage::OtherDType || damage == Damage::Absent};
  } catch (const DeviceError& e) {
    return {e.what(), damage == Damage::OtherDevice};
  } catch (const ShapeError& e) {
    return {e.what(), damage != Damage::OtherDType && damage != Damage::OtherDevice};
  } catch (const InvalidArgument& e) {  // operands that belong together
    return {e.what(), damage == Damage::Absent};
  }
}

using Contents = std::map<std::string, std::vector<std::byte>>;

// Everything that a pass may write, as it is.
Contents contents(const Tensors& t) {
  Contents all;
  for (const auto& [name, tensor] : t) {
    if (!tensor) continue;
    auto& bytes = all[name];
    bytes.resize(tensor.view().nbytes());
    if (!bytes.empty()) std::memcpy(bytes.data(), tensor.view().raw(), bytes.size());
  }
  return all;
}

/// One pass of a case with tensors that it accepts.
struct Sound {
  std::string name;
  Pass pass;
  Tensors tensors;
};

std::vector<Sound> sound_passes(Context& ctx, const OpCase& c) {
  const auto fresh = [&](const OpCase& of) {
    return make_tensors(ctx, of, random_values(of), DType::float64);
  };
  std::vector<Sound> all;
  all.push_back({"forward", c.forward, fresh(c)});
  if (c.backward) {
    Tensors t = fresh(c);
    c.forward(ctx, t);
    all.push_back({"backward", c.backward, std::move(t)});
  }
  const auto has_lengths = [](const Operand& o) { return o.name == "lengths"; };
  if (c.step && c.at_length && std::none_of(c.indices.begin(), c.indices.end(), has_lengths)) {
    const OpCase token = c.at_length(1);
    Tensors t = fresh(token);
    if (t.contains("state_in")) t["state"] = ctx.clone(t["state_in"]);
    all.push_back({"step", token.step, std::move(t)});
  }
  return all;
}

// A case may cut or reshape its tensors for the op; then the view functions may be who refuses.
bool is_from_a_view(const std::string& message) {
  return message.starts_with("slice: ") || message.starts_with("reshape: ") ||
         message.starts_with("zero: ") || message.starts_with("copy: ");
}

// "op: operand..."
bool names_op_and_operand(const std::string& message) {
  static const std::regex form("[a-z0-9_]+: [A-Za-z0-9_.]+[ :,].*");
  return std::regex_match(message, form);
}

// A count of rows, a vocabulary or a list of blocks that nothing else fixes; ids that a case
// collects on the host; a drive that may be complex.
bool may_be_of_any_form(const std::string& case_name, const std::string& operand) {
  static const std::map<std::string, std::set<std::string>> kFree = {
      {"argmax", {"logits", "ids"}}, {"embedding", {"weight", "dweight"}},
      {"global_norm", {"a", "b"}},   {"projected_diagonal", {"B"}},
      {"sample", {"logits", "ids"}}, {"sum_columns", {"x"}},
  };
  const auto it = kFree.find(case_name.substr(0, case_name.find('/')));
  return it != kFree.end() && it->second.contains(operand);
}

// Cases of which an op has run when a later one refuses.
bool has_several_ops(const std::string& case_name) {
  static constexpr const char* kSeveral[] = {
      "adamw",         "cross_entropy", "diagonal_scan", "dplr_scan", "fill_and_add_to",
      "lane_scan",     "linear",        "mamba_stack",   "projected", "s7_gated_step",
      "scale_columns", "mask_padding",  "rotary",        "sample",    "selective_scan_step"};
  return std::any_of(std::begin(kSeveral), std::end(kSeveral),
                     [&](const char* name) { return case_name.starts_with(name); });
}

/// Damages one operand. Returns whether that was noticed.
bool expect_refusal(Context& ctx, const OpCase& c, Sound& sound, const std::string& name,
                    Damage damage, int dim) {
  ForeignMemory foreign(ctx.memory());
  Tensors tensors;
  for (const auto& [other, tensor] : sound.tensors)
    if (tensor) tensors[other] = ctx.clone(tensor);
  tensors[name] = damaged(ctx, foreign, sound.tensors.at(name), damage, dim);
  const Contents before = contents(tensors);
  const Outcome outcome = run(sound.pass, ctx, tensors, damage);
  if (outcome.message.empty()) return false;
  const std::string what =
      sound.name + ": " + name + " " + name_of(damage) + ": " + outcome.message;
  EXPECT_TRUE(outcome.right_type) << what;
  EXPECT_TRUE(names_op_and_operand(outcome.message) || is_from_a_view(outcome.message)) << what;
  if (has_several_ops(c.name)) return true;
  const Contents after = contents(tensors);
  for (const auto& [other, bytes] : before) {
    const auto& left = after.at(other);
    const bool zeroed_by_case =
        std::all_of(left.begin(), left.end(), [](std::byte b) { return b == std::byte{0}; });
    EXPECT_TRUE(other == name || left == bytes || zeroed_by_case)
        << what << ": " << other << " was written";
  }
  return true;
}

/// Damages one operand at a time in the ways of `damages`, one of which must be noticed for each
/// dimension (for a column slice, a longer row is fine).
void expect_refusals(Context& ctx, const OpCase& c, std::vector<Sound>& passes,
                     const std::vector<Damage>& damages) {
  std::set<std::string> accepted;
  std::set<std::string> noticed;
  for (Sound& sound : passes)
    for (const auto& [name, tensor] : sound.tensors) {
      if (!tensor) continue;
      const int dims = damages.front() == Damage::Longer ? tensor.shape().rank() : 1;
      bool all = true;
      for (int dim = 0; dim < dims; ++dim) {
        bool any = false;
        for (const Damage damage : damages)
          any = expect_refusal(ctx, c, sound, name, damage, dim) || any;
        all = all && any;
      }
      (all ? noticed : accepted).insert(name);
    }
  for (const std::string& name : accepted)  // in another pass it may not be used at all
    EXPECT_TRUE(noticed.contains(name) || may_be_of_any_form(c.name, name))
        << name << ' ' << name_of(damages.front()) << " was accepted";
}

TEST_P(OpRefusal, OperandsThatDoNotFitAreTypedErrors) {
  const OpCase& c = GetParam();
  Context ctx = Context::cpu();
  std::vector<Sound> passes = sound_passes(ctx, c);
  expect_refusals(ctx, c, passes, {Damage::OtherDType});
  expect_refusals(ctx, c, passes, {Damage::Longer, Damage::Shorter});
  expect_refusals(ctx, c, passes, {Damage::OtherRank});
  expect_refusals(ctx, c, passes, {Damage::OtherDevice});
  // Operands may be optional; those that are not are refused by name.
  for (Sound& sound : passes)
    for (const auto& [name, tensor] : sound.tensors)
      if (tensor) static_cast<void>(expect_refusal(ctx, c, sound, name, Damage::Absent, 0));
}

// One case of each op suffices: the checks do not depend on the sizes.
std::vector<OpCase> small_cases() {
  std::vector<OpCase> all;
  for (const OpCase& c : all_op_cases()) {
    std::int64_t elements = 0;
    for (const auto* group : {&c.inputs, &c.params})
      for (const Operand& o : *group) elements += o.shape.numel();
    // Beside a margin a longer dimension is a legal column slice.
    if (elements < 2'000 && c.name.find("margin") == std::string::npos) all.push_back(c);
  }
  return all;
}

std::string case_name(const ::testing::TestParamInfo<OpCase>& info) {
  std::string name = info.param.name;
  for (char& ch : name)
    if (!std::isalnum(static_cast<unsigned char>(ch))) ch = '_';
  return name;
}
INSTANTIATE_TEST_SUITE_P(AllOps, OpRefusal, ::testing::ValuesIn(small_cases()), case_name);

}  // namespace
}  // namespace lrnn::testing
