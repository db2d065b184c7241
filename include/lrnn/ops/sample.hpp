/// Draws one token per row from filtered and tempered logits.
///
///   l_i = logits_i / repetition_penalty where seen and logits_i > 0, logits_i * penalty where seen
///   y_i = (max l - l_i) / (temperature ln 2)          distance from the best token, in bits
///   w_i = 2^-y_i                                       probability w_i / sum w
///
/// Filters, each a prefix of the order (y ascending, index ascending):
///   top_k  the first k tokens
///   top_p  the shortest prefix of those that holds at least top_p of their weight
///   min_p  tokens with w_i >= min_p
///
/// y is rounded down to multiples of 2^-26 and w to multiples of 2^-40, and everything after that
/// is integer arithmetic, whose sums do not depend on the order: the CPU and CUDA draw the same ids
/// from the same logits. Logits are taken as float32. Tokens further than 40 bits from the best one
/// are never drawn. With temperature 0 or top_k 1 the best token is taken (the lowest index on
/// ties) and no random number is used up.
///
/// NaN counts as minus infinity; a row without any number above minus infinity gives 0.
#pragma once

#include <cstdint>

#include "lrnn/core/context.hpp"

namespace lrnn {

struct SampleOptions {
  double temperature = 1.0;         ///< >= 0; 0: greedy
  std::int64_t top_k = 0;           ///< 0: no limit; 1: greedy
  double top_p = 1.0;               ///< in (0, 1]
  double min_p = 0.0;               ///< in [0, 1)
  double repetition_penalty = 1.0;  ///< > 0; 1: none
};

struct SampleForward {
  TensorView logits;  ///< [..., V], R rows, V <= 2^22; rows may be column slices of a wider tensor
  SampleOptions options;
  std::uint64_t seed;  ///< key of the random numbers
  /// [R] int64, how many numbers each row has drawn; read and, unless greedy, incremented. The
  /// number is a function of (seed, row, counter). Required unless greedy.
  MutableTensorView counters = {};
  /// [R, ceil(V / 32)] int32, bit i % 32 of word i / 32 tells that token i occurred in the row.
  /// Required with a repetition penalty; where present, the drawn token is added.
  MutableTensorView seen = {};
  MutableTensorView ids;  ///< [...], int32
};

/// Adds tokens to `seen`, e.g. those of a prompt.
struct MarkSeen {
  TensorView ids;           ///< [R, L] int32; values outside [0, V) are passed over
  std::int64_t vocab_size;  ///< V
  MutableTensorView seen;   ///< [R, ceil(V / 32)] int32
  TensorView lengths = {};  ///< [R] int32: only the first lengths[r] ids count
};

/// @throws ShapeError, DTypeError, DeviceError; ConfigError naming the option
void sample_forward(Context& ctx, const SampleForward& args);
void mark_seen(Context& ctx, const MarkSeen& args);

/// Words per row of a seen mask.
[[nodiscard]] constexpr std::int64_t seen_words(std::int64_t vocab_size) noexcept {
  return (vocab_size + 31) / 32;
}

// Backends. Unchecked: call the functions above.
namespace cpu {
void sample_forward(Context& ctx, const SampleForward& args);
void mark_seen(Context& ctx, const MarkSeen& args);
}  // namespace cpu
namespace cuda {
void sample_forward(Context& ctx, const SampleForward& args);
void mark_seen(Context& ctx, const MarkSeen& args);
}  // namespace cuda

}  // namespace lrnn
