#include "lrnn/ops/adamw.hpp"

namespace lrnn::cuda {

void adamw_begin(Context&, const AdamwBegin&) {
  throw DeviceError("adamw_begin: no CUDA kernel yet");
}
void adamw_update(Context&, const AdamwUpdate&) {
  throw DeviceError("adamw_update: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
