// What model files say about themselves: GGUF keys and config.json of a shape.
#pragma once

#include <string>
#include <string_view>

#include "fathom/model_config.hpp"
#include "support/mini_writer.h"
#include "support/model_shapes.h"

namespace fathom::test {

// The keys that llama.cpp's converter writes for this model (layout kNew) or that files of that
// time have, with a tokenizer: 256 bytes, a few merges, bos and eos, [PADn] for the rest.
GgufWriter gguf_metadata(const ModelConfig&, GgufLayout, std::string_view type);

// config.json of a checkpoint in F32, F16, BF16 or F8_E4M3.
std::string hf_config_json(const ModelConfig&, DType dtype);

}  // namespace fathom::test
