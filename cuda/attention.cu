#include "lrnn/ops/attention.hpp"

namespace lrnn::cuda {

void attention_forward(Context&, const AttentionForward&) {
  throw DeviceError("attention_forward: no CUDA kernel yet");
}
void attention_backward(Context&, const AttentionBackward&) {
  throw DeviceError("attention_backward: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
