#include <tuple>

#include "lrnn/ops/projected_gate.hpp"

#include "support/norm_in_front.hpp"

namespace lrnn::testing {
namespace {

OpCase projected_gate_case(std::int64_t rows, std::int64_t inputs, std::int64_t features,
                           Activation kind, NormInFront front = NormInFront::None) {
  OpCase c{
      .name = detail::concat("projected_gate/T:", rows, "/H:", inputs, "/F:", features,
                             kind == Activation::Silu ? "/silu" : "/gelu"),
      .inputs = {{.name = "x", .shape = {rows, inputs}}},
      .params = {{.name = "weight", .shape = {2, features, inputs}, .low = -0.3, .high = 0.3}},
      .outputs = {{.name = "y", .shape = {rows, features}}},
      .forward = {},
  };
  return behind_norm(std::move(c), front,
                     [kind](Context& ctx, Tensors& t, TensorView x, const AddNormForward* norm) {
                       projected_gate(ctx, {.kind = kind,
                                            .x = x,
                                            .weight = t["weight"],
                                            .y = t["y"],
                                            .norm = norm});
                     });
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  // 17 rows read the weight twice; 33, and odd depth: the ops one by one.
  for (const auto& [rows, inputs, features] :
       std::initializer_list<std::tuple<std::int64_t, std::int64_t, std::int64_t>>{
           {1, 64, 40}, {3, 136, 13}, {16, 512, 128}, {17, 32, 16}, {33, 32, 16}, {2, 7, 5}})
    for (const Activation kind : {Activation::Silu, Activation::Gelu})
      all.push_back(projected_gate_case(rows, inputs, features, kind));
  // With the norm within the product: one row and the most, blocks in part, the most depth. Before
  // it: more rows, more depth, odd depth.
  for (const auto& [rows, inputs, features] :
       std::initializer_list<std::tuple<std::int64_t, std::int64_t, std::int64_t>>{
           {1, 64, 40},
           {3, 136, 13},
           {4, 768, 24},
           {5, 40, 16},
           {2, 776, 8},
           {17, 32, 16},
           {2, 7, 5}})
    for (const NormInFront norm : kNormsInFront)
      all.push_back(projected_gate_case(rows, inputs, features, Activation::Silu, norm));
  return all;
}
const RegisterOpCases kRegister(cases());
const RegisterBenchCases kRegisterBench({projected_gate_case(1, 768, 2048, Activation::Silu),
                                         projected_gate_case(32, 768, 2048, Activation::Silu),
                                         projected_gate_case(1, 768, 3072, Activation::Silu,
                                                             NormInFront::RmsWide),
                                         projected_gate_case(16, 768, 3072, Activation::Silu,
                                                             NormInFront::RmsWide)});

}  // namespace
}  // namespace lrnn::testing
