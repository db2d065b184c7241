#include "lrnn/ops/sample.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

struct Options {
  const char* name;
  SampleOptions value;
};

// Draws in a row, each of which changes the mask and the counters. Outputs are floats here: ids are
// widened on the host.
OpCase sample_case(std::int64_t rows, std::int64_t vocab_size, const Options& options,
                   int draws = 6) {
  const auto draw = [o = options.value](Context& ctx, Tensors& t) {
    sample_forward(ctx, {.logits = t["logits"],
                         .options = o,
                         .seed = 5,
                         .counters = t["counters"],
                         .seen = t["seen"],
                         .ids = t["drawn"]});
  };
  const auto draw_all = [=](Context& ctx, Tensors& t) {
    t["counters"] = ctx.zeros({rows}, DType::int64);
    t["seen"] = ctx.zeros({rows, seen_words(vocab_size)}, DType::int32);
    t["drawn"] = ctx.empty({rows}, DType::int32);
    std::vector<double> all;
    for (int i = 0; i < draws; ++i) {
      draw(ctx, t);
      for (const double id : ctx.to_host_as_double(t["drawn"])) all.push_back(id);
    }
    ctx.write_from_host(t["ids"], all);
  };
  return {
      .name = detail::concat("sample/", options.name, "/rows:", rows, "/V:", vocab_size,
                             draws == 1 ? "/once" : ""),
      .inputs = {{.name = "logits", .shape = {rows, vocab_size}, .low = -6, .high = 6}},
      .outputs = {{.name = "ids", .shape = {draws, rows}, .storage = Storage::Accumulate}},
      .forward = draw_all,
      .timed = draw,
      .forward_nmse = 0,
      .bfloat16_nmse = 0,
  };
}

std::vector<OpCase> all_cases() {
  const std::vector<Options> all = {
      {"greedy", {.temperature = 0, .repetition_penalty = 1.5}},
      {"plain", {}},
      {"top_k", {.temperature = 0.7, .top_k = 40}},
      {"top_p", {.temperature = 1.2, .top_p = 0.9}},
      {"all",
       {.temperature = 0.9, .top_k = 50, .top_p = 0.95, .min_p = 0.02, .repetition_penalty = 1.2}},
  };
  std::vector<OpCase> cases;
  for (const Options& options : all) {
    cases.push_back(sample_case(2, 7, options));
    cases.push_back(sample_case(3, 1025, options));
    cases.push_back(sample_case(2, 50257, options));
    // The smallest at which threads of a cluster have a second column. One draw, since racecheck
    // takes up to half a minute for each.
    cases.push_back(sample_case(1, 4100, options, 1));
  }
  return cases;
}

// One draw.
std::vector<OpCase> bench_cases() {
  std::vector<OpCase> cases;
  for (const std::int64_t rows : {1, 32})
    for (const Options& options : std::initializer_list<Options>{
             {"plain", {}}, {"top_k", {.top_k = 40}}, {"top_p", {.top_p = 0.9}}})
      cases.push_back(sample_case(rows, 50288, options));
  return cases;
}

const RegisterOpCases kRegister(all_cases());
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
