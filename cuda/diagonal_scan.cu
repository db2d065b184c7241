#include "lrnn/ops/diagonal_scan.hpp"

namespace lrnn::cuda {

void diagonal_scan_forward(Context&, const DiagonalScanForward&) {
  throw DeviceError("diagonal_scan: no CUDA kernel yet");
}
void diagonal_scan_backward(Context&, const DiagonalScanBackward&) {
  throw DeviceError("diagonal_scan: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
