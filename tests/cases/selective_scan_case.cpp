#include "lrnn/ops/linear.hpp"
#include "lrnn/ops/selective_scan.hpp"

#include "support/op_case.hpp"

namespace lrnn::testing {
namespace {

using Disc = SelectiveDiscretization;

struct Sizes {
  std::int64_t batch, seqlen, channels, dstate;
  Disc disc = Disc::Mamba;
  bool event = false;
  bool gate = true;
  bool lengths = false;
  std::int64_t rank = 0;  // of the projection of dt, which the step does then
};

SelectiveScanInputs inputs(const Sizes& z, Tensors& t) {
  return {.discretization = z.disc,
          .u = t["u"],
          .dt = t["dt"],
          .dt_bias = t["dt_bias"],
          .A_log = t["A_log"],
          .B = t["B"],
          .C = t["C"],
          .D = t["D"],
          .z = t["z"],
          .integration_timesteps = t["tau"],
          .dtA_bias = t["dtA_bias"],
          .lengths = t["lengths"],
          .state_in = t["state_in"]};
}
void forward(const Sizes& z, Context& ctx, Tensors& t) {
  SelectiveScanInputs in = inputs(z, t);
  Tensor dt;
  if (z.rank > 0) {
    dt = ctx.empty(t["u"].shape(), t["u"].dtype());
    linear_forward(ctx, {.x = t["dt_low"], .weight = t["dt_weight"], .y = dt});
    in.dt = dt;
  }
  selective_scan_forward(
      ctx, {.in = in, .y = t["y"], .state_out = t["state_out"], .chunk_states = t["chunk_states"]});
}
void backward(const Sizes& z, Context& ctx, Tensors& t) {
  selective_scan_backward(ctx, {.in = inputs(z, t),
                                .dy = t["dy"],
                                .chunk_states = t["chunk_states"],
                                .dstate_out = t["dstate_out"],
                                .du = t["du"],
                                .ddt = t["ddt"],
                                .dB = t["dB"],
                                .dC = t["dC"],
                                .dz = t["dz"],
                                .ddt_bias = t["ddt_bias"],
                                .dA_log = t["dA_log"],
                                .dD = t["dD"],
                                .ddtA_bias = t["ddtA_bias"],
                                .dintegration_timesteps = t["dtau"],
                                .dstate_in = t["dstate_in"]});
}
void step(const Sizes& z, Context& ctx, Tensors& t, MutableTensorView state) {
  SelectiveScanInputs in = inputs(z, t);
  in.state_in = {};
  selective_scan_step(
      ctx,
      {.in = in, .dt_low = t["dt_low"], .dt_weight = t["dt_weight"], .y = t["y"], .state = state});
}

std::string case_name(const Sizes& z) {
  const char* const names[] = {"mamba", "zoh", "bilinear", "dirac"};
  return detail::concat(
      "selective_scan/", names[static_cast<int>(z.disc)], "/B:", z.batch, "/L:", z.seqlen,
      "/D:", z.channels, "/N:", z.dstate, z.event ? "/event" : "", z.gate ? "" : "/plain",
      z.lengths ? "/lengths" : "", z.rank > 0 ? detail::concat("/R:", z.rank) : "");
}

OpCase selective_scan_case(const Sizes& z) {
  const Shape x = {z.batch, z.seqlen, z.channels};
  const Shape shared = {z.batch, z.seqlen, z.dstate};
  const Shape state = {z.batch, z.channels, z.dstate};
  const auto accumulate = Storage::Accumulate;
  OpCase c{
      .name = case_name(z),
      .inputs = {{.name = "u", .shape = x, .time = 1},
                 {.name = "B", .shape = shared, .time = 1},
                 {.name = "C", .shape = shared, .time = 1},
                 {.name = "state_in", .shape = state, .storage = accumulate}},
      .params = {{.name = "dt_bias", .shape = {z.channels}, .storage = accumulate},
                 {.name = "A_log", .shape = {z.channels, z.dstate}, .storage = accumulate}},
      .outputs = {{.name = "y", .shape = x, .time = 1},
                  {.name = "state_out", .shape = state, .storage = accumulate}},
      .saved = {{.name = "chunk_states",
                 .shape = {z.batch, selective_scan_chunks(z.seqlen), z.channels, z.dstate},
                 .storage = accumulate}},
      .forward = [z](Context& ctx, Tensors& t) { forward(z, ctx, t); },
      .backward = [z](Context& ctx, Tensors& t) { backward(z, ctx, t); },
      .step = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state"]); },
      .at_length =
          [z](std::int64_t seqlen) {
            Sizes other = z;
            other.seqlen = seqlen;
            return selective_scan_case(other);
          },
      .bytes_forward = 4.0 * static_cast<double>(4 * x.numel() + 2 * shared.numel()),
      .bytes_backward = 4.0 * static_cast<double>(7 * x.numel() + 4 * shared.numel()),
  };
  if (z.rank > 0) {
    c.inputs.push_back({.name = "dt_low", .shape = {z.batch, z.seqlen, z.rank}, .time = 1});
    c.params.push_back({.name = "dt_weight", .shape = {z.channels, z.rank}});
    c.backward = {};
  } else {
    c.inputs.push_back({.name = "dt", .shape = x, .low = -2.0, .high = 1.0, .time = 1});
  }
  if (z.gate) {
    c.inputs.push_back({.name = "z", .shape = x, .time = 1});
    c.params.push_back({.name = "D", .shape = {z.channels}, .storage = accumulate});
  }
  if (z.event) {
    c.inputs.push_back({.name = "tau",
                        .shape = {z.batch, z.seqlen},
                        .low = 0.2,
                        .high = 2.0,
                        .time = 1,
                        .storage = accumulate});
    c.params.push_back({.name = "dtA_bias", .shape = {z.channels}, .storage = accumulate});
  }
  if (z.lengths)
    c.indices = {{.name = "lengths",
                  .shape = {z.batch},
                  .low = 1,
                  .high = static_cast<double>(z.seqlen + 1)}};
  return c;
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const Disc disc : {Disc::Mamba, Disc::Zoh, Disc::Bilinear, Disc::Dirac})
    for (const bool event : {false, true}) {
      all.push_back(selective_scan_case({2, 5, 3, 2, disc, event}));
      all.push_back(selective_scan_case({2, 6, 2, 3, disc, event, false, true}));
    }
  all.push_back(selective_scan_case({1, 1, 1, 1}));
  for (const std::int64_t seqlen : {31, 32, 33, 65})  // around the chunk of 32
    all.push_back(selective_scan_case({1, seqlen, 2, 2}));
  all.push_back(selective_scan_case({2, 3, 33, 16}));  // one past a tile of channels
  all.push_back(selective_scan_case({3, 70, 2, 5, Disc::Mamba, false, true, true}));
  OpCase groups = selective_scan_case({2, 70, 150, 3, Disc::Mamba, false, true, true});
  groups.gradcheck = false;  // more channels than the CPU adds up in one piece
  all.push_back(groups);
  for (const std::int64_t rank : {5, 8, 48}) {
    all.push_back(selective_scan_case({2, 3, 40, 16, Disc::Mamba, false, true, false, rank}));
    all.push_back(selective_scan_case({3, 2, 7, 3, Disc::Zoh, true, true, false, rank}));
  }
  all.push_back(selective_scan_case({33, 2, 8, 16, Disc::Mamba, false, true, false, 16}));
  for (const Sizes& z : {Sizes{9, 2, 70, 16, Disc::Mamba, false, true, false, 48},
                         Sizes{37, 2, 72, 16, Disc::Mamba, false, true, false, 128},
                         Sizes{18, 2, 66, 16, Disc::Mamba, false, true, false, 24},
                         Sizes{20, 1, 8512, 16, Disc::Mamba, false, true, false, 16}}) {
    all.push_back(selective_scan_case(z));  // many sequences, few or many of a block
    all.back().gradcheck = false;
  }
  // Many states of several sequences, and channels that do not fill a block.
  for (const Sizes& z :
       {Sizes{8, 2, 37, 32}, Sizes{17, 2, 33, 64, Disc::Mamba, false, false}, Sizes{9, 2, 19, 128},
        Sizes{32, 2, 40, 64, Disc::Mamba, false, true, false, 48},
        Sizes{11, 2, 21, 32, Disc::Mamba, false, true, false, 72},
        Sizes{8, 2, 9, 128, Disc::Mamba, false, true, false, 4},
        Sizes{8, 2, 9, 64, Disc::Zoh, false, true, false, 16},
        Sizes{8, 2, 9, 64, Disc::Mamba, true}}) {
    all.push_back(selective_scan_case(z));
    all.back().gradcheck = false;
  }
  for (const Disc disc : {Disc::Mamba, Disc::Bilinear}) {  // so many that a thread steps several
    all.push_back(selective_scan_case({66, 2, 3, 16, disc}));
    all.back().gradcheck = false;
  }
  // So long that time is cut into segments.
  for (const Sizes& z :
       {Sizes{1, 1000, 35, 16}, Sizes{2, 900, 3, 5, Disc::Mamba, false, true, true},
        Sizes{1, 800, 4, 70, Disc::Mamba, false, false}, Sizes{1, 800, 5, 20, Disc::Zoh, true},
        Sizes{2, 800, 2, 3, Disc::Bilinear, true, true, true}, Sizes{1, 800, 2, 3, Disc::Dirac}}) {
    all.push_back(selective_scan_case(z));
    all.back().gradcheck = false;
  }
  for (const std::int64_t dstate : {16, 17, 64}) {
    OpCase large = selective_scan_case({2, 300, 96, dstate});
    large.gradcheck = false;
    all.push_back(large);
  }
  return all;
}
const RegisterOpCases kRegister(cases());

OpCase selective_scan_step_case(const Sizes& z) {
  OpCase c = selective_scan_case(z);
  c.name.insert(std::string("selective_scan").size(), "_step");
  c.forward = [z](Context& ctx, Tensors& t) { step(z, ctx, t, t["state_out"]); };
  return step_case(std::move(c));
}

// One token in every dtype.
std::vector<OpCase> step_cases() {
  std::vector<OpCase> all;
  const auto add = [&](const Sizes& z) { all.push_back(selective_scan_step_case(z)); };
  for (const std::int64_t rank : {0, 5, 48}) {
    add({1, 1, 24, 16, Disc::Mamba, false, true, false, rank});
    add({9, 1, 70, 16, Disc::Mamba, false, true, false, rank});
    add({8, 1, 37, 32, Disc::Mamba, false, true, false, rank});
    add({17, 1, 33, 64, Disc::Mamba, false, true, false, rank});
    add({32, 1, 21, 128, Disc::Mamba, false, true, false, rank});
    add({3, 1, 7, 5, Disc::Zoh, true, true, false, rank});
  }
  return all;
}
const RegisterOpCases kRegisterSteps(step_cases());

std::vector<OpCase> bench_cases() {
  std::vector<OpCase> all;
  for (const Sizes& z :
       {Sizes{8, 2048, 1536, 16}, Sizes{8, 2048, 5120, 16}, Sizes{1, 65536, 1536, 16},
        Sizes{64, 256, 1536, 16}, Sizes{8, 2048, 1536, 64}})
    all.push_back(selective_scan_case(z));
  // Of Mamba-130m and 1.4b, whose step also projects dt.
  for (const std::int64_t batch : {1, 32})
    for (const auto& [channels, rank] : {std::pair{1536, 48}, {4096, 128}})
      all.push_back(selective_scan_step_case(
          {batch, 1, channels, 16, Disc::Mamba, false, true, false, rank}));
  return all;
}
const RegisterBenchCases kRegisterBench(bench_cases());

}  // namespace
}  // namespace lrnn::testing
