#include "lrnn/nn/parameter.hpp"

#include <cmath>

#include <gtest/gtest.h>

namespace lrnn {
namespace {

void add_two(ParameterStore& store) {
  const ParameterScope scope(store, "layer.");
  (scope / "in_proj").add("weight", {3, 5}, init::uniform(0.5));
  scope.add("A_log", {7}, init::constant(2.0), {.weight_decay = false, .keep_float32 = true});
}

TEST(ParameterStore, NamesSlabsAndValues) {
  Context ctx = Context::cpu();
  ParameterStore store;
  add_two(store);
  store.materialize(ctx, DType::float32, 1);
  store.enable_grad(ctx);
  EXPECT_EQ(store.slabs().size(), 1U);
  EXPECT_EQ(store.numel(), 22);
  for (const double v : ctx.to_host_as_double(store.at("layer.A_log").value)) EXPECT_EQ(v, 2.0);
  for (const double v : ctx.to_host_as_double(store.at("layer.in_proj.weight").value))
    EXPECT_LE(std::abs(v), 0.5);
  for (const double g : ctx.to_host_as_double(store.at("layer.A_log").grad)) EXPECT_EQ(g, 0.0);
  EXPECT_THROW(static_cast<void>(store.at("layer.missing")), InvalidArgument);
}

TEST(ParameterStore, IslandsStayFloat32) {
  Context ctx = Context::cpu();
  ParameterStore store;
  add_two(store);
  store.materialize(ctx, DType::bfloat16, 1);
  EXPECT_EQ(store.at("layer.A_log").value.dtype(), DType::float32);
  EXPECT_EQ(store.at("layer.in_proj.weight").value.dtype(), DType::bfloat16);
}

// Gradients turned on while memory is redirected outlive the resource it was redirected to.
TEST(ParameterStore, GradientsLiveWhereTheValuesDo) {
  Context ctx = Context::cpu();
  ParameterStore store;
  add_two(store);
  store.materialize(ctx, DType::bfloat16, 1);
  {
    StatisticsResource passing(ctx.memory());
    const Context::MemoryScope scope(ctx, passing);
    store.enable_grad(ctx);
    EXPECT_EQ(passing.stats().upstream_allocations, 0U);
    EXPECT_EQ(&ctx.memory(), &passing);
  }
  store.zero_grad(ctx);
  for (const double g : ctx.to_host_as_double(store.at("layer.A_log").grad)) EXPECT_EQ(g, 0.0);
}

// A value depends on seed and name alone, not on what was added before it.
TEST(ParameterStore, ValuesDoNotDependOnOrder) {
  Context ctx = Context::cpu();
  ParameterStore one, two;
  one.add("a", {4}, init::normal(1.0));
  one.add("b", {4}, init::normal(1.0));
  two.add("b", {4}, init::normal(1.0));
  one.materialize(ctx, DType::float64, 9);
  two.materialize(ctx, DType::float64, 9);
  EXPECT_EQ(ctx.to_host<double>(one.at("b").value), ctx.to_host<double>(two.at("b").value));
  EXPECT_NE(ctx.to_host<double>(one.at("a").value), ctx.to_host<double>(one.at("b").value));
}

TEST(ParameterStore, RefusesMisuse) {
  Context ctx = Context::cpu();
  ParameterStore store;
  store.add("a", {4}, init::constant(0));
  EXPECT_THROW(store.add("a", {4}, init::constant(0)), InternalError);
  EXPECT_THROW(store.materialize(ctx, DType::int32, 0), DTypeError);
  store.materialize(ctx, DType::float32, 0);
  EXPECT_THROW(store.add("b", {4}, init::constant(0)), InternalError);
}

}  // namespace
}  // namespace lrnn
