#include "lrnn/ops/selective_scan.hpp"
namespace lrnn::cuda {
void selective_scan_backward(Context& ctx, const SelectiveScanBackward&) {
  throw DeviceError(detail::concat("selective_scan_backward: no CUDA kernel yet on ", ctx.device()));
}
}  // namespace lrnn::cuda
