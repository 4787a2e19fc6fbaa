// Shapes of DeepSeek-family models for tests: the published ones and small ones of each form, and
// the list of tensors that a file of such a shape has.
#pragma once

#include <string_view>
#include <vector>

#include "fathom/model_config.hpp"
#include "support/mini_writer.h"

namespace fathom::test {

// Published configurations (config.json of the releases).
ModelConfig v2_lite_shape();  // DeepSeek-V2-Lite, Coder-V2-Lite: 16 B
ModelConfig v2_shape();       // DeepSeek-V2, Coder-V2: 236 B
ModelConfig v3_shape();       // DeepSeek-V3, R1: 671 B
ModelConfig kimi_k2_shape();  // Kimi-K2: 1 T

// The same forms, small: 3 layers, vocabulary 512, all row lengths but qk_nope_head_dim multiples
// of 256, so that every block type fits.
ModelConfig tiny_v2_lite_shape();
ModelConfig tiny_v2_shape();
ModelConfig tiny_v3_shape();

// "v2-lite", "v2", "v3", "kimi-k2", "tiny-v2-lite", "tiny-v2", "tiny-v3"; "tiny" is tiny-v3.
// Throws for other names.
ModelConfig named_shape(std::string_view name);

// How a GGUF file stores W_kv_b (golden/README.md of the test data tells the whole difference).
//   kOld  attn_kv_b    kMid  attn_kv_b, 2-D attn_k_b, 2-D attn_v_b    kNew  3-D attn_k_b, attn_v_b
enum class GgufLayout { kOld, kMid, kNew };

// All tensors of a GGUF file.  `type` is the name of a DType or "Q4_K_M", llama.cpp's mixture.
// Norms, biases and router weights are F32; where a row length does not fit the type it is
// replaced as llama.cpp does: Q4_K by Q5_0, Q5_K by Q5_1, Q6_K by Q8_0, and at last F16.
std::vector<TensorSpec> gguf_tensors(const ModelConfig&, GgufLayout, std::string_view type);

// All tensors of a Hugging Face checkpoint in F32, F16, BF16 or F8_E4M3.  In F8 the projections
// have a "_scale_inv" of one F32 per 128 x 128 block, embeddings, head, norms and routers are BF16.
std::vector<TensorSpec> hf_tensors(const ModelConfig&, DType);

DType dtype_named(std::string_view name);  // throws for unknown names

}  // namespace fathom::test
