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
