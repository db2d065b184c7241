#include "lrnn/ops/lane_scan.hpp"

namespace lrnn::cuda {

void lane_scan_forward(Context&, const LaneScanForward&) {
  throw DeviceError("lane_scan_forward: no CUDA kernel yet");
}
void lane_scan_backward(Context&, const LaneScanBackward&) {
  throw DeviceError("lane_scan_backward: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
