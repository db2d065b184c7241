/// Where and in which order work runs: one device, one stream, one memory resource and, on CUDA,
/// one cuBLASLt handle with its own workspace.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "lrnn/core/tensor.hpp"

namespace lrnn {

class Runtime;  // device services behind the context; see src/core/runtime.hpp

/// Passed as the first argument to everything that enqueues work. There is no default
/// context, device or stream. Not thread-safe: use one Context per thread.
class Context {
 public:
  static Context cpu();
  /// @throws DeviceError if built without CUDA or `index` is not a device.
  static Context cuda(int index = 0);
  /// CUDA device 0 where there is one, else the CPU.
  static Context best();
  /// 0 without a CUDA build, driver or device.
  [[nodiscard]] static int cuda_device_count() noexcept;

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  [[nodiscard]] Device device() const noexcept;
  [[nodiscard]] Stream stream() const noexcept;
  [[nodiscard]] MemoryResource& memory() const noexcept;
  /// Blocks until all work enqueued on this context has finished. @throws CudaError
  void synchronize();

  /// Uninitialised memory. Filled with NaN when LRNN_POISON=1.
  [[nodiscard]] Tensor empty(const Shape& shape, DType dtype);
  [[nodiscard]] Tensor zeros(const Shape& shape, DType dtype);
  /// A copy of a contiguous tensor of this device. @throws ShapeError, DeviceError
  [[nodiscard]] Tensor clone(TensorView src);
  /// Sets every byte of a contiguous tensor of this device to 0. @throws ShapeError, DeviceError
  void zero(MutableTensorView dst);
  /// Copies between contiguous tensors of equal shape and dtype on this device.
  /// @throws ShapeError, DTypeError, DeviceError
  void copy(MutableTensorView dst, TensorView src);
  template <class T>
  [[nodiscard]] Tensor from_host(const Shape& shape, std::span<const T> values) {
    Tensor t = empty(shape, dtype_of<T>::value);
    LRNN_CHECK(static_cast<std::size_t>(shape.numel()) == values.size(), ShapeError,
               "from_host: shape ", shape, " does not hold ", values.size(), " values");
    copy_from_host(t, values.data());
    return t;
  }
  /// Copies to the host and synchronises.
  template <class T>
  [[nodiscard]] std::vector<T> to_host(TensorView src) {
    std::vector<T> out(static_cast<std::size_t>(src.numel()));
    LRNN_CHECK(src.dtype() == dtype_of<T>::value, DTypeError, "to_host: tensor is ", src.dtype());
    copy_to_host(out.data(), src);
    return out;
  }

  /// The same with a conversion on the host, for tests, initialisers and files.
  [[nodiscard]] Tensor from_host_as(const Shape& shape, DType dtype,
                                    std::span<const double> values);
  void write_from_host(MutableTensorView dst, std::span<const double> values);
  [[nodiscard]] std::vector<double> to_host_as_double(TensorView src);

  /// Whether float32 matrix products may use TF32 on CUDA. Default: no.
  void set_allow_tf32(bool allow) noexcept { allow_tf32_ = allow; }
  [[nodiscard]] bool allow_tf32() const noexcept { return allow_tf32_; }

  /// Redirects allocations to `memory` until the returned guard is destroyed.
  class [[nodiscard]] MemoryScope {
   public:
    MemoryScope(Context& ctx, MemoryResource& memory);
    ~MemoryScope();
    MemoryScope(const MemoryScope&) = delete;
    MemoryScope& operator=(const MemoryScope&) = delete;

   private:
    Context& ctx_;
    MemoryResource* previous_;
  };

  [[nodiscard]] Runtime& runtime() const noexcept { return *runtime_; }

 private:
  explicit Context(std::unique_ptr<Runtime> runtime);
  void copy_from_host(MutableTensorView dst, const void* src);
  void copy_to_host(void* dst, TensorView src);

  std::unique_ptr<Runtime> runtime_;
  MemoryResource* memory_ = nullptr;
  bool allow_tf32_ = false;
};

}  // namespace lrnn
