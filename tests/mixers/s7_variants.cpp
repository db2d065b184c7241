#include "support/mixer_case.hpp"

namespace lrnn::testing {
namespace {

const RegisterMixerVariants kRegister({
    {.type = MixerType::S7, .name = "defaults", .chunk = 64},
    {.type = MixerType::S7, .name = "J2", .kwargs = {.s7 = {.J = 2}}, .sizes = {{4, 2}, {5, 6}}},
    {.type = MixerType::S7, .name = "own_d_state", .kwargs = {.s7 = {.d_state = 3}}},
});

}  // namespace
}  // namespace lrnn::testing
