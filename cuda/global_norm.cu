#include "lrnn/ops/global_norm.hpp"

namespace lrnn::cuda {

void global_norm(Context&, const GlobalNorm&) {
  throw DeviceError("global_norm: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
