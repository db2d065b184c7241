#include "lrnn/ops/argmax.hpp"

namespace lrnn::cuda {

void argmax_forward(Context&, const ArgmaxForward&) {
  throw DeviceError("argmax_forward: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
