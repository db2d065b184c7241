#include "lrnn/core/context.hpp"

#include <cstdlib>

#include "lrnn/core/graph.hpp"

#include "core/runtime.hpp"
#include "ops/dispatch.hpp"

namespace lrnn {
namespace {

// Elements from which on threads share a conversion.
constexpr std::size_t kParallelConversion = std::size_t{1} << 20;

// One host value of type T, widened to double.
template <class T>
double widen(const void* data, std::size_t i) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return static_cast<double>(to_float(static_cast<const bfloat16*>(data)[i]));
  else
    return static_cast<double>(static_cast<const T*>(data)[i]);
}

template <class T>
void narrow(void* data, std::size_t i, double value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    static_cast<bfloat16*>(data)[i] = to_bfloat16(static_cast<float>(value));
  else
    static_cast<T*>(data)[i] = static_cast<T>(value);
}

template <class F>
void visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f.template operator()<float>();
    case DType::float64:
      return f.template operator()<double>();
    case DType::bfloat16:
      return f.template operator()<bfloat16>();
    case DType::int32:
      return f.template operator()<std::int32_t>();
    case DType::int64:
      return f.template operator()<std::int64_t>();
  }
  throw InternalError("visit_dtype: unknown dtype");
}

// The data of `t` is there, is of this device and has no gaps.
void check_tensor(const char* op, const Context& ctx, const TensorView& t) {
  LRNN_CHECK(t, ShapeError, op, ": tensor is required");
  LRNN_CHECK(t.device() == ctx.device(), DeviceError, op, ": tensor is on ", t.device(),
             ", context is on ", ctx.device());
  LRNN_CHECK(t.is_contiguous(), ShapeError, op, ": tensor ", t.shape(), " is not contiguous");
}

}  // namespace

Context::Context(std::unique_ptr<Runtime> runtime)
    : runtime_(std::move(runtime)), memory_(&runtime_->memory()) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;
Context Context::cpu() {
  return Context(cpu::make_runtime());
}
Context Context::cuda([[maybe_unused]] int index) {
#if LRNN_WITH_CUDA
  return Context(cuda::make_runtime(index));
#else
  detail::throw_built_without_cuda("Context::cuda");
#endif
}
Context Context::best() {
  return cuda_device_count() > 0 ? cuda() : cpu();
}
int Context::cuda_device_count() noexcept {
#if LRNN_WITH_CUDA
  return cuda::device_count();
#else
  return 0;
#endif
}
Device Context::device() const noexcept {
  return runtime_->device();
}
Stream Context::stream() const noexcept {
  return runtime_->stream();
}
MemoryResource& Context::memory() const noexcept {
  return *memory_;
}
void Context::synchronize() {
  runtime_->synchronize();
}

Tensor Context::empty(const Shape& shape, DType dtype) {
  Tensor t(shape, dtype, *memory_, stream());
  static const bool poison = std::getenv("LRNN_POISON") != nullptr;
  if (poison) runtime_->fill_bytes(t, 0xFF);  // 0xFF... is a NaN in every float format
  return t;
}
Tensor Context::zeros(const Shape& shape, DType dtype) {
  Tensor t(shape, dtype, *memory_, stream());
  runtime_->fill_bytes(t, 0);
  return t;
}
Tensor Context::clone(TensorView src) {
  check_tensor("clone", *this, src);
  Tensor t(src.shape(), src.dtype(), *memory_, stream());
  runtime_->copy(t, src);
  return t;
}
void Context::zero(MutableTensorView dst) {
  check_tensor("zero", *this, dst);
  runtime_->fill_bytes(dst, 0);
}
void Context::copy(MutableTensorView dst, TensorView src) {
  check_tensor("copy", *this, dst);
  check_tensor("copy", *this, src);
  LRNN_CHECK(dst.shape() == src.shape(), ShapeError, "copy: destination is ", dst.shape(),
             ", source is ", src.shape());
  LRNN_CHECK(dst.dtype() == src.dtype(), DTypeError, "copy: destination is ", dst.dtype(),
             ", source is ", src.dtype());
  runtime_->copy(dst, src);
}
void Context::copy_from_host(MutableTensorView dst, const void* src) {
  check_tensor("copy_from_host", *this, dst);
  runtime_->copy_from_host(dst, src);
}
void Context::copy_to_host(void* dst, TensorView src) {
  check_tensor("to_host", *this, src);
  runtime_->copy_to_host(dst, src);
}

Tensor Context::from_host_as(const Shape& shape, DType dtype, std::span<const double> values) {
  Tensor t = empty(shape, dtype);
  write_from_host(t, values);
  return t;
}
void Context::write_from_host(MutableTensorView dst, std::span<const double> values) {
  LRNN_CHECK(static_cast<std::size_t>(dst.numel()) == values.size(), ShapeError,
             "write_from_host: shape ", dst.shape(), " does not hold ", values.size(), " values");
  std::vector<std::byte> buffer(dst.nbytes());
  visit_dtype(dst.dtype(), [&]<class T>() {
#pragma omp parallel for schedule(static) if (values.size() > kParallelConversion)
    for (std::size_t i = 0; i < values.size(); ++i) narrow<T>(buffer.data(), i, values[i]);
  });
  copy_from_host(dst, buffer.data());
}
std::vector<double> Context::to_host_as_double(TensorView src) {
  std::vector<std::byte> buffer(src.nbytes());
  copy_to_host(buffer.data(), src);
  std::vector<double> out(static_cast<std::size_t>(src.numel()));
  visit_dtype(src.dtype(), [&]<class T>() {
#pragma omp parallel for schedule(static) if (out.size() > kParallelConversion)
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = widen<T>(buffer.data(), i);
  });
  return out;
}

Context::MemoryScope::MemoryScope(Context& ctx, MemoryResource& memory)
    : ctx_(ctx), previous_(ctx.memory_) {
  ctx.memory_ = &memory;
}
Context::MemoryScope::~MemoryScope() {
  ctx_.memory_ = previous_;
}

Graph::Graph(std::unique_ptr<Recording> recording) : recording_(std::move(recording)) {}
Graph::Graph(Graph&&) noexcept = default;
Graph& Graph::operator=(Graph&&) noexcept = default;
Graph::~Graph() = default;
Graph Graph::capture(Context& ctx, const std::function<void()>& work) {
  return Graph(ctx.runtime().record(work));
}
void Graph::launch() {
  recording_->launch();
}

}  // namespace lrnn
