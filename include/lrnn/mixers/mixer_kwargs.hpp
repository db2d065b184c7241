/// Options per mixer type: the typed form of lrnnx's `mixer_kwargs` dictionary.
#pragma once

#include "lrnn/mixers/attn.hpp"
#include "lrnn/mixers/centaurus.hpp"
#include "lrnn/mixers/lru.hpp"
#include "lrnn/mixers/mamba.hpp"
#include "lrnn/mixers/rglru.hpp"
#include "lrnn/mixers/s4.hpp"
#include "lrnn/mixers/s4d.hpp"
#include "lrnn/mixers/s5.hpp"
#include "lrnn/mixers/s7.hpp"

namespace lrnn {

struct MixerKwargs {
  LruConfig lru = {};
  S4Config s4 = {};
  S4dConfig s4d = {};
  S5Config s5 = {};
  CentaurusConfig centaurus = {};
  MambaConfig mamba = {};
  RglruConfig rglru = {};
  S7Config s7 = {};
  AttentionConfig attn = {};
};

}  // namespace lrnn
