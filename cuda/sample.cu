#include "lrnn/ops/sample.hpp"

namespace lrnn::cuda {

void sample_forward(Context&, const SampleForward&) {
  throw DeviceError("sample_forward: no CUDA kernel yet");
}
void mark_seen(Context&, const MarkSeen&) {
  throw DeviceError("mark_seen: no CUDA kernel yet");
}

}  // namespace lrnn::cuda
