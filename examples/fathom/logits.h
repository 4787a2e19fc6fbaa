// What measurements compute from logits, in double.
#pragma once

#include <cstdint>
#include <span>

namespace cli {

// -log softmax(logits)[token]
double negative_log_likelihood(std::span<const float> logits, int32_t token) noexcept;

// The sum over all tokens of p log(p / q), p and q being the softmax of the two rows [vocab_size].
double kl_divergence(std::span<const float> p_logits, std::span<const float> q_logits) noexcept;

// The most likely token, the first of equals.
int32_t first_token(std::span<const float> logits) noexcept;

}  // namespace cli
