// The tensors that a model's weights would have, from its config.json alone: what lets a plan be
// made for a model that has not been downloaded.  A TensorFile without sources: everything but
// read() works.
//
// 16-bit and quantised types are listed as llama.cpp's converter and quantiser name and type them
// (split attn_k_b and attn_v_b; norms, router and biases in F32), FP8 as the released checkpoints
// (block scales per 128 x 128, norms and embeddings in BF16).
#pragma once

#include <optional>
#include <string>

#include "fathom/config.hpp"
#include "tensor_file.h"

namespace fathom::io {

// Whether `path` is a .json file, or a folder with a config.json and no weights.
bool is_config_only(const std::string& path);

// `type`: what the weights are assumed to be; none: fp8 when quantization_config says so, else
// bf16.  Errors: those of reading and parsing config.json; kFormat for sizes that no machine has.
Result<TensorFile> list_tensors(const std::string& path, std::optional<WeightsType> type);

}  // namespace fathom::io
