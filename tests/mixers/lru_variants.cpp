#include "lrnn/ops/diagonal_scan.hpp"

#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

const RegisterMixerVariants kRegister({
    {.type = MixerType::LRU, .name = "defaults", .chunk = kDiagonalScanChunk},
    {.type = MixerType::LRU,
     .name = "slow_ring",
     .kwargs = {.lru = {.r_min = 0.99, .r_max = 0.9999, .max_phase = 0.3}},
     .chunk = kDiagonalScanChunk},
    {.type = MixerType::LRU, .name = "own_d_state", .kwargs = {.lru = {.d_state = 17}}},
});

}  // namespace
}  // namespace lrnn::testing
