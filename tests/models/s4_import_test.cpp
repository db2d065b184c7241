// Read-outs of S4 that lrnnx rewrote in its first forward pass, against those before it.
#include <algorithm>
#include <cmath>
#include <string>

#include <gtest/gtest.h>

#include "lrnn/io/safetensors.hpp"
#include "lrnn/mixers/registry.hpp"
#include "lrnn/models/lm_config.hpp"

#include "io/golden.hpp"

namespace lrnn {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kLayer = "backbone.layers.0.mixer.";
constexpr std::string_view kKernel = "layer.kernel.";

// The tensors of layer 0 as a checkpoint hands them over: lrnnx's kernel has second names.
HostTensors read_layer(const fs::path& path) {
  const auto file = SafetensorsFile::open(path);
  HostTensors tensors;
  for (const auto& [name, entry] : file.entries())
    if (name.starts_with(kLayer)) {
      std::string own = name.substr(kLayer.size());
      if (own.starts_with(kKernel)) own = own.substr(kKernel.size());
      tensors.insert_or_assign(own, HostTensor{entry.shape, file.read_doubles(entry)});
    }
  return tensors;
}

struct S4Import : ::testing::TestWithParam<std::string> {
  HostTensors before;
  HostTensors after;  // before, with what forward changed
  ParameterStore store;
  std::unique_ptr<Mixer> mixer;

  void SetUp() override {
    const fs::path directory = fs::path(LRNN_GOLDEN_DIR) / GetParam();
    before = read_layer(directory / "model.safetensors");
    after = before;
    for (auto& [name, tensor] : read_layer(directory / "model_after.safetensors"))
      after.insert_or_assign(name, std::move(tensor));
    const auto config = config_from_json(detail::read_golden_case(directory).constructor,
                                         {.constructor_arguments = true});
    const MixerBuild build{.d_model = config.d_model, .d_state = config.d_state};
    mixer = make_mixer(MixerType::S4, config.layer_kwargs(0), build, ParameterScope(store, ""));
  }
};

TEST_P(S4Import, RestoresTheReadOut) {
  ASSERT_GT(after.at("l_kernel").values.at(0), 0);
  ASSERT_NE(after.at("C").values, before.at("C").values);
  mixer->import_tensors(after);
  for (const auto& [name, tensor] : after) EXPECT_NE(store.find(name), nullptr) << name;
  const auto& want = before.at("C").values;
  const auto& got = after.at("C").values;
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i)
    EXPECT_NEAR(got[i], want[i], 1e-9 * (1 + std::abs(want[i]))) << i;
}

TEST_P(S4Import, RefusesAnImpossibleLength) {
  after.at("l_kernel").values.at(0) = -1;
  EXPECT_THROW(mixer->import_tensors(after), ConfigError);
}

TEST_P(S4Import, KeepsAReadOutThatIsAsItWas) {
  const auto want = before.at("C").values;
  EXPECT_EQ(before.at("l_kernel").values, std::vector<double>{0});
  mixer->import_tensors(before);
  EXPECT_EQ(before.at("C").values, want);
}

INSTANTIATE_TEST_SUITE_P(Lrnnx, S4Import,
                         ::testing::Values("s4_doubling", "s4_channels2", "s4_rank3", "s4_gate"));

}  // namespace
}  // namespace lrnn
