#include "lrnn/ops/argmax.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

// Logits have 8 bits, so that equal ones occur. Outputs are floats here: ids are widened on the
// host.
OpCase argmax_case(std::int64_t rows, std::int64_t vocab_size) {
  return {
      .name = detail::concat("argmax/rows:", rows, "/V:", vocab_size),
      .inputs = {{.name = "logits", .shape = {rows, vocab_size}, .low = -10, .high = 10}},
      .outputs = {{.name = "ids", .shape = {rows}, .storage = Storage::Accumulate}},
      .forward =
          [](Context& ctx, Tensors& t) {
            const Tensor ids = argmax(ctx, t["logits"]);
            ctx.write_from_host(t["ids"], ctx.to_host_as_double(ids));
          },
      .timed = [](Context& ctx, Tensors& t) { static_cast<void>(argmax(ctx, t["logits"])); },
      .forward_nmse = 0,
      .bfloat16_nmse = 0,
  };
}

const RegisterOpCases kRegister({argmax_case(1, 1), argmax_case(3, 31), argmax_case(5, 513),
                                 argmax_case(2, 50257)});
const RegisterBenchCases kRegisterBench({argmax_case(1, 50288), argmax_case(32, 50288)});

}  // namespace
}  // namespace lrnn::testing
