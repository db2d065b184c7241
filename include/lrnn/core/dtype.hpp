/// Element types. There is no complex type: a complex quantity is a float tensor with a dimension
/// of 2 (see "Complex numbers" in the architecture), so that every gradient is a real gradient.
/// Host code never computes in bfloat16; it only converts.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <ostream>

namespace lrnn {

enum class DType : std::uint8_t { float32, float64, bfloat16, int32, int64 };

[[nodiscard]] std::size_t size_of(DType dtype);
[[nodiscard]] const char* name_of(DType dtype);
std::ostream& operator<<(std::ostream& os, DType dtype);

/// Storage of one bfloat16 number.
struct bfloat16 {
  std::uint16_t bits = 0;
};
[[nodiscard]] constexpr float to_float(bfloat16 v) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}
/// Round to nearest, ties to even; NaN stays NaN.
[[nodiscard]] constexpr bfloat16 to_bfloat16(float v) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(v);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U)
    return {static_cast<std::uint16_t>((bits >> 16) | 0x0040U)};
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
}

/// Maps a C++ element type to its DType. Specialised for types a backend can compute in.
template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct dtype_of<bfloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::int32;
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr DType value = DType::int64;
};

/// Where sums, statistics and recurrent states are kept: float64 for float64, else float32.
[[nodiscard]] constexpr DType accumulate_dtype(DType dtype) noexcept {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

}  // namespace lrnn
