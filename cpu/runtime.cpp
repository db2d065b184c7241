#include "core/runtime.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lrnn::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// One channel of a sequence lies in as many small pages as there are tokens, and each costs a walk
// of the page table. A hint: where there are no huge pages, nothing is lost.
void prefer_huge_pages([[maybe_unused]] void* ptr, [[maybe_unused]] std::size_t size) {
#ifdef __linux__
  if (size >= kHugePage) static_cast<void>(madvise(ptr, size, MADV_HUGEPAGE));
#endif
}

// Large blocks begin at different distances from a page. At the same one, the rows of the operands
// of an op would lie a multiple of 4 KiB apart, where loads wait for stores to other operands and
// few lines find room in the first cache.
class HostResource final : public MemoryResource {
 public:
  void* allocate(std::size_t bytes, Stream) override {
    const std::size_t skew = bytes >= kLarge ? next_skew() : 0;
    const std::size_t alignment = bytes >= kHugePage ? kHugePage
                                  : bytes >= kLarge  ? kPage
                                                     : kAlignment;
    const std::size_t size = (skew + bytes + alignment - 1) / alignment * alignment;
    LRNN_CHECK(size >= bytes, OutOfMemory, "host: ", bytes, " bytes requested");
    void* ptr = std::aligned_alloc(alignment, size == 0 ? alignment : size);
    LRNN_CHECK(ptr != nullptr, OutOfMemory, "host: ", bytes, " bytes requested");
    prefer_huge_pages(ptr, (skew + bytes) / kHugePage * kHugePage);
    return static_cast<std::byte*>(ptr) + skew;
  }
  void deallocate(void* ptr, std::size_t bytes, Stream) noexcept override {
    if (bytes >= kLarge)
      ptr = static_cast<std::byte*>(ptr) - reinterpret_cast<std::uintptr_t>(ptr) % kPage;
    std::free(ptr);
  }
  [[nodiscard]] Device device() const noexcept override { return {}; }

 private:
  static constexpr std::size_t kPage = std::size_t{4} << 10;
  static constexpr std::size_t kLarge = std::size_t{64} << 10;
  std::size_t next_skew() { return blocks_++ * kAlignment % kPage; }

  std::atomic<std::size_t> blocks_ = 0;
};

class CpuRecording final : public Recording {
 public:
  explicit CpuRecording(std::function<void()> work) : work_(std::move(work)) {}
  void launch() override { work_(); }

 private:
  std::function<void()> work_;
};

class CpuStopwatch final : public Stopwatch {
 public:
  void start() override { begin_ = Clock::now(); }
  void stop() override { end_ = Clock::now(); }
  [[nodiscard]] double milliseconds() override {
    return std::chrono::duration<double, std::milli>(end_ - begin_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_;
  Clock::time_point end_;
};

class CpuReadback final : public Readback {
 public:
  explicit CpuReadback(std::size_t bytes) : bytes_(bytes) {}
  void start(TensorView src) override { std::memcpy(bytes_.data(), src.raw(), src.nbytes()); }
  [[nodiscard]] const void* wait() override { return bytes_.data(); }

 private:
  std::vector<std::byte> bytes_;
};

class CpuRuntime final : public Runtime {
 public:
  [[nodiscard]] Device device() const noexcept override { return {}; }
  [[nodiscard]] Stream stream() const noexcept override { return {}; }
  [[nodiscard]] MemoryResource& memory() noexcept override { return memory_; }
  void make_current() override {}
  void synchronize() override {}
  [[nodiscard]] std::unique_ptr<Recording> record(const std::function<void()>& work) override {
    return std::make_unique<CpuRecording>(work);
  }
  [[nodiscard]] std::unique_ptr<Stopwatch> make_stopwatch() override {
    return std::make_unique<CpuStopwatch>();
  }
  void fill_bytes(MutableTensorView dst, unsigned char value) override {
    if (dst.nbytes() > 0) std::memset(dst.raw(), value, dst.nbytes());
  }
  void copy(MutableTensorView dst, TensorView src) override {
    copy_bytes(dst.raw(), src.raw(), src.nbytes());
  }
  void copy_from_host(MutableTensorView dst, const void* src) override {
    copy_bytes(dst.raw(), src, dst.nbytes());
  }
  void copy_to_host(void* dst, TensorView src) override {
    copy_bytes(dst, src.raw(), src.nbytes());
  }
  [[nodiscard]] std::unique_ptr<Readback> make_readback(std::size_t bytes) override {
    return std::make_unique<CpuReadback>(bytes);
  }

 private:
  // Tensors without elements have no address, which memcpy must not be given.
  static void copy_bytes(void* dst, const void* src, std::size_t bytes) {
    if (bytes > 0) std::memcpy(dst, src, bytes);
  }

  CachingResource memory_{std::make_unique<HostResource>()};
};

}  // namespace

std::unique_ptr<Runtime> make_runtime() {
  return std::make_unique<CpuRuntime>();
}

}  // namespace lrnn::cpu
