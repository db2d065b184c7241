#include "lrnn/core/random.hpp"

#include <cmath>
#include <numbers>

namespace lrnn {
namespace {

// 64-bit FNV-1a: names select independent Philox streams.
std::uint64_t hash(std::string_view name) {
  std::uint64_t h = 0xCBF29CE484222325U;
  for (const char c : name) {
    h ^= static_cast<unsigned char>(c);
    h *= 0x100000001B3U;
  }
  return h;
}

}  // namespace

Rng::Rng(std::uint64_t seed, std::string_view name) : seed_(seed), stream_(hash(name)) {}

std::uint32_t Rng::bits() {
  if (used_ == 4) {
    block_ = philox(seed_, counter_++, stream_);
    used_ = 0;
  }
  return block_.v[used_++];
}

double Rng::uniform() {
  const std::uint64_t high = bits() >> 5;
  const std::uint64_t low = bits() >> 6;
  return static_cast<double>((high << 26) | low) * 0x1p-53;
}

double Rng::normal() {
  const double radius = std::sqrt(-2.0 * std::log1p(-uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

std::uint64_t Rng::below(std::uint64_t n) {
  return static_cast<std::uint64_t>(uniform() * static_cast<double>(n));
}

void Rng::discard(std::uint64_t n) {
  const std::uint64_t position = 4 * counter_ - (4 - static_cast<std::uint64_t>(used_)) + n;
  counter_ = position / 4;
  used_ = 4;
  for (std::uint64_t i = 0; i < position % 4; ++i) static_cast<void>(bits());
}

}  // namespace lrnn
