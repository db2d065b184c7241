#include <cmath>

#include "lrnn/ops/projected_diagonal.hpp"

#include "support/norm_in_front.hpp"

namespace lrnn::testing {
namespace {

struct Sizes {
  std::int64_t batch, width, lanes;
  bool complex = false;  // drives
  bool matrix = false;   // D
  NormInFront norm = NormInFront::None;
};

void step(Context& ctx, Tensors& t, TensorView x, const AddNormForward* norm) {
  projected_diagonal_step(ctx, {.x = x,
                                .B = t["B"],
                                .a = t["a"],
                                .a_low = t["a_low"],
                                .gamma = t["gamma"],
                                .C = t["C"],
                                .D = t["D"],
                                .y = t["y"],
                                .state = t["state_out"],
                                .norm = norm});
}

OpCase projected_diagonal_case(const Sizes& z) {
  const Shape rows = {z.batch, z.width};
  const Shape planes = {2, z.lanes};
  const Shape state = {z.batch, 2, z.lanes};
  const auto accumulate = Storage::Accumulate;
  const double bound = 2.0 / std::sqrt(static_cast<double>(z.width));
  Operand D{.name = "D", .shape = {z.width}, .storage = accumulate};
  if (z.matrix) D = {.name = "D", .shape = {z.width, z.width}, .low = -bound, .high = bound};
  OpCase c{
      .name = detail::concat("projected_diagonal/B:", z.batch, "/H:", z.width, "/N:", z.lanes,
                             z.complex ? "/complex" : "", z.matrix ? "/matrix" : ""),
      .inputs = {{.name = "x", .shape = rows},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params =
          {{.name = "B",
            .shape = z.complex ? Shape{2, z.lanes, z.width} : Shape{z.lanes, z.width},
            .low = -bound,
            .high = bound},
           {.name = "a", .shape = planes, .storage = accumulate},
           {.name = "a_low", .shape = planes, .low = -1e-8, .high = 1e-8, .storage = accumulate},
           {.name = "gamma", .shape = planes, .storage = accumulate},
           {.name = "C", .shape = {z.width, 2, z.lanes}},
           D},
      .outputs = {{.name = "y", .shape = rows},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .forward = {},
  };
  return step_case(behind_norm(std::move(c), z.norm, step));
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const bool complex : {false, true})
    for (const bool matrix : {false, true})
      for (const Sizes& z : {
               Sizes{1, 64, 16}, Sizes{3, 40, 12},  // blocks in part
               Sizes{4, 264, 72},                   // several steps of a warp
               Sizes{16, 24, 8},                    // most rows
               Sizes{17, 32, 16},                   // the weights twice
               Sizes{33, 32, 16},                   // the ops one by one
               Sizes{2, 7, 3},                      // the same: odd depths
           })
        all.push_back(projected_diagonal_case({z.batch, z.width, z.lanes, complex, matrix}));
  // With the norm within the product, where D is a factor per column: one row and the most, blocks
  // in part, the most depth of two products and of one. Before it: more depth, more rows.
  for (const bool complex : {false, true})
    for (const NormInFront norm : kNormsInFront)
      for (const Sizes& z :
           {Sizes{1, 64, 16}, Sizes{3, 40, 12}, Sizes{4, 768, 24}, Sizes{5, 24, 8},
            Sizes{2, 776, 8}, Sizes{1, 2048, 8}, Sizes{17, 32, 16}, Sizes{2, 7, 3}})
        all.push_back(projected_diagonal_case({z.batch, z.width, z.lanes, complex, false, norm}));
  all.push_back(projected_diagonal_case({3, 64, 16, true, true, NormInFront::Rms}));
  return all;
}
const RegisterOpCases kRegister(cases());

// LRU and S5.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const std::int64_t batch : {1, 32})
    for (const bool complex : {true, false})
      all.push_back(projected_diagonal_case({batch, 768, 64, complex}));
  for (const std::int64_t batch : {1, 16})
    all.push_back(projected_diagonal_case({batch, 768, 256, true, false, NormInFront::RmsWide}));
  return all;
}
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
