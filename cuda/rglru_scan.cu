#include "lrnn/ops/rglru_scan.hpp"

namespace lrnn::cuda {

void rglru_scan_forward(Context&, const RglruScanForward&) {
  throw DeviceError("rglru_scan_forward: no CUDA kernel yet");
}
void rglru_scan_backward(Context&, const RglruScanBackward&) {
  throw DeviceError("rglru_scan_backward: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
