#include "lrnn/nn/parameter.hpp"

#include <algorithm>

namespace lrnn {
namespace {

// v[i] = next(rng), `words` of rng.bits() each: blocks in parallel, the values of one thread.
template <class Next>
void draw(std::span<double> v, Rng& rng, std::uint64_t words, const Next& next) {
  constexpr std::int64_t kBlock = 1 << 16;
  const auto size = static_cast<std::int64_t>(v.size());
#pragma omp parallel for schedule(static)
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    Rng local = rng;
    local.discard(static_cast<std::uint64_t>(begin) * words);
    for (std::int64_t i = begin; i < std::min(size, begin + kBlock); ++i)
      v[static_cast<std::size_t>(i)] = next(local);
  }
  rng.discard(v.size() * words);
}

}  // namespace

namespace init {

Initializer constant(double value) {
  return [value](std::span<double> v, const Shape&, Rng&) { std::fill(v.begin(), v.end(), value); };
}
Initializer uniform(double bound) {
  return [bound](std::span<double> v, const Shape&, Rng& rng) {
    draw(v, rng, 2, [bound](Rng& r) { return r.uniform(-bound, bound); });
  };
}
Initializer normal(double stddev) {
  return [stddev](std::span<double> v, const Shape&, Rng& rng) {
    draw(v, rng, 4, [stddev](Rng& r) { return stddev * r.normal(); });
  };
}

}  // namespace init

namespace {

// Parameters start at multiples of this many elements: 256 bytes for the smallest element type.
constexpr std::int64_t kAlignElements = 128;

MutableTensorView part(Tensor& slab, std::int64_t offset, const Shape& shape) {
  return slab.view().slice(0, offset, shape.numel()).reshape(shape);
}

}  // namespace

Parameter& ParameterStore::add(std::string name, const Shape& shape, Initializer init,
                               ParameterOptions options) {
  LRNN_CHECK(slabs_.empty(), InternalError, "parameter ", name, " added after materialize()");
  LRNN_CHECK(find(name) == nullptr, InternalError, "parameter ", name, " exists already");
  return parameters_.emplace_back(
      Parameter{std::move(name), shape, options, std::move(init), {}, {}, 0, 0});
}

Parameter& ParameterStore::at(std::string_view name) {
  Parameter* const p = find(name);
  LRNN_CHECK(p != nullptr, InvalidArgument, "there is no parameter '", name, "'");
  return *p;
}

Parameter* ParameterStore::find(std::string_view name) noexcept {
  const auto it = std::find_if(parameters_.begin(), parameters_.end(),
                               [&](const Parameter& p) { return p.name == name; });
  return it == parameters_.end() ? nullptr : &*it;
}

std::int64_t ParameterStore::numel() const noexcept {
  std::int64_t n = 0;
  for (const Parameter& p : parameters_) n += p.shape.numel();
  return n;
}

void ParameterStore::materialize(Context& ctx, DType dtype, std::uint64_t seed,
                                 bool initialize_values) {
  LRNN_CHECK(slabs_.empty(), InternalError, "materialize() called twice");
  LRNN_CHECK(dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16,
             DTypeError, "parameters cannot be ", dtype);
  memory_ = &ctx.memory();
  const bool islands = dtype == DType::bfloat16;
  slabs_.resize(islands ? 2 : 1);
  slabs_[0].dtype = dtype;
  if (islands) slabs_[1].dtype = DType::float32;
  for (Parameter& p : parameters_) {
    const bool narrow = bfloat16_matrices_only_ ? p.options.matrix : !p.options.keep_float32;
    p.slab = islands && !narrow ? 1 : 0;
    auto& slab = slabs_[static_cast<std::size_t>(p.slab)];
    p.offset = slab.numel;
    slab.numel += (p.shape.numel() + kAlignElements - 1) / kAlignElements * kAlignElements;
  }
  for (ParameterSlab& slab : slabs_) slab.values = ctx.zeros({slab.numel}, slab.dtype);
  for (Parameter& p : parameters_) {
    p.value = part(slabs_[static_cast<std::size_t>(p.slab)].values, p.offset, p.shape);
    if (initialize_values) initialize(ctx, p, seed);
  }
}

void ParameterStore::initialize(Context& ctx, Parameter& parameter, std::uint64_t seed) {
  std::vector<double> values(static_cast<std::size_t>(parameter.shape.numel()));
  Rng rng(seed, parameter.name);
  parameter.init(values, parameter.shape, rng);
  ctx.write_from_host(parameter.value, values);
}

void ParameterStore::enable_grad(Context& ctx) {
  LRNN_CHECK(!slabs_.empty(), InternalError, "enable_grad() before materialize()");
  LRNN_CHECK(
      !bfloat16_matrices_only_, DTypeError,
      "training: dtype: expected float32 or float64 on the CPU, got bfloat16 (inference only)");
  if (has_grad()) return;
  const Context::MemoryScope scope(ctx, *memory_);
  for (ParameterSlab& slab : slabs_)
    slab.grads = ctx.zeros({slab.numel}, accumulate_dtype(slab.dtype));
  for (Parameter& p : parameters_)
    p.grad = part(slabs_[static_cast<std::size_t>(p.slab)].grads, p.offset, p.shape);
}

void ParameterStore::zero_grad(Context& ctx) {
  for (ParameterSlab& slab : slabs_)
    if (slab.grads) ctx.zero(slab.grads);
}

bool ParameterStore::has_grad() const noexcept {
  return !slabs_.empty() && static_cast<bool>(slabs_.front().grads);
}

}  // namespace lrnn
