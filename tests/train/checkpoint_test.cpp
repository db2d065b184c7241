#include "lrnn/train/checkpoint.hpp"

#include <chrono>
#include <csignal>
#include <fstream>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "lrnn/io/file.hpp"
#include "lrnn/io/safetensors.hpp"

#include "io/manifest.hpp"
#include "train/bigram_model.hpp"

namespace lrnn::testing {
namespace {

namespace fs = std::filesystem;

struct TrainingRun {
  explicit TrainingRun(Context& ctx, DType dtype = DType::float32)
      : model(ctx, 5, dtype), optimizer(ctx, model.parameters(), {}) {}
  void step(Context& ctx, std::uint64_t seed) {
    Rng rng(seed);
    for (Parameter& p : model.parameters()) {
      std::vector<double> g(static_cast<std::size_t>(p.shape.numel()));
      for (double& e : g) e = rng.normal();
      ctx.write_from_host(p.grad, g);
    }
    optimizer.step(ctx);
  }
  fs::path save(Context& ctx, const fs::path& directory, std::int64_t step, std::int64_t keep = 0) {
    return save_checkpoint(ctx,
                           {.directory = directory,
                            .step = step,
                            .settings = {{"seed", "3"}},
                            .files = {{"config.json", "{}\n"}},
                            .keep = keep},
                           model.parameters(), optimizer);
  }
  std::vector<std::vector<double>> everything(Context& ctx) {
    return testing::everything(ctx, model.parameters(), optimizer);
  }
  BigramModel model;
  AdamW optimizer;
};

void flip_byte(const fs::path& path, std::int64_t offset) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  const auto end = static_cast<std::int64_t>(fs::file_size(path));
  const std::int64_t at = offset < 0 ? end + offset : offset;
  file.seekg(at);
  const auto byte = static_cast<char>(file.get() ^ 1);
  file.seekp(at);
  file.put(byte);
}

void expect_comes_back(Context& ctx, DType dtype) {
  const ScratchDirectory scratch("checkpoint");
  TrainingRun one(ctx, dtype);
  one.step(ctx, 1);
  one.step(ctx, 2);
  one.save(ctx, scratch.path(), 2);
  const auto search = find_checkpoint(scratch.path());
  ASSERT_TRUE(search.found);
  EXPECT_TRUE(search.rejected.empty());
  EXPECT_EQ(search.found->step, 2);
  EXPECT_EQ(search.found->settings.at("seed"), "3");
  TrainingRun two(ctx, dtype);
  EXPECT_NE(two.everything(ctx), one.everything(ctx));
  load_checkpoint(ctx, search.found->path, two.model.parameters(), two.optimizer);
  EXPECT_EQ(two.everything(ctx), one.everything(ctx));
  one.step(ctx, 3);
  two.step(ctx, 3);
  EXPECT_EQ(two.everything(ctx), one.everything(ctx));
}

TEST(Checkpoint, ComesBackBitwise) {
  Context ctx = Context::cpu();
  expect_comes_back(ctx, DType::float32);
  expect_comes_back(ctx, DType::float64);
  if (Context::cuda_device_count() == 0) return;
  Context cuda = Context::cuda();
  expect_comes_back(cuda, DType::float32);
  expect_comes_back(cuda, DType::bfloat16);
}

TEST(Checkpoint, HoldsTheModelUnderItsNames) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  const fs::path path = run.save(ctx, scratch.path(), 12);
  EXPECT_EQ(path.filename(), "step-00000012");
  EXPECT_EQ(read_text_file(scratch.path() / "latest"), "step-00000012\n");
  EXPECT_EQ(read_text_file(path / "config.json"), "{}\n");
  EXPECT_EQ(SafetensorsFile::open(path / "model.safetensors").names(),
            (std::vector<std::string>{"table", "unused"}));
}

TEST(Checkpoint, NoDirectoryHoldsNoCheckpoint) {
  const ScratchDirectory scratch("checkpoint");
  EXPECT_FALSE(find_checkpoint(scratch.path()).found);
  fs::create_directories(scratch.path() / "step-x");
  fs::create_directories(scratch.path() / "other");
  const auto search = find_checkpoint(scratch.path());
  EXPECT_FALSE(search.found);
  EXPECT_TRUE(search.rejected.empty());
}

