#include "lrnn/core/tensor.hpp"

#include <algorithm>
#include <ostream>

namespace lrnn {

Shape::Shape(std::initializer_list<std::int64_t> dims) {
  LRNN_CHECK(dims.size() <= kMaxRank, ShapeError, "rank ", dims.size(), " exceeds ", kMaxRank);
  std::copy(dims.begin(), dims.end(), dims_.begin());
  rank_ = static_cast<int>(dims.size());
}
std::int64_t Shape::numel() const noexcept {
  std::int64_t n = 1;
  for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<std::size_t>(i)];
  return n;
}
std::int64_t Shape::operator[](int i) const {
  const int j = i < 0 ? i + rank_ : i;
  LRNN_CHECK(j >= 0 && j < rank_, ShapeError, "dimension ", i, " of a rank-", rank_, " shape");
  return dims_[static_cast<std::size_t>(j)];
}
void Shape::set(int i, std::int64_t extent) {
  LRNN_CHECK(i >= 0 && i < kMaxRank, ShapeError, "dimension ", i);
  dims_[static_cast<std::size_t>(i)] = extent;
  rank_ = std::max(rank_, i + 1);
}
bool operator==(const Shape& a, const Shape& b) noexcept {
  return a.rank_ == b.rank_ && a.dims_ == b.dims_;
}
std::ostream& operator<<(std::ostream& os, const Shape& s) {
  os << '[';
  for (int i = 0; i < s.rank(); ++i) os << (i ? ", " : "") << s[i];
  return os << ']';
}

std::size_t size_of(DType d) {
  switch (d) {
    case DType::bfloat16:
      return 2;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float64:
    case DType::int64:
      return 8;
  }
  throw InternalError("size_of: unknown dtype");
}
const char* name_of(DType d) {
  switch (d) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
  }
  throw InternalError("name_of: unknown dtype");
}
std::ostream& operator<<(std::ostream& os, DType d) {
  return os << name_of(d);
}
std::ostream& operator<<(std::ostream& os, Device d) {
  return d.is_cpu() ? os << "cpu" : os << "cuda:" << d.index;
}

Shape contiguous_strides(const Shape& shape) {
  Shape strides = shape;
  std::int64_t step = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    strides.set(i, step);
    step *= shape[i];
  }
  return strides;
}

bool TensorView::is_contiguous() const {
  std::int64_t step = 1;  // strides of dimensions of extent 1 are never used
  for (int i = rank() - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != step) return false;
    step *= shape_[i];
  }
  return true;
}

void* TensorView::checked(DType expected) const {
  LRNN_CHECK(dtype_ == expected, DTypeError, "tensor is ", dtype_, ", accessed as ", expected);
  return data_;
}
TensorView TensorView::slice(int dim, std::int64_t begin, std::int64_t length) const {
  LRNN_CHECK(dim >= -rank() && dim < rank(), ShapeError, "slice: dimension ", dim, " of ", shape_);
  LRNN_CHECK(begin >= 0 && length >= 0 && begin <= shape_[dim] && length <= shape_[dim] - begin,
             ShapeError, "slice: ", length, " elements from ", begin, " of dimension ", dim, " of ",
             shape_);
  TensorView out = *this;
  out.data_ = static_cast<std::byte*>(data_) +
              static_cast<std::size_t>(begin * strides_[dim]) * size_of(dtype_);
  out.shape_.set(dim < 0 ? dim + rank() : dim, length);
  return out;
}
TensorView TensorView::reshape(Shape shape) const {
  LRNN_CHECK(is_contiguous() && shape.numel() == numel(), ShapeError, "reshape: cannot make ",
             shape, " of ", shape_);
  return {data_, shape, contiguous_strides(shape), dtype_, device_};
}
MutableTensorView MutableTensorView::slice(int dim, std::int64_t begin, std::int64_t length) const {
  const TensorView v = TensorView::slice(dim, begin, length);
  return {const_cast<void*>(v.raw()), v.shape(), strides_, dtype_, device_};
}
MutableTensorView MutableTensorView::reshape(Shape shape) const {
  static_cast<void>(TensorView::reshape(shape));
  return {data_, shape, contiguous_strides(shape), dtype_, device_};
}

namespace {

// Extents may come from a file; neither their product nor the bytes may wrap around.
std::size_t bytes_of(const Shape& shape, DType dtype) {
  std::int64_t bytes = static_cast<std::int64_t>(size_of(dtype));
  bool fits = true;
  for (int i = 0; i < shape.rank(); ++i) {
    LRNN_CHECK(shape[i] >= 0, ShapeError, "tensor: expected extents >= 0, got ", shape);
    fits = fits && !__builtin_mul_overflow(bytes, std::max<std::int64_t>(shape[i], 1), &bytes);
  }
  LRNN_CHECK(fits, ShapeError, "tensor: ", shape, " of ", dtype, " exceeds 64 bits");
  return shape.numel() == 0 ? 0 : static_cast<std::size_t>(bytes);
}

}  // namespace

Tensor::Tensor(Shape shape, DType dtype, MemoryResource& memory, Stream stream)
    : memory_(nullptr), stream_(stream) {
  view_ = {memory.allocate(bytes_of(shape, dtype), stream), shape, contiguous_strides(shape), dtype,
           memory.device()};
  memory_ = &memory;
}
Tensor::~Tensor() {
  if (memory_ != nullptr) memory_->deallocate(view_.raw(), view_.nbytes(), stream_);
}
void Tensor::swap(Tensor& other) noexcept {
  std::swap(view_, other.view_);
  std::swap(memory_, other.memory_);
  std::swap(stream_, other.stream_);
}

}  // namespace lrnn
