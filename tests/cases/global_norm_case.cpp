#include "lrnn/ops/global_norm.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

OpCase global_norm_case(std::int64_t first, std::int64_t second) {
  return {
      .name = detail::concat("global_norm/n:", first, "/n:", second),
      .inputs = {{.name = "a", .shape = {first}, .storage = Storage::Accumulate},
                 {.name = "b", .shape = {second}, .storage = Storage::Accumulate}},
      .outputs = {{.name = "norm", .shape = {}, .storage = Storage::Accumulate}},
      .forward =
          [](Context& ctx, Tensors& t) {
            global_norm(ctx, {.grads = {t["a"], t["b"]}, .scale = 0.25, .norm = t["norm"]});
          },
      .bytes_forward = 4.0 * static_cast<double>(first + second),
  };
}

const RegisterOpCases kRegister({
    global_norm_case(1, 3), global_norm_case(1023, 1025),  // around the number of interleaved sums
    global_norm_case(16384, 16385),                        // around the length of a run
    global_norm_case(16383, 40 * 4096),                    // several runs
});
const RegisterBenchCases kRegisterBench({
    global_norm_case(std::int64_t{1} << 24, std::int64_t{1} << 23),
});

}  // namespace
}  // namespace lrnn::testing
