#include <cmath>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "lrnn/core/graph.hpp"

namespace lrnn {
namespace {

TEST(ArenaResource, SameRequestsSameAddresses) {
  Context ctx = Context::cpu();
  ArenaResource arena(ctx.memory(), 1 << 16, ctx.stream());
  const Context::MemoryScope scope(ctx, arena);
  const void* first = nullptr;
  {
    const Tensor t = ctx.empty({3, 5}, DType::float32);
    first = t.view().raw();
    EXPECT_THROW(arena.reset(), InternalError);
  }
  arena.reset();
  EXPECT_EQ(ctx.empty({3, 5}, DType::float32).view().raw(), first);
}

// Host memory with a limit, to exercise exhaustion without exhausting anything.
class LimitedResource final : public MemoryResource {
 public:
  explicit LimitedResource(std::size_t limit) : limit_(limit) {}
  void* allocate(std::size_t bytes, Stream) override {
    LRNN_CHECK(used_ + bytes <= limit_, OutOfMemory, "limited: ", bytes, " bytes requested");
    void* ptr = std::aligned_alloc(kAlignment, bytes);
    used_ += bytes;
    return ptr;
  }
  void deallocate(void* ptr, std::size_t bytes, Stream) noexcept override {
    std::free(ptr);
    used_ -= bytes;
  }
  [[nodiscard]] Device device() const noexcept override { return {}; }

 private:
  std::size_t limit_;
  std::size_t used_ = 0;
};

TEST(CachingResource, ReusesFreedBlocks) {
  CachingResource memory(std::make_unique<LimitedResource>(4096));
  void* const first = memory.allocate(1000, {});
  memory.deallocate(first, 1000, {});
  void* const second = memory.allocate(600, {});  // same size class: 1024
  EXPECT_EQ(second, first);
  EXPECT_EQ(memory.stats().upstream_allocations, 1U);
  memory.deallocate(second, 600, {});
}

TEST(CachingResource, EmptiesItsCacheBeforeGivingUp) {
  CachingResource memory(std::make_unique<LimitedResource>(4096));
  memory.deallocate(memory.allocate(2048, {}), 2048, {});
  void* const large = memory.allocate(4096, {});  // fits only once the cached 2048 went back
  EXPECT_EQ(memory.stats().bytes_cached, 0U);
  EXPECT_EQ(memory.stats().bytes_in_use, 4096U);
  EXPECT_THROW(static_cast<void>(memory.allocate(256, {})), OutOfMemory);
  EXPECT_EQ(memory.stats().bytes_in_use, 4096U);
  memory.deallocate(large, 4096, {});
}

TEST(StatisticsResource, CountsPeakAndUse) {
  Context ctx = Context::cpu();
  StatisticsResource memory(ctx.memory());
  const Context::MemoryScope scope(ctx, memory);
  {
    const Tensor a = ctx.empty({64}, DType::float32);
    const Tensor b = ctx.empty({32}, DType::float64);
    EXPECT_EQ(memory.stats().bytes_in_use, 512U);
  }
  EXPECT_EQ(memory.stats().bytes_in_use, 0U);
  EXPECT_EQ(memory.stats().peak_bytes_in_use, 512U);
  memory.reset_peak();
  EXPECT_EQ(memory.stats().peak_bytes_in_use, 0U);
}

void write_element(Context ctx, std::int64_t index, std::size_t violations) {
  GuardResource guard(ctx.memory(), ctx.runtime());
  {
    const Context::MemoryScope scope(ctx, guard);
    Tensor t = ctx.empty({7}, DType::float32);
    EXPECT_TRUE(std::isnan(ctx.to_host<float>(t)[3]));
    float* const outside = t.view().data<float>() + index;
    const float one = 1.0F;
    const MutableTensorView element(outside, {1}, {1}, DType::float32, ctx.device());
    ctx.write_from_host(element, std::vector<double>{one});
  }
  EXPECT_EQ(guard.violations(), violations);
}

TEST(GuardResource, FindsWritesOutsideABlock) {
  for (const std::int64_t inside : {0, 6}) write_element(Context::cpu(), inside, 0);
  for (const std::int64_t outside : {-1, 7, 63, 70}) write_element(Context::cpu(), outside, 1);
}
TEST(GuardResource, FindsWritesOutsideABlockOnCuda) {
  if (Context::cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  write_element(Context::cuda(), 6, 0);
  write_element(Context::cuda(), 7, 1);
}

TEST(Context, ConvertsOnTheWayInAndOut) {
  Context ctx = Context::cpu();
  const std::vector<double> values = {0.0, -1.5, 3.140625, 1e30};
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
    const Tensor t = ctx.from_host_as({4}, dtype, values);
    const auto back = ctx.to_host_as_double(t);
    EXPECT_EQ(back[1], -1.5);
    EXPECT_EQ(back[2], 3.140625) << dtype;  // 201 / 64: exact in eight bits
    EXPECT_NEAR(back[3] / 1e30, 1.0, 0x1p-8) << dtype;
  }
  EXPECT_THROW(static_cast<void>(ctx.from_host_as({3}, DType::float32, values)), ShapeError);
}

TEST(Context, IsThatOfTheDeviceAskedFor) {
  EXPECT_TRUE(Context::cpu().device().is_cpu());
  const int count = Context::cuda_device_count();
  EXPECT_EQ(Context::best().device().is_cuda(), count > 0);
  for (int i = 0; i < count; ++i) EXPECT_EQ(Context::cuda(i).device().index, i);
  EXPECT_THROW(static_cast<void>(Context::cuda(count)), DeviceError);
  EXPECT_THROW(static_cast<void>(Context::cuda(-1)), DeviceError);
}

TEST(BFloat16, RoundsToNearestEven) {
  EXPECT_EQ(to_float(to_bfloat16(1.0F + 0x1p-8F)), 1.0F);  // a tie goes to even
  EXPECT_EQ(to_float(to_bfloat16(1.0F + 3 * 0x1p-8F)), 1.0F + 0x1p-6F);
  EXPECT_EQ(to_float(to_bfloat16(1.0F + 0x1p-8F + 0x1p-20F)), 1.0F + 0x1p-7F);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::nanf("")))));
  EXPECT_TRUE(std::isinf(to_float(to_bfloat16(3.4e38F))));
}

TEST(TensorView, RefusesWhatItCannotView) {
  Context ctx = Context::cpu();
  const Tensor t = ctx.zeros({2, 6}, DType::float32);
  EXPECT_FALSE(t.view().slice(1, 0, 3).is_contiguous());
  EXPECT_TRUE(t.view().slice(0, 1, 1).slice(1, 2, 3).is_contiguous());
  EXPECT_THROW(static_cast<void>(t.view().slice(1, 4, 3)), ShapeError);
  EXPECT_THROW(static_cast<void>(t.view().slice(1, 0, 3).reshape({6})), ShapeError);
  EXPECT_THROW(static_cast<void>(t.view().reshape({5})), ShapeError);
  EXPECT_THROW(static_cast<void>(t.view().data<double>()), DTypeError);
  EXPECT_THROW(Shape({1, 1, 1, 1, 1, 1, 1}), ShapeError);
}

TEST(Graph, ReplaysOnTheCpu) {
  Context ctx = Context::cpu();
  int calls = 0;
  Graph graph = Graph::capture(ctx, [&] { ++calls; });
  EXPECT_EQ(calls, 0);
  graph.launch();
  graph.launch();
  EXPECT_EQ(calls, 2);
}

}  // namespace
}  // namespace lrnn
