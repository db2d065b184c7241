#include "lrnn/ops/elementwise.hpp"

#include <algorithm>

#include "common/rows.hpp"

namespace lrnn::cpu {
namespace {

constexpr std::int64_t kColumnsPerItem = 64;

template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return to_bfloat16(static_cast<float>(v));
  else
    return static_cast<T>(v);
}
template <class To, class From>
To convert(From v) {
  if constexpr (std::is_same_v<From, bfloat16>)
    return convert<To>(to_float(v));
  else if constexpr (std::is_same_v<To, bfloat16>)
    return to_bfloat16(static_cast<float>(v));
  else
    return static_cast<To>(v);
}

// Every dtype that can be stored; the CPU computes in float32 and float64 only.
template <class F>
void visit_storage(const char* op, DType dtype, F&& f) {
  if (dtype == DType::bfloat16) return f.template operator()<bfloat16>();
  visit_float(op, dtype, f);
}

template <class From, class To, class F>
void for_rows(TensorView src, MutableTensorView dst, F&& f) {
  const auto s = rows_of<From>(src);
  const auto d = rows_of<To>(dst);
#pragma omp parallel for if (s.count * s.width > 16384)
  for (std::int64_t r = 0; r < s.count; ++r) f(s[r], d[r], s.width);
}

}  // namespace

void cast(Context&, const Cast& a) {
  visit_storage("cast", a.src.dtype(), [&]<class From>() {
    visit_storage("cast", a.dst.dtype(), [&]<class To>() {
      for_rows<From, To>(a.src, a.dst, [](const From* s, To* d, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) d[i] = convert<To>(s[i]);
      });
    });
  });
}

void transpose(Context&, const Transpose& a) {
  visit_storage("transpose", a.src.dtype(), [&]<class From>() {
    visit_storage("transpose", a.dst.dtype(), [&]<class To>() {
      const auto s = rows_of<From>(a.src);
      const auto d = rows_of<To>(a.dst);
#pragma omp parallel for if (s.count * s.width > 16384)
      for (std::int64_t r = 0; r < d.count; ++r)
        for (std::int64_t c = 0; c < d.width; ++c) d[r][c] = convert<To>(s[c][r]);
    });
  });
}

void add_to(Context&, const AddTo& a) {
  visit_float("add_to", a.src.dtype(), [&]<class From>() {
    visit_float("add_to", a.dst.dtype(), [&]<class To>() {
      for_rows<From, To>(a.src, a.dst, [](const From* s, To* d, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) d[i] += static_cast<To>(s[i]);
      });
    });
  });
}

void fill(Context&, const Fill& a) {
  const auto set = [&]<class T>() {
    T* const d = a.dst.data<T>();
    std::fill(d, d + a.dst.numel(), from_double<T>(a.value));
  };
  switch (a.dst.dtype()) {
    case DType::int32:
      return set.template operator()<std::int32_t>();
    case DType::int64:
      return set.template operator()<std::int64_t>();
    default:
      visit_storage("fill", a.dst.dtype(), set);
  }
}

void mask_padding(Context&, const MaskPadding& a) {
  visit_float("mask_padding", a.x.dtype(), [&]<class T>() {
    const std::int32_t* const lengths = a.lengths.data<std::int32_t>();
    const std::int64_t seqlen = a.x.dim(1);
    const std::int64_t width = a.x.numel() / (a.x.dim(0) * seqlen);
    T* const x = a.x.data<T>();
    for (std::int64_t b = 0; b < a.x.dim(0); ++b)
      std::fill(x + (b * seqlen + std::clamp<std::int64_t>(lengths[b], 0, seqlen)) * width,
                x + (b + 1) * seqlen * width, T(0));
  });
}

void scale_columns(Context&, const ScaleColumns& a) {
  visit_float("scale_columns", a.src.dtype(), [&]<class T>() {
    const T* const scale = a.scale.data<T>();
    for_rows<T, T>(a.src, a.dst, [scale](const T* s, T* d, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) d[i] = s[i] * scale[i];
    });
  });
}

// Each item owns some columns and walks all rows in order.
void sum_columns(Context&, const SumColumns& a) {
  visit_float("sum_columns", a.a.dtype(), [&]<class T>() {
    const auto rows = rows_of<T>(a.a);
    const auto factors = a.b ? rows_of<T>(a.b) : Rows<const T>{};
    T* const out = a.out.data<T>();
    const std::int64_t items = (rows.width + kColumnsPerItem - 1) / kColumnsPerItem;
#pragma omp parallel for if (rows.count * rows.width > 16384)
    for (std::int64_t i = 0; i < items; ++i) {
      const std::int64_t first = i * kColumnsPerItem;
      const std::int64_t last = std::min(rows.width, first + kColumnsPerItem);
      T sum[kColumnsPerItem] = {};
      for (std::int64_t r = 0; r < rows.count; ++r) {
        const T* const row = rows[r];
        const T* const factor = a.b ? factors[r] : nullptr;
        for (std::int64_t c = first; c < last; ++c)
          sum[c - first] += factor != nullptr ? row[c] * factor[c] : row[c];
      }
      for (std::int64_t c = first; c < last; ++c) out[c] += sum[c - first];
    }
  });
}

void scale_columns_backward(Context& ctx, const ScaleColumnsBackward& a) {
  cpu::sum_columns(ctx, {.a = a.dy, .b = a.x, .out = a.dscale});  // before dx, which may be dy
  cpu::scale_columns(ctx, {.src = a.dy, .scale = a.scale, .dst = a.dx});
}

}  // namespace lrnn::cpu