// A run killed while writing leaves a temporary directory: it is passed over, and removed when the
// next checkpoint is written.
TEST(Checkpoint, HalfWrittenDirectoriesAreIgnored) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  const fs::path good = run.save(ctx, scratch.path(), 1);
  const fs::path half = scratch.path() / ".tmp-step-2-123";
  fs::create_directories(half);
  fs::copy_file(good / "model.safetensors", half / "model.safetensors");
  const auto search = find_checkpoint(scratch.path());
  ASSERT_TRUE(search.found);
  EXPECT_EQ(search.found->step, 1);
  EXPECT_TRUE(search.rejected.empty());
  run.save(ctx, scratch.path(), 3);
  EXPECT_FALSE(fs::exists(half));
}

// Every kind of damage to the newest checkpoint is noticed and named, and the one before is taken.
TEST(Checkpoint, DamageFallsBackToTheOneBefore) {
  Context ctx = Context::cpu();
  struct Damage {
    const char* what;
    const char* names;  // must occur in the reason
    std::function<void(const fs::path&)> apply;
  };
  const std::vector<Damage> damages = {
      {"bit in the manifest", "manifest.json",
       [](const fs::path& p) { flip_byte(p / "manifest.json", 60); }},
      {"short manifest", "manifest.json",
       [](const fs::path& p) {
         fs::resize_file(p / "manifest.json", fs::file_size(p / "manifest.json") / 2);
       }},
      {"empty manifest", "manifest.json",
       [](const fs::path& p) { fs::resize_file(p / "manifest.json", 0); }},
      {"no manifest", "manifest.json", [](const fs::path& p) { fs::remove(p / "manifest.json"); }},
      {"another step's manifest", "manifest.json",
       [](const fs::path& p) {
         fs::copy_file(p.parent_path() / "step-00000001" / "manifest.json", p / "manifest.json",
                       fs::copy_options::overwrite_existing);
       }},
      {"last bit of the weights", "model.safetensors",
       [](const fs::path& p) { flip_byte(p / "model.safetensors", -1); }},
      {"short weights", "model.safetensors",
       [](const fs::path& p) { fs::resize_file(p / "model.safetensors", 100); }},
      {"no optimizer", "optimizer.safetensors",
       [](const fs::path& p) { fs::remove(p / "optimizer.safetensors"); }},
      {"bit in the configuration", "config.json",
       [](const fs::path& p) { flip_byte(p / "config.json", 0); }},
  };
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.what);
    const ScratchDirectory scratch("checkpoint");
    TrainingRun run(ctx);
    run.save(ctx, scratch.path(), 1);
    damage.apply(run.save(ctx, scratch.path(), 2));
    const auto search = find_checkpoint(scratch.path());
    ASSERT_TRUE(search.found);
    EXPECT_EQ(search.found->step, 1);
    ASSERT_EQ(search.rejected.size(), 1U);
    EXPECT_NE(search.rejected[0].find("step-00000002"), std::string::npos) << search.rejected[0];
    EXPECT_NE(search.rejected[0].find(damage.names), std::string::npos) << search.rejected[0];
    // The step is written again in place of the damaged one.
    run.save(ctx, scratch.path(), 2);
    EXPECT_EQ(find_checkpoint(scratch.path()).found->step, 2);
  }
}

// A process that does nothing but write checkpoints is killed at arbitrary moments. Whatever it
// leaves, the newest intact checkpoint is found without a complaint and holds the values of its
// step.
TEST(Checkpoint, SurvivesBeingKilled) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  Parameter& table = run.model.parameters().at("table");
  const auto write_step = [&](std::int64_t step) {
    ctx.write_from_host(table.value, std::vector<double>(25, static_cast<double>(step)));
    run.save(ctx, scratch.path(), step, 2);
  };
  const auto write_until_killed = [&](std::int64_t step) {
    try {
      for (;; ++step) write_step(step);
    } catch (...) {
      ::_exit(1);
    }
  };
  const auto start = std::chrono::steady_clock::now();
  write_step(1);
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  Rng rng(8);
  for (int round = 0; round < 12; ++round) {
    const std::int64_t first = find_checkpoint(scratch.path()).found->step + 1;
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) write_until_killed(first);
    ::usleep(static_cast<unsigned>(1e6 * seconds * rng.uniform(0.2, 8.0)));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    const auto search = find_checkpoint(scratch.path());
    ASSERT_TRUE(search.found);
    EXPECT_TRUE(search.rejected.empty()) << search.rejected[0];
    EXPECT_GE(search.found->step, first - 1);
    if (search.found->step < first) seconds *= 1.5;  // the machine is busier than it was
    TrainingRun loaded(ctx);
    load_checkpoint(ctx, search.found->path, loaded.model.parameters(), loaded.optimizer);
    for (const double v : ctx.to_host_as_double(loaded.model.parameters().at("table").value))
      ASSERT_EQ(v, static_cast<double>(search.found->step));
  }
  EXPECT_GT(find_checkpoint(scratch.path()).found->step, 1);
}

