// Random weights that keep activations near 1, so that a forward pass is meaningful.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fathom/model_config.hpp"
#include "support/mini_writer.h"

namespace fathom::test {

// Values: every weight is a function of (seed, Hugging Face name, index), an 8-bit integer times a
// power of two and so exact in F32, BF16 and F16.  Row-major.
std::vector<float> hf_values(uint64_t seed, const TensorSpec& tensor);

// Values in the types F32, F16, BF16, Q8_0, Q4_0 and F8_E4M3 (with scales), for tensors named as
// in GGUF files of any layout or as in checkpoints.  Holds one tensor in memory.
TensorBytes gguf_value_bytes(const ModelConfig&, uint64_t seed);
TensorBytes hf_value_bytes(uint64_t seed);

// Random valid blocks of any weight type, for tensors of either naming, in bounded memory.
TensorBytes random_block_bytes(uint64_t seed);

// Fills `out` with random valid data whose values have about the given standard deviation.
// `offset` is where `out` begins in the tensor: whole blocks, and for plain types whole groups of
// eight values.  (random_blocks.cc)
void fill_random_blocks(DType dtype, float stddev, uint64_t seed, int64_t offset,
                        std::span<std::byte> out);

}  // namespace fathom::test
