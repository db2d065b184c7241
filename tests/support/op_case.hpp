/// One description of an op, used by all contract tests and by the benchmark.
#pragma once

#include <functional>
#include <map>
#include <ostream>
#include <string>
#include <vector>

#include "lrnn/core/context.hpp"

namespace lrnn::testing {

/// Tensors of a running case by name. For an input or output `x` the gradient is `dx`.
/// `t["absent"]` is an empty tensor, which converts to an absent view.
using Tensors = std::map<std::string, Tensor>;

/// Element type of an operand when the case runs in dtype T.
enum class Storage {
  Activation,  ///< T: float64, float32 or bfloat16
  Accumulate,  ///< float32 in bfloat16 runs: states, recurrence parameters, statistics
};

struct Operand {
  std::string name;
  Shape shape;
  double low = -1.0;  ///< inputs are uniform in [low, high)
  double high = 1.0;
  int time = -1;  ///< the dimension that is L; -1 if there is none (used to cut steps and chunks)
  Storage storage = Storage::Activation;
};

/// `state_in` is an input and `state_out` an output like any other: their gradients are checked by
/// the same test, and chunk and step tests pass them on. Both use Storage::Accumulate.
struct OpCase {
  std::string name;                   ///< "rms_norm/H:64"
  std::vector<Operand> inputs;        ///< differentiated; their gradients are overwritten
  std::vector<Operand> params = {};   ///< differentiated; their gradients accumulate
  std::vector<Operand> indices = {};  ///< int32 in [low, high), not differentiated. "lengths" is
                                      ///< recognised by the test of padding
  std::vector<Operand> outputs;
  std::vector<Operand> saved = {};  ///< written by forward, read by backward
  std::function<void(Context&, Tensors&)> forward;
  std::function<void(Context&, Tensors&)> backward = {};  ///< empty for ops without gradient
  /// One token: time operands have L = 1 (the dimension is kept), "state" is updated in place.
  std::function<void(Context&, Tensors&)> step = {};
  /// What the benchmark times in place of forward, which has run before: the op alone, where
  /// forward copies states first or brings results to the host.
  std::function<void(Context&, Tensors&)> timed = {};
  /// The same case with another length, for cases with a time dimension: chunk, step and padding
  /// tests. The state operands must be called state_in and state_out.
  std::function<OpCase(std::int64_t seqlen)> at_length = {};

  bool gradcheck = true;  ///< false for sizes meant for parity and speed only
  bool bfloat16 = true;   ///< whether CUDA runs it in bfloat16 as well
  /// Least DRAM traffic of one call at float32, for the benchmark. 0: every operand of forward
  /// once.
  double bytes_forward = 0;
  double bytes_backward = 0;
  double flops_forward = 0;
  double flops_backward = 0;
  double gradient_step = 1e-3;       ///< h of the central difference
  double gradient_tolerance = 1e-8;  ///< numerical gradient in double, relative
  double forward_nmse = 1e-12;       ///< float32 against float64
  double gradient_nmse = 1e-10;
  double bfloat16_nmse = 1e-4;  ///< bfloat16 against float64 on rounded inputs
  double bfloat16_gradient_nmse = 1e-4;
};

inline std::ostream& operator<<(std::ostream& os, const OpCase& c) {
  return os << c.name;
}

/// The case of a step in every dtype, from one of a token whose forward updates state_out in place:
/// what comes in is first copied there.
[[nodiscard]] OpCase step_case(OpCase token);

/// All registered cases. Adding a file in tests/cases/ adds to this list.
const std::vector<OpCase>& all_op_cases();

struct RegisterOpCases {
  explicit RegisterOpCases(std::vector<OpCase> cases);
};

/// Cases of the sizes that the benchmark reports; parity at these sizes is measured there.
const std::vector<OpCase>& all_bench_cases();

struct RegisterBenchCases {
  explicit RegisterBenchCases(std::vector<OpCase> cases);
};

/// Reproducible random values of all operands of a case; cotangents are called "d" + output.
using Values = std::map<std::string, std::vector<double>>;
[[nodiscard]] Values random_values(const OpCase& c, std::uint64_t seed = 42);
/// Device tensors of a case in `dtype`: inputs, parameters, outputs (poisoned), saved, gradients.
[[nodiscard]] Tensors make_tensors(Context& ctx, const OpCase& c, const Values& values,
                                   DType dtype);

}  // namespace lrnn::testing
