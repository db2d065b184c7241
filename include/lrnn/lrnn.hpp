/// The public interface. Ops have headers of their own under lrnn/ops.
#pragma once

#include "lrnn/core/context.hpp"
#include "lrnn/core/graph.hpp"
#include "lrnn/generation/generate.hpp"
#include "lrnn/io/tokenizer.hpp"
#include "lrnn/models/lm_head_model.hpp"
#include "lrnn/models/verify.hpp"
#include "lrnn/ops/argmax.hpp"
#include "lrnn/ops/sample.hpp"
#include "lrnn/train/adamw.hpp"
#include "lrnn/train/lr_schedule.hpp"
#include "lrnn/train/trainer.hpp"
