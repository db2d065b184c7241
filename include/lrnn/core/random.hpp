/// Counter-based random numbers: the same values on the CPU and on CUDA, and no hidden state.
///
/// Philox 4x32 with 10 rounds. Paper: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
/// SC 2011.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define LRNN_HOST_DEVICE __host__ __device__
#else
#define LRNN_HOST_DEVICE
#endif

namespace lrnn {

struct PhiloxBlock {
  std::uint32_t v[4];
};

/// The block of four 32-bit words that belongs to (key, counter).
LRNN_HOST_DEVICE inline PhiloxBlock philox(std::uint64_t key, std::uint64_t counter_low,
                                           std::uint64_t counter_high = 0) {
  PhiloxBlock c{
      {static_cast<std::uint32_t>(counter_low), static_cast<std::uint32_t>(counter_low >> 32),
       static_cast<std::uint32_t>(counter_high), static_cast<std::uint32_t>(counter_high >> 32)}};
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c.v[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57U} * c.v[2];
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<std::uint32_t>(p0)}};
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return c;
}

/// A float in [0, 1) with 24 random bits.
LRNN_HOST_DEVICE inline float uniform_from_bits(std::uint32_t bits) {
  return static_cast<float>(bits >> 8) * 0x1p-24F;
}

/// A host stream of random numbers, determined by (seed, name).
class Rng {
 public:
  explicit Rng(std::uint64_t seed, std::string_view name = {});

  [[nodiscard]] std::uint32_t bits();
  /// Uniform in [0, 1) with 53 random bits.
  [[nodiscard]] double uniform();
  /// Uniform in [low, high).
  [[nodiscard]] double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// Standard normal.
  [[nodiscard]] double normal();
  /// Uniform in [0, n).
  [[nodiscard]] std::uint64_t below(std::uint64_t n);
  /// Goes on as if bits() had been called `n` times more. A uniform() takes 2, a normal() 4.
  void discard(std::uint64_t n);

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
  std::uint64_t counter_ = 0;
  PhiloxBlock block_{};
  int used_ = 4;
};

}  // namespace lrnn
