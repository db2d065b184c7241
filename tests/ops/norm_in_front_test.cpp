/// Ops and mixers that are handed the norm in front of them refuse one that makes something else.
#include <cmath>

#include <gtest/gtest.h>

#include "lrnn/lrnn.hpp"
#include "lrnn/ops/projected_gate.hpp"

namespace lrnn {
namespace {

class NormInFront : public ::testing::Test {
 protected:
  static constexpr std::int64_t kWidth = 8;
  Context ctx = Context::cpu();
  Tensor hidden = ctx.zeros({2, 1, kWidth}, DType::float32);
  Tensor weight = ctx.zeros({kWidth}, DType::float32);
  Tensor x = ctx.zeros({2, 1, kWidth}, DType::float32);
  Tensor other = ctx.zeros({2, 1, kWidth}, DType::float32);
  Tensor y = ctx.zeros({2, 1, kWidth}, DType::float32);

  AddNormForward norm_of(Tensor& to) const { return {.x = hidden, .weight = weight, .y = to}; }

  template <class F>
  void expect_refused(const char* who, const F& call) {
    const AddNormForward norm = norm_of(other);
    try {
      call(norm);
      FAIL() << who << " took a norm of something else";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(std::string(who) + ": norm: "), std::string::npos)
          << e.what();
    }
  }
};

TEST_F(NormInFront, OfAnotherTensorIsRefusedByOps) {
  const Tensor projection = ctx.zeros({2, kWidth, kWidth}, DType::float32);
  expect_refused("projected_gate", [&](const AddNormForward& norm) {
    projected_gate(ctx, {.x = x, .weight = projection, .y = y, .norm = &norm});
  });
}

TEST_F(NormInFront, OfAnotherTensorIsRefusedByMixers) {
  for (const MixerType type : {MixerType::LRU, MixerType::S4D}) {
    ParameterStore store;
    const auto mixer =
        make_mixer(type, {}, {.d_model = kWidth, .d_state = 4}, ParameterScope(store, "mixer."));
    store.materialize(ctx, DType::float32, 1);
    const auto state = mixer->make_state(ctx, 2, 1, DType::float32);
    expect_refused("Mixer::step", [&](const AddNormForward& norm) {
      mixer->step(ctx, {.x = x, .y = y, .state = *state, .norm = &norm});
    });
  }
}

// Whether a mixer hands it on or not.
TEST_F(NormInFront, GivesTheStepOfTheNormalisedInput) {
  for (const MixerType type : all_mixer_types()) {
    ParameterStore store;
    const auto mixer =
        make_mixer(type, {}, {.d_model = kWidth, .d_state = 4}, ParameterScope(store, "mixer."));
    store.materialize(ctx, DType::float32, 1);
    std::vector<float> values(2 * kWidth);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
    ctx.copy(hidden, ctx.from_host<float>(hidden.shape(), values));
    ctx.copy(weight, ctx.from_host<float>({kWidth}, std::vector<float>(kWidth, 0.75F)));
    const AddNormForward norm = norm_of(x);
    Tensor expected = ctx.zeros(y.shape(), DType::float32);
    const auto before = mixer->make_state(ctx, 2, 4, DType::float32);
    add_norm_forward(ctx, norm);
    mixer->step(ctx, {.x = x, .y = expected, .state = *before});
    ctx.zero(x);
    const auto state = mixer->make_state(ctx, 2, 4, DType::float32);
    mixer->step(ctx, {.x = x, .y = y, .state = *state, .norm = &norm});
    EXPECT_EQ(ctx.to_host<float>(y), ctx.to_host<float>(expected)) << mixer_name(type);
  }
}

}  // namespace
}  // namespace lrnn
