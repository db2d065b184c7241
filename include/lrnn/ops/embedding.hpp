/// Rows of a table.
///
///   y[b, t] = weight[ids[b, t]]
///
/// Backward adds rows of dy into dweight in a fixed order (sorted by id, then by position): bitwise
/// reproducible, no atomics. Ids outside [0, V) are checked by check_token_ids before.
#pragma once

#include "lrnn/core/context.hpp"

namespace lrnn {

struct EmbeddingForward {
  TensorView ids;       ///< [...] int32, each in [0, V)
  TensorView weight;    ///< [V, H]
  MutableTensorView y;  ///< [..., H], dtype of weight; on the CPU also float32 of bfloat16
};
struct EmbeddingBackward {
  TensorView ids;             ///< [...] int32
  TensorView dy;              ///< [..., H]
  MutableTensorView dweight;  ///< [V, H], float32 (float64), accumulated into
};

/// @throws ShapeError, DTypeError, DeviceError
void embedding_forward(Context& ctx, const EmbeddingForward& args);
void embedding_backward(Context& ctx, const EmbeddingBackward& args);

/// Reads `ids` on the host, hence synchronises.
/// @throws InvalidArgument naming the first id outside [0, vocab_size) and its position
void check_token_ids(Context& ctx, TensorView ids, std::int64_t vocab_size);

// Backends. Unchecked: call the functions above.
namespace cpu {
void embedding_forward(Context& ctx, const EmbeddingForward& args);
void embedding_backward(Context& ctx, const EmbeddingBackward& args);
}  // namespace cpu
namespace cuda {
void embedding_forward(Context& ctx, const EmbeddingForward& args);
void embedding_backward(Context& ctx, const EmbeddingBackward& args);
}  // namespace cuda

}  // namespace lrnn
