#include "lrnn/core/error.hpp"
#include "lrnn/ops/dplr_scan.hpp"

namespace lrnn::cuda {

void dplr_scan_forward(Context&, const DplrScanForward&) {
  throw DeviceError("dplr_scan_forward: no CUDA kernel yet");
}
void dplr_scan_backward(Context&, const DplrScanBackward&) {
  throw DeviceError("dplr_scan_backward: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