TEST(Checkpoint, ManifestNamesStayInside) {
  detail::Manifest manifest{.step = 1, .settings = {}, .files = {{"../model", 1, 2}}};
  EXPECT_THROW(detail::manifest_from_json("m", detail::manifest_to_json(manifest)), IoError);
  manifest.files[0].name = "model";
  const auto back = detail::manifest_from_json("m", detail::manifest_to_json(manifest));
  EXPECT_EQ(back.files.at(0).crc32, 2U);
  for (const char* text : {"", "{}", "[]", "3", "{\"checkpoint\": 4, \"crc32\": 5}",
                           "{\"checkpoint\": {}, \"crc32\": \"5\"}"})
    EXPECT_THROW(detail::manifest_from_json("m", text), IoError) << text;
}

// The check value of the CRC catalogues for "123456789", and a file longer than the read buffer
// against the same bytes split at an odd place is the same number.
TEST(Checkpoint, ChecksumIsCrc32) {
  const ScratchDirectory scratch("checkpoint");
  fs::create_directories(scratch.path());
  write_text_file(scratch.path() / "a", "123456789");
  EXPECT_EQ(detail::describe_file(scratch.path(), "a").crc32, 0xCBF43926U);
  write_text_file(scratch.path() / "b", "The quick brown fox jumps over the lazy dog");
  EXPECT_EQ(detail::describe_file(scratch.path(), "b").crc32, 0x414FA339U);
  write_text_file(scratch.path() / "c", "");
  EXPECT_EQ(detail::describe_file(scratch.path(), "c").crc32, 0U);
}

TEST(Checkpoint, KeepsTheNewest) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  for (const std::int64_t step : {1, 2, 3, 4}) run.save(ctx, scratch.path(), step, 2);
  EXPECT_FALSE(fs::exists(scratch.path() / "step-00000002"));
  EXPECT_TRUE(fs::exists(scratch.path() / "step-00000003"));
  EXPECT_TRUE(fs::exists(scratch.path() / "step-00000004"));
}

// A checkpoint of another model changes nothing.
TEST(Checkpoint, RefusesAnotherModel) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  const fs::path path = run.save(ctx, scratch.path(), 1);
  BigramModel other(ctx, 6);
  AdamW optimizer(ctx, other.parameters(), {});
  const auto before = everything(ctx, other.parameters(), optimizer);
  EXPECT_THROW(load_checkpoint(ctx, path, other.parameters(), optimizer), IoError);
  EXPECT_EQ(everything(ctx, other.parameters(), optimizer), before);
  TrainingRun wide(ctx, DType::float64);
  EXPECT_THROW(load_checkpoint(ctx, path, wide.model.parameters(), wide.optimizer), IoError);
}

TEST(Checkpoint, FailuresLeaveNothingBehind) {
  Context ctx = Context::cpu();
  const ScratchDirectory scratch("checkpoint");
  TrainingRun run(ctx);
  EXPECT_THROW(
      save_checkpoint(
          ctx, {.directory = scratch.path(), .step = 1, .files = {{"missing/config.json", "{}"}}},
          run.model.parameters(), run.optimizer),
      IoError);
  EXPECT_TRUE(fs::is_empty(scratch.path()));
  fs::create_directories(scratch.path());
  write_text_file(scratch.path() / "file", "");
  EXPECT_THROW(run.save(ctx, scratch.path() / "file", 1), IoError);
}

}  // namespace
}  // namespace lrnn::testing
