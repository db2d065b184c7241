// Saving over what was loaded, and writes that fail.

#include <csignal>
#include <fstream>
#include <iterator>
#include <sys/resource.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/train/checkpoint.hpp"

namespace lrnn {
namespace {

using enum MixerType;
namespace fs = std::filesystem;

// While it lives, a file that grows beyond `bytes` fails to be written, as on a full disk.
class FullDisk {
 public:
  explicit FullDisk(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  ~FullDisk() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  void (*handler_)(int);
  rlimit before_{};
};

class Saving : public ::testing::Test {
 protected:
  using Files = std::map<std::string, std::string>;

  void SetUp() override { fs::create_directories(folder_); }
  void TearDown() override { fs::remove_all(folder_); }

  static LRNNLMHeadConfig config() {
    return {
        .d_model = 8, .d_state = 4, .n_layer = 2, .vocab_size = 19, .mixer_types = {LRU, Mamba}};
  }
  /// Every file of the folder and below it, by its path.
  [[nodiscard]] Files files() const {
    Files out;
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream in(entry.path(), std::ios::binary);
      out[entry.path().string()] = {std::istreambuf_iterator<char>(in), {}};
    }
    return out;
  }
  std::vector<double> logits(const LRNNLMHeadModel& model) {
    const Tensor ids = ctx_.from_host<std::int32_t>({1, 4}, std::vector<std::int32_t>{3, 1, 4, 1});
    return ctx_.to_host_as_double(model.forward(ctx_, ids).logits);
  }
  template <class F>
  static void expect_full(F&& write) {
    try {
      write();
      ADD_FAILURE() << "written to a full disk";
    } catch (const IoError& e) {
      EXPECT_NE(std::string(e.what()).find("cannot write: File too large"), std::string::npos)
          << e.what();
    }
  }

  Context ctx_ = Context::cpu();
  fs::path folder_ = fs::temp_directory_path() / ("lrnn_saving_" + std::to_string(::getpid()));
};

TEST_F(Saving, OverTheFolderThatWasLoadedKeepsTheModel) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const Files before = files();
  const auto loaded = LRNNLMHeadModel::from_pretrained(ctx_, folder_);
  // A reader that has the file open keeps the file that it opened.
  const auto open = SafetensorsFile::open(folder_ / "model.safetensors");
  const LRNNLMHeadModel other(ctx_, config(), {.seed = 6});
  other.save_pretrained(ctx_, folder_);
  EXPECT_NE(files(), before);
  const auto& entry = open.at("backbone.embedding.weight");
  EXPECT_EQ(open.read_doubles(entry),
            ctx_.to_host_as_double(model.parameters().at(entry.name).value));
  EXPECT_EQ(logits(loaded), logits(model));
  loaded.save_pretrained(ctx_, folder_);
  EXPECT_EQ(files(), before);
}

TEST_F(Saving, AFailedWriteLeavesTheModelThatWasThere) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  model.save_pretrained(ctx_, folder_);
  const Files before = files();
  const auto weights = fs::file_size(folder_ / "model.safetensors");
  const auto text = fs::file_size(folder_ / "config.json");
  LRNNLMHeadConfig wide = config();
  wide.d_model = 16;
  const LRNNLMHeadModel other(ctx_, wide, {.seed = 6});
  // Nothing fits, or the configuration alone, or nearly everything.
  ASSERT_GT(weights, text + 100);
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{text + 100}, weights}) {
    {
      const FullDisk full(bytes);
      expect_full([&] { other.save_pretrained(ctx_, folder_); });
    }
    EXPECT_EQ(files(), before) << bytes;
  }
}

TEST_F(Saving, AFailedWriteLeavesTheCacheThatWasThere) {
  const LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  const auto cache = model.allocate_inference_cache(ctx_, {.batch_size = 2, .max_seqlen = 3});
  cache.save(ctx_, folder_ / "cache");
  const Files before = files();
  {
    const FullDisk full(100);
    expect_full([&] { cache.save(ctx_, folder_ / "cache"); });
  }
  EXPECT_EQ(files(), before);
}

TEST_F(Saving, AFailedWriteLeavesTheTrainingCheckpointBefore) {
  LRNNLMHeadModel model(ctx_, config(), {.seed = 5});
  AdamW optimizer(ctx_, model.parameters(), {});
  const auto save = [&](std::int64_t step) {
    save_checkpoint(ctx_, {.directory = folder_, .step = step, .keep = 1}, model.parameters(),
                    optimizer);
  };
  save(1);
  const Files before = files();
  // The weights fit; the states of the optimizer, twice as large, do not.
  const auto weights = fs::file_size(folder_ / "step-00000001" / "model.safetensors");
  {
    const FullDisk full(weights + 1000);
    expect_full([&] { save(2); });
  }
  EXPECT_EQ(files(), before);
  EXPECT_EQ(find_checkpoint(folder_).found->step, 1);
}

}  // namespace
}  // namespace lrnn
