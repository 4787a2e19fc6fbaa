// Loading models and running texts through the public API, with failures that say why.
#pragma once

#include <catch2/catch.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fathom/fathom.hpp"

namespace fathom::test {

using Settings = std::vector<std::pair<std::string, std::string>>;

inline Config config_of(const Settings& settings) {
  Config config;
  for (const auto& [key, value] : settings) {
    Status s = config.set(key, value);
    INFO(key << "=" << value << ": " << s.message());
    REQUIRE(s.ok());
  }
  return config;
}

inline Model load_model(const std::string& path, const Settings& settings = {}) {
  Result<Model> model = Model::load(path, config_of(settings));
  INFO(path << ": " << model.status().message());
  REQUIRE(model.ok());
  return std::move(model).value();
}

inline Session new_session(const Model& model, const SessionOptions& options = {}) {
  Result<Session> session = Session::create(model, options);
  INFO(session.status().message());
  REQUIRE(session.ok());
  return std::move(session).value();
}

inline void require_ok(const Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

// A text without meaning; another one for each seed.
inline std::vector<int32_t> some_tokens(int64_t n, int64_t vocab, int64_t seed = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    tokens[static_cast<size_t>(i)] = static_cast<int32_t>((i + seed) * 7919 % vocab);
  return tokens;
}

// Logits of every position of a prompt cut into the plan's chunks, then of a few steps.
inline std::vector<float> logits_and_steps(const Model& model) {
  Session session = new_session(model);
  std::vector<float> all;
  RunOptions options;
  options.on_logits = [&](int64_t, std::span<const float> row) {
    all.insert(all.end(), row.begin(), row.end());
    return true;
  };
  require_ok(session.prefill(some_tokens(90, model.config().vocab_size), options));
  for (const int32_t token : {3, 1, 4}) {
    require_ok(session.step(token));
    all.insert(all.end(), session.logits().begin(), session.logits().end());
  }
  return all;
}

// Logits of all positions of `tokens`, prefilled into a new session in passes of `chunk` (0: the
// plan's).
inline std::vector<float> all_logits(const Model& model, std::span<const int32_t> tokens,
                                     int64_t chunk = 0) {
  Session session = new_session(model);
  std::vector<float> logits;
  RunOptions options;
  options.chunk = chunk;
  options.on_logits = [&](int64_t, std::span<const float> row) {
    logits.insert(logits.end(), row.begin(), row.end());
    return true;
  };
  require_ok(session.prefill(tokens, options));
  return logits;
}

// Logits of the last position only.
inline std::vector<float> last_logits(const Model& model, std::span<const int32_t> tokens,
                                      int64_t chunk = 0) {
  Session session = new_session(model);
  RunOptions options;
  options.chunk = chunk;
  require_ok(session.prefill(tokens, options));
  const auto logits = session.logits();
  return {logits.begin(), logits.end()};
}

// Names of the instruction sets that this machine runs, scalar included.
inline std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const IsaInfo& isa : cpu_isas())
    if (isa.available) names.push_back(isa.name);
  return names;
}

}  // namespace fathom::test
