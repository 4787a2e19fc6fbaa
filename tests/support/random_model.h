// Random models in both file formats: weights that keep activations near 1, so that a forward pass
// is meaningful.  Three kinds of bytes:
//
//   values  every weight is a function of (seed, tensor, index), an 8-bit integer times a power of
//           two: exact in F32, BF16 and F16.  All forms of one model (formats, layouts, element
//           types) are the same model up to quantisation.  Types: F32, F16, BF16, Q8_0, Q4_0 and
//           F8_E4M3 with scales.  The tensor at hand is kept in memory.
//   blocks  random valid blocks written directly, any weight type, in bounded memory, at the speed
//           of the disk; every form is a different model.
//   holes   no data at all: files of true size for tests that read headers only.
//
// Failures throw std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fathom/model_config.hpp"
#include "support/mini_writer.h"
#include "support/model_shapes.h"

namespace fathom::test {

enum class Contents { kValues, kBlocks, kHoles };

struct GgufOptions {
  GgufLayout layout = GgufLayout::kNew;
  std::string type = "F32";  // a DType's name, or "Q4_K_M"
  Contents contents = Contents::kValues;
  uint64_t seed = 1;
};

void write_gguf_model(ByteSink&, const ModelConfig&, const GgufOptions&);
void write_gguf_model(const std::string& path, const ModelConfig&, const GgufOptions&);
std::vector<std::byte> gguf_model(const ModelConfig&, const GgufOptions&);  // in memory

struct HfOptions {
  DType dtype = DType::kBF16;  // F32, F16, BF16, F8_E4M3
  Contents contents = Contents::kValues;
  uint64_t seed = 1;
  int64_t shard_bytes = int64_t{4} << 30;  // a new file starts when one has this much
};

// A folder with config.json, model.safetensors or its shards and index; no tokenizer.
// The folder is created; files of other names in it are left alone.
void write_hf_model(const std::string& folder, const ModelConfig&, const HfOptions&);

}  // namespace fathom::test
