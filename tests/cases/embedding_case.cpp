#include "lrnn/ops/embedding.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

OpCase embedding_case(std::int64_t batch, std::int64_t seqlen, std::int64_t vocab,
                      std::int64_t width) {
  const auto elements = static_cast<double>(batch * seqlen * width);
  return {
      .name = detail::concat("embedding/B:", batch, "/L:", seqlen, "/V:", vocab, "/H:", width),
      .inputs = {},
      .params = {{.name = "weight", .shape = {vocab, width}}},
      .indices =
          {{.name = "ids", .shape = {batch, seqlen}, .low = 0, .high = static_cast<double>(vocab)}},
      .outputs = {{.name = "y", .shape = {batch, seqlen, width}}},
      .forward =
          [](Context& ctx, Tensors& t) {
            embedding_forward(ctx, {.ids = t["ids"], .weight = t["weight"], .y = t["y"]});
          },
      .backward =
          [](Context& ctx, Tensors& t) {
            embedding_backward(ctx, {.ids = t["ids"], .dy = t["dy"], .dweight = t["dweight"]});
          },
      .bytes_forward = 8.0 * elements,
      .bytes_backward = 12.0 * elements,
  };
}

OpCase without_gradcheck(OpCase c) {
  c.gradcheck = false;
  return c;
}

// Backward on CUDA works in windows of 32 sorted entries: sizes around one window, runs that
// cross several and runs within one.
const RegisterOpCases kRegister({
    embedding_case(1, 1, 1, 1),
    embedding_case(2, 5, 7, 3),
    embedding_case(1, 31, 3, 4),
    embedding_case(1, 32, 1, 8),
    embedding_case(1, 33, 2, 5),
    embedding_case(2, 100, 3, 2),
    embedding_case(1, 200, 1, 3),
    embedding_case(3, 40, 50, 8),
    without_gradcheck(embedding_case(2, 700, 1000, 136)),
    without_gradcheck(embedding_case(4, 500, 5, 515)),
    without_gradcheck(embedding_case(1, 2000, 65537, 16)),
});
const RegisterBenchCases kRegisterBench({without_gradcheck(embedding_case(8, 2048, 50288, 768))});

}  // namespace
}  // namespace lrnn::testing
