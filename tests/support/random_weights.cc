// Random weights; contracts in random_weights.h.
#include "support/random_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "fathom/quant.hpp"

namespace fathom::test {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what);
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}
bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// FNV-1a of the name, so that a tensor's values do not depend on its place in the file.
uint64_t tensor_seed(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u ^ seed * 0x9e3779b97f4a7c15u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

// What kind of tensor a name of either format means.
bool is_norm(std::string_view name) {
  return contains(name, "norm");
}
bool is_router_bias(std::string_view name) {
  return contains(name, "exp_probs_b") || contains(name, "e_score_correction_bias");
}
bool is_scale(std::string_view name) {
  return ends_with(name, "_scale_inv");
}

// Deviation of the weights: rows map vectors of unit variance to such; logits get deviation 2.
float weight_deviation(std::string_view name, int64_t cols) {
  if (contains(name, "embed_tokens") || contains(name, "token_embd")) return 1.0f;
  const bool head = contains(name, "lm_head") || name == "output.weight";
  return (head ? 2.0f : 1.0f) / std::sqrt(static_cast<float>(cols));
}
// ---- values ----

// The largest power of two 2^-e with uniform integers -127..127 times it at most `deviation`.
float exact_unit(float deviation) {
  return std::exp2(std::floor(std::log2(deviation / 73.3f)));
}

std::vector<float> random_values(std::string_view name, int64_t elements, int64_t cols,
                                 uint64_t seed) {
  const bool norm = is_norm(name), bias = is_router_bias(name);
  const float unit = bias ? 0x1p-10f : norm ? 0x1p-9f : exact_unit(weight_deviation(name, cols));
  std::vector<float> values(static_cast<size_t>(elements));
  uint64_t state = tensor_seed(seed, name);
  for (float& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto code = static_cast<float>(static_cast<int>((state >> 33) % 255) - 127);
    // Norms are 1 + k / 128 with |k| <= 31: eight significant bits.
    value = norm ? 1.0f + std::trunc(code / 4) * 0x1p-7f : code * unit;
  }
  return values;
}

// Bytes of `values` in a plain or quantised type.
std::vector<std::byte> encode(DType dtype, std::span<const float> values) {
  const auto n = static_cast<int64_t>(values.size());
  std::vector<std::byte> bytes(static_cast<size_t>(row_bytes(dtype, n)));
  const auto convert16 = [&](uint16_t (*convert)(float) noexcept) {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t code = convert(values[i]);
      std::memcpy(bytes.data() + 2 * i, &code, sizeof code);
    }
  };
  switch (dtype) {
    case DType::kF32:
      std::memcpy(bytes.data(), values.data(), bytes.size());
      break;
    case DType::kF16:
      convert16(f32_to_f16);
      break;
    case DType::kBF16:
      convert16(f32_to_bf16);
      break;
    case DType::kF8E4M3:
      quantize_f8_e4m3(values.data(), n, bytes.data());
      break;
    case DType::kQ8_0:
      quantize_q8_0(values.data(), n, bytes.data());
      break;
    case DType::kQ4_0:
      quantize_q4_0(values.data(), n, bytes.data());
      break;
    default:
      fail(fmt::format("no quantiser for {}: ask for Contents::kBlocks", dtype_info(dtype).name));
  }
  return bytes;
}

// Splits F8 weights [rows, cols] into scales per 128 x 128 block and values divided by them.
std::vector<float> f8_scales(std::span<float> values, int64_t rows, int64_t cols) {
  const int64_t across = (cols + kF8ScaleBlock - 1) / kF8ScaleBlock;
  const int64_t down = (rows + kF8ScaleBlock - 1) / kF8ScaleBlock;
  std::vector<float> scales(static_cast<size_t>(across * down), 0.0f);
  const auto scale_of = [&](int64_t row, int64_t col) -> float& {
    return scales[static_cast<size_t>(row / kF8ScaleBlock * across + col / kF8ScaleBlock)];
  };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      float& scale = scale_of(row, col);
      scale = std::max(scale, std::fabs(values[static_cast<size_t>(row * cols + col)]) / 448.0f);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const float scale = scale_of(row, col);
      if (scale > 0) values[static_cast<size_t>(row * cols + col)] /= scale;
    }
  }
  return scales;
}

// ---- GGUF names in terms of Hugging Face names ----

struct NamePair {
  std::string_view gguf, hf;
};
constexpr NamePair kTopNames[] = {{"token_embd.weight", "model.embed_tokens.weight"},
                                  {"output_norm.weight", "model.norm.weight"},
                                  {"output.weight", "lm_head.weight"}};
