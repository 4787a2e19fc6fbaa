// Loading models and running texts through the public API, with failures that say why.
#pragma once

#include <catch2/catch.hpp>

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
