// Greedy continuations of the golden models.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <string>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom::test {

// Greedy continuation, compared up to the first step whose choice is too close to call, and up to
// `most` tokens.
inline void check_greedy(const Model& model, const Golden& golden, const std::string& name,
                         float margin, int64_t most = 1 << 20) {
  Session session = new_session(model);
  require_ok(session.prefill(golden.i32(name + ".prompt")));
  const auto expected = golden.i32(name + ".tokens");
  const auto margins = golden.f32(name + ".margin");
  GenerateOptions options;
  options.max_new_tokens = std::min(most, static_cast<int64_t>(expected.size()));
  options.stop_at_eos = false;
  const auto result = session.generate(options);
  INFO(name << ": " << result.status().message());
  REQUIRE(result.ok());
  REQUIRE(static_cast<int64_t>(result->tokens.size()) == options.max_new_tokens);
  for (size_t i = 0; i < result->tokens.size() && margins[i] >= margin; ++i) {
    INFO(name << " step " << i);
    REQUIRE(result->tokens[i] == expected[i]);
  }
}

}  // namespace fathom::test
