/// One owner (Tensor) and two views: TensorView reads, MutableTensorView writes.
#pragma once

#include <cstddef>
#include <utility>

#include "lrnn/core/device.hpp"
#include "lrnn/core/dtype.hpp"
#include "lrnn/core/error.hpp"
#include "lrnn/core/memory.hpp"
#include "lrnn/core/shape.hpp"

namespace lrnn {

class Tensor;

/// Read-only, non-owning, strided. Cheap to copy. A default-constructed view is absent
/// (`!view`), which is how optional operands are expressed.
class TensorView {
 public:
  TensorView() = default;
  TensorView(const Tensor& tensor) noexcept;  // NOLINT(google-explicit-constructor)
  TensorView(const void* data, Shape shape, Shape strides, DType dtype, Device device)
      : data_(const_cast<void*>(data)),
        shape_(shape),
        strides_(strides),
        dtype_(dtype),
        device_(device) {}

  explicit operator bool() const noexcept { return data_ != nullptr; }
  [[nodiscard]] const Shape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::int64_t dim(int i) const { return shape_[i]; }
  [[nodiscard]] int rank() const noexcept { return shape_.rank(); }
  [[nodiscard]] std::int64_t numel() const noexcept { return shape_.numel(); }
  /// Distance in elements between neighbours along dimension `i`.
  [[nodiscard]] std::int64_t stride(int i) const { return strides_[i]; }
  [[nodiscard]] bool is_contiguous() const;
  [[nodiscard]] DType dtype() const noexcept { return dtype_; }
  [[nodiscard]] Device device() const noexcept { return device_; }
  [[nodiscard]] std::size_t nbytes() const {
    return static_cast<std::size_t>(numel()) * size_of(dtype_);
  }
  [[nodiscard]] const void* raw() const noexcept { return data_; }

  /// @throws DTypeError if T is not the element type.
  template <class T>
  [[nodiscard]] const T* data() const {
    return static_cast<const T*>(checked(dtype_of<T>::value));
  }

  /// Elements [begin, begin + length) of dimension `dim`. No copy.
  [[nodiscard]] TensorView slice(int dim, std::int64_t begin, std::int64_t length) const;
  /// @throws ShapeError unless contiguous and numel() is preserved.
  [[nodiscard]] TensorView reshape(Shape shape) const;

 protected:
  [[nodiscard]] void* checked(DType expected) const;

  void* data_ = nullptr;
  Shape shape_;
  Shape strides_;
  DType dtype_ = DType::float32;
  Device device_;
};

/// A TensorView whose elements may be written. Converts to TensorView, never back.
class MutableTensorView : public TensorView {
 public:
  MutableTensorView() = default;
  MutableTensorView(Tensor& tensor) noexcept;  // NOLINT(google-explicit-constructor)
  MutableTensorView(void* data, Shape shape, Shape strides, DType dtype, Device device)
      : TensorView(data, shape, strides, dtype, device) {}

  [[nodiscard]] void* raw() const noexcept { return data_; }
  template <class T>
  [[nodiscard]] T* data() const {
    return static_cast<T*>(checked(dtype_of<T>::value));
  }
  [[nodiscard]] MutableTensorView slice(int dim, std::int64_t begin, std::int64_t length) const;
  [[nodiscard]] MutableTensorView reshape(Shape shape) const;
};

/// Sole owner of a contiguous, row-major block. Move-only; copying is always explicit
/// (Context::clone). The memory returns to its resource, in stream order, on destruction.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Shape shape, DType dtype, MemoryResource& memory, Stream stream);
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    Tensor(std::move(other)).swap(*this);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor();

  [[nodiscard]] TensorView view() const noexcept { return view_; }
  [[nodiscard]] MutableTensorView view() noexcept { return view_; }
  explicit operator bool() const noexcept { return static_cast<bool>(view_); }

  [[nodiscard]] const Shape& shape() const noexcept { return view_.shape(); }
  [[nodiscard]] std::int64_t dim(int i) const { return view_.dim(i); }
  [[nodiscard]] DType dtype() const noexcept { return view_.dtype(); }
  [[nodiscard]] Device device() const noexcept { return view_.device(); }

 private:
  void swap(Tensor& other) noexcept;

  MutableTensorView view_;
  MemoryResource* memory_ = nullptr;
  Stream stream_;
};

inline TensorView::TensorView(const Tensor& tensor) noexcept : TensorView(tensor.view()) {}
inline MutableTensorView::MutableTensorView(Tensor& tensor) noexcept
    : MutableTensorView(tensor.view()) {}

/// Row-major strides of `shape`.
[[nodiscard]] Shape contiguous_strides(const Shape& shape);

}  // namespace lrnn