constexpr NamePair kLayerNames[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_q_a.weight", "self_attn.q_a_proj.weight"},
    {"attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"},
    {"attn_q_b.weight", "self_attn.q_b_proj.weight"},
    {"attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"},
    {"attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"},
    {"attn_kv_b.weight", "self_attn.kv_b_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"ffn_gate_inp.weight", "mlp.gate.weight"},
    {"exp_probs_b.bias", "mlp.gate.e_score_correction_bias"},
    {"ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"},
    {"ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"},
    {"ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"}};

// Values of a GGUF tensor of any layout, from the values of the Hugging Face tensors it is made of.
std::vector<float> gguf_values(const ModelConfig& c, uint64_t seed, const TensorSpec& tensor) {
  for (const NamePair& pair : kTopNames) {
    if (tensor.name == pair.gguf)
      return hf_values(seed, {std::string(pair.hf), DType::kF32, tensor.shape});
  }
  const size_t dot = tensor.name.find('.', 4);  // after "blk.N"
  const std::string prefix = "model.layers." + tensor.name.substr(4, dot - 4) + ".";
  const std::string_view name = std::string_view(tensor.name).substr(dot + 1);
  for (const NamePair& pair : kLayerNames) {
    if (name == pair.gguf)
      return hf_values(seed, {prefix + std::string(pair.hf), DType::kF32, tensor.shape});
  }
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  if (ends_with(name, "_exps.weight")) {  // ffn_gate_exps: the experts one after another
    const std::string part(name.substr(4, name.size() - 4 - 12));
    const std::vector<int64_t> shape(tensor.shape.begin() + 1, tensor.shape.end());
    for (int64_t expert = 0; expert < tensor.shape[0]; ++expert) {
      const std::vector<float> one =
          hf_values(seed, {fmt::format("{}mlp.experts.{}.{}_proj.weight", prefix, expert, part),
                           DType::kF32, shape});
      std::copy(one.begin(), one.end(), values.begin() + expert * static_cast<int64_t>(one.size()));
    }
    return values;
  }
  // attn_k_b [heads, latent, nope] is the k part of W_kv_b [heads, nope + v, latent], transposed
  // per head; attn_v_b [heads, v, latent] is the v part.  The 2-D forms have the same order.
  const int64_t heads = c.num_attention_heads, latent = c.kv_lora_rank;
  const int64_t nope = c.qk_nope_head_dim, v = c.v_head_dim;
  const std::vector<float> kv_b = hf_values(
      seed, {prefix + "self_attn.kv_b_proj.weight", DType::kF32, {heads * (nope + v), latent}});
  const auto at = [&](int64_t head, int64_t row, int64_t col) {
    return kv_b[static_cast<size_t>((head * (nope + v) + row) * latent + col)];
  };
  size_t i = 0;
  for (int64_t head = 0; head < heads; ++head) {
    if (name == "attn_k_b.weight") {
      for (int64_t col = 0; col < latent; ++col) {
        for (int64_t row = 0; row < nope; ++row) values[i++] = at(head, row, col);
      }
    } else if (name == "attn_v_b.weight") {
      for (int64_t row = 0; row < v; ++row) {
        for (int64_t col = 0; col < latent; ++col) values[i++] = at(head, nope + row, col);
      }
    } else {
      fail("no values for " + tensor.name);
    }
  }
  return values;
}

// ---- where bytes come from ----

// Serves a tensor from its encoded copy, made when its first bytes are asked for.
TensorBytes from_encoded(std::function<std::vector<std::byte>(const TensorSpec&)> make) {
  return [make = std::move(make), bytes = std::vector<std::byte>()](
             const TensorSpec& tensor, int64_t offset, std::span<std::byte> out) mutable {
    if (offset == 0) bytes = make(tensor);
    std::copy_n(bytes.begin() + offset, out.size(), out.begin());
  };
}

// Random F8 codes have this deviation; the scales bring them to that of the weight.  A row length
// that is no multiple of 128 is taken as the next one: the scales' tensor does not tell it.
constexpr float kF8Deviation = 200.0f;
float f8_scale(int64_t cols) {
  return weight_deviation("", cols) / kF8Deviation;
}

std::vector<std::byte> hf_encoded(uint64_t seed, const TensorSpec& tensor,
                                  std::vector<float>& scales) {
  if (is_scale(tensor.name)) return encode(DType::kF32, scales);  // follows its weight
  std::vector<float> values = random_values(tensor.name, tensor.elements(), tensor.cols(), seed);
  if (tensor.dtype == DType::kF8E4M3) scales = f8_scales(values, tensor.shape[0], tensor.shape[1]);
  return encode(tensor.dtype, values);
}

}  // namespace

std::vector<float> hf_values(uint64_t seed, const TensorSpec& tensor) {
  return random_values(tensor.name, tensor.elements(), tensor.cols(), seed);
}

TensorBytes gguf_value_bytes(const ModelConfig& c, uint64_t seed) {
  return from_encoded([c, seed](const TensorSpec& tensor) {
    return encode(tensor.dtype, gguf_values(c, seed, tensor));
  });
}

TensorBytes hf_value_bytes(uint64_t seed) {
  return from_encoded([seed, scales = std::vector<float>()](const TensorSpec& tensor) mutable {
    return hf_encoded(seed, tensor, scales);
  });
}

TensorBytes random_block_bytes(uint64_t seed) {
  return [seed](const TensorSpec& tensor, int64_t offset, std::span<std::byte> out) {
    if (is_norm(tensor.name) || is_router_bias(tensor.name)) {  // small, and not around zero
      const std::vector<std::byte> all =
          encode(tensor.dtype, random_values(tensor.name, tensor.elements(), tensor.cols(), seed));
      std::copy_n(all.begin() + offset, out.size(), out.begin());
    } else if (is_scale(tensor.name)) {  // belongs to codes with the deviation of F8 below
      const float scale = f8_scale(tensor.cols() * kF8ScaleBlock);
      for (size_t i = 0; i < out.size(); i += sizeof scale) {
        std::memcpy(out.data() + i, &scale, sizeof scale);
      }
    } else {
      const float deviation =
          tensor.dtype == DType::kF8E4M3
              ? std::min(250.0f, weight_deviation(tensor.name, tensor.cols()) * 0x1p14f)
              : weight_deviation(tensor.name, tensor.cols());
      fill_random_blocks(tensor.dtype, deviation, tensor_seed(seed, tensor.name), offset, out);
    }
  };
}

}  // namespace fathom::test
