// What must hold for every TensorFile that a reader hands out; shared by the fuzz targets of the
// two weight formats.  A violation traps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "lib/io/tensor_file.h"

namespace fathom::test {

inline void require(bool condition) {
  if (!condition) __builtin_trap();
}

inline std::shared_ptr<io::ByteSource> fuzz_source(const uint8_t* data, size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  return io::memory_source("fuzz", std::vector<std::byte>(bytes, bytes + size));
}

inline void check_ends(const std::string& text, const std::vector<uint32_t>& ends) {
  uint32_t at = 0;
  for (const uint32_t end : ends) require(std::exchange(at, end) <= end);
  require(at == text.size());
}

inline void check_tensor_file(const Result<io::TensorFile>& result) {
  if (!result.ok()) {
    require(!result.status().message().empty());
    require(result.status().code() != Code::kInternal && result.status().code() != Code::kOk);
    return;
  }
  const io::TensorFile& file = *result;
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    const io::TensorInfo& tensor = file.tensors()[i];
    require(file.find(tensor.name) == &tensor);
    require(i == 0 || file.tensors()[i - 1].name < tensor.name);
    require(tensor.n_dims >= 1 && tensor.n_dims <= 4 && tensor.bytes > 0);
    require(tensor.bytes ==
            tensor.elements() / tensor.cols() * row_bytes(tensor.dtype, tensor.cols()));
    std::byte byte;
    require(file.read(tensor, 0, std::span(&byte, 1)).ok());
    require(file.read(tensor, tensor.bytes - 1, std::span(&byte, 1)).ok());
    require(!file.read(tensor, tensor.bytes, std::span(&byte, 1)).ok());
  }
  const io::TokenizerSource& tokenizer = file.tokenizer();
  check_ends(tokenizer.pieces, tokenizer.piece_end);
  check_ends(tokenizer.merges, tokenizer.merge_end);
  require(tokenizer.token_type.empty() || tokenizer.piece_end.empty() ||
          tokenizer.token_type.size() == tokenizer.piece_end.size());
}

// What the model's code trusts.
inline void check_model_config(const ModelConfig& c) {
  require(c.vocab_size > 0 && c.hidden_size > 0 && c.num_hidden_layers > 0);
  require(c.num_attention_heads > 0 && c.kv_lora_rank > 0 && c.q_lora_rank >= 0);
  require(c.qk_nope_head_dim > 0 && c.v_head_dim > 0);
  require(c.qk_rope_head_dim > 0 && c.qk_rope_head_dim % 2 == 0);
  require(c.num_attention_heads * c.qk_head_dim() <= int64_t{1} << 30);
  require(c.first_k_dense_replace >= 0 && c.first_k_dense_replace <= c.num_hidden_layers);
  require(c.rms_norm_eps > 0 && c.rope_theta >= 1 && c.yarn.factor >= 1);
  require(c.bos_token_id >= -1 && c.bos_token_id < c.vocab_size);
  require(c.eos_token_id >= -1 && c.eos_token_id < c.vocab_size);
  require(c.is_moe_layer(0) || c.intermediate_size > 0);
  if (c.n_routed_experts == 0) return;
  require(c.num_experts_per_tok > 0 && c.num_experts_per_tok <= c.n_routed_experts);
  require(c.n_group > 0 && c.n_routed_experts % c.n_group == 0);
  require(c.topk_group > 0 && c.topk_group <= c.n_group);
  require(c.topk_group * (c.n_routed_experts / c.n_group) >= c.num_experts_per_tok);
  require(c.routed_scaling_factor > 0 && c.n_shared_experts >= 0);
}

}  // namespace fathom::test
