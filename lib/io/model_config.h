// How the two file formats' facts become a ModelConfig, every value range-checked on the way.
#pragma once

#include <span>
#include <string_view>

#include "fathom/kv_page.hpp"
#include "fathom/model_config.hpp"
#include "fathom/status.hpp"
#include "gguf_header.h"
#include "json.h"
#include "tensor_file.h"

namespace fathom::io {

// From config.json alone.  Errors: kFormat and kUnsupported, with key().
Result<ModelConfig> parse_config_json(std::string_view text);
Result<ModelConfig> config_from_json(const JsonDocument& document);

// From GGUF keys of architecture deepseek2.  `tensors` (sorted by name) tell what old files leave
// unsaid: the size of the vocabulary, whether there is a router bias and an output matrix.
Result<ModelConfig> config_from_gguf(const GgufMetadata& metadata,
                                     std::span<const TensorInfo> tensors);

// The relations between values that hold for both forms.
Status check_config(const ModelConfig& config);

// Whether the embeddings and the output matrix have the shape that the config says; settles
// tie_word_embeddings.  Names as in the format of the tensors.
Status check_vocabulary(const TensorInfo* embeddings, const TensorInfo* output,
                        std::string_view output_name, bool tie_is_known, ModelConfig* config);

// Bounds of single values, shared by both forms: generous against every released model, small
// enough that products of a few of them stay far from overflow.
namespace bound {
inline constexpr int64_t kVocab = int64_t{1} << 24;
inline constexpr int64_t kWidth = int64_t{1} << 20;  // hidden and intermediate sizes, ranks
inline constexpr int64_t kLayers = 4096;
inline constexpr int64_t kHeads = 4096;
inline constexpr int64_t kHeadDim = kKvMaxColumns;  // kernels keep a row on the stack
inline constexpr int64_t kKvColumns = kKvMaxColumns;
inline constexpr int64_t kExperts = 4096;  // backends keep the scores of a token on the stack
inline constexpr int64_t kContext = int64_t{1} << 31;
inline constexpr double kSmallEps = 1e-12, kLargeEps = 0.1;
inline constexpr double kSmallTheta = 1.0, kLargeTheta = 1e12;
inline constexpr double kScale = 1e6;
}  // namespace bound

}  // namespace fathom::io
