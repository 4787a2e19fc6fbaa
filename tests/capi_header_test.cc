// capi/fathom.h compiles alone in every language version it promises, without a warning and without
// hidden padding, and no field of its structs has moved since the table in data/capi was written.
#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "capi/fathom.h"

namespace {

bool runs(const std::string& command) {
  return std::system(command.c_str()) == 0;
}

std::string compiler(const char* c, const char* gcc, const char* clang) {
  for (const char* name : {c, gcc, clang})
    if (runs(std::string(name) + " --version > /dev/null 2>&1")) return name;
  return "";
}

bool compiles(const std::string& compiler, const std::string& language,
              const std::string& standard) {
  return runs("printf '#include \"fathom.h\"\\nint x;\\n' | " + compiler + " -x " + language +
              " -std=" + standard +
              " -pedantic-errors -Wall -Wextra -Wpadded -Werror -fsyntax-only -I '" +
              FATHOM_SOURCE_DIR + "/capi' -");
}

// "struct.field" -> {offset, size}; "struct" -> {0, size}.
using Layout = std::map<std::string, std::pair<size_t, size_t>>;

#define FIELD(type, field) \
  layout[#type "." #field] = {offsetof(type, field), sizeof(static_cast<type*>(nullptr)->field)}
#define STRUCT(type) layout[#type] = {0, sizeof(type)}

Layout current_layout() {
  Layout layout;
  STRUCT(fathom_error);
  FIELD(fathom_error, struct_size);
  FIELD(fathom_error, code);
  FIELD(fathom_error, sys_errno);
  FIELD(fathom_error, device);
  FIELD(fathom_error, bytes_needed);
  FIELD(fathom_error, bytes_available);
  FIELD(fathom_error, offset);
  FIELD(fathom_error, key);
  FIELD(fathom_error, message);
  STRUCT(fathom_host);
  FIELD(fathom_host, struct_size);
  FIELD(fathom_host, log_level);
  FIELD(fathom_host, user);
  FIELD(fathom_host, log);
  FIELD(fathom_host, memory);
  FIELD(fathom_host, reserve);
  FIELD(fathom_host, commit);
  FIELD(fathom_host, decommit);
  FIELD(fathom_host, release);
  STRUCT(fathom_device_info);
  FIELD(fathom_device_info, struct_size);
  FIELD(fathom_device_info, index);
  FIELD(fathom_device_info, kind);
  FIELD(fathom_device_info, bytes_total);
  FIELD(fathom_device_info, bytes_free);
  FIELD(fathom_device_info, bytes_budget);
  FIELD(fathom_device_info, bytes_now);
  FIELD(fathom_device_info, bytes_peak);
  FIELD(fathom_device_info, name);
  STRUCT(fathom_plan_summary);
  FIELD(fathom_plan_summary, struct_size);
  FIELD(fathom_plan_summary, feasible);
  FIELD(fathom_plan_summary, binding_device);
  FIELD(fathom_plan_summary, binding_category);
  FIELD(fathom_plan_summary, bytes_short);
  FIELD(fathom_plan_summary, bytes_peak);
  FIELD(fathom_plan_summary, bytes_decode);
  FIELD(fathom_plan_summary, max_tokens);
  FIELD(fathom_plan_summary, max_tokens_feasible);
  FIELD(fathom_plan_summary, kv_bytes_per_token);
  FIELD(fathom_plan_summary, prefill_chunk);
  FIELD(fathom_plan_summary, n_devices);
  FIELD(fathom_plan_summary, n_items);
  FIELD(fathom_plan_summary, n_alternatives);
  STRUCT(fathom_plan_item);
  FIELD(fathom_plan_item, struct_size);
  FIELD(fathom_plan_item, device);
  FIELD(fathom_plan_item, category);
  FIELD(fathom_plan_item, phase);
  FIELD(fathom_plan_item, bytes);
  FIELD(fathom_plan_item, device_name);
  STRUCT(fathom_run);
  FIELD(fathom_run, struct_size);
  FIELD(fathom_run, flags);
  FIELD(fathom_run, user);
  FIELD(fathom_run, progress);
  FIELD(fathom_run, on_logits);
  FIELD(fathom_run, cancel);
  FIELD(fathom_run, deadline_ms);
  FIELD(fathom_run, chunk);
  FIELD(fathom_run, on_step);
  STRUCT(fathom_budget_forecast);
  FIELD(fathom_budget_forecast, struct_size);
  FIELD(fathom_budget_forecast, device);
  FIELD(fathom_budget_forecast, bytes_budget);
  FIELD(fathom_budget_forecast, bytes_now);
  FIELD(fathom_budget_forecast, n_tokens_end);
  FIELD(fathom_budget_forecast, then);
  FIELD(fathom_budget_forecast, name);
  STRUCT(fathom_step);
  FIELD(fathom_step, struct_size);
  FIELD(fathom_step, phase);
  FIELD(fathom_step, n_new);
  FIELD(fathom_step, n_tokens);
  FIELD(fathom_step, bytes_kv);
  FIELD(fathom_step, ms);
  FIELD(fathom_step, n_items);
  FIELD(fathom_step, items);
  STRUCT(fathom_expert_cache);
  FIELD(fathom_expert_cache, struct_size);
  FIELD(fathom_expert_cache, n_experts);
  FIELD(fathom_expert_cache, bytes);
  FIELD(fathom_expert_cache, choices);
  FIELD(fathom_expert_cache, hits);
  FIELD(fathom_expert_cache, copied);
  FIELD(fathom_expert_cache, dropped);
  STRUCT(fathom_model_info);
  FIELD(fathom_model_info, struct_size);
  FIELD(fathom_model_info, bos);
  FIELD(fathom_model_info, eos);
  FIELD(fathom_model_info, n_layers);
  FIELD(fathom_model_info, n_heads);
  FIELD(fathom_model_info, n_experts);
  FIELD(fathom_model_info, n_experts_used);
  FIELD(fathom_model_info, kv_lora_rank);
  FIELD(fathom_model_info, rope_dim);
  FIELD(fathom_model_info, n_vocab);
  FIELD(fathom_model_info, n_params);
  FIELD(fathom_model_info, n_params_active);
  FIELD(fathom_model_info, context_train);
  FIELD(fathom_model_info, bytes_weights);
  FIELD(fathom_model_info, fingerprint_lo);
  FIELD(fathom_model_info, fingerprint_hi);
  FIELD(fathom_model_info, arch);
  FIELD(fathom_model_info, name);
  STRUCT(fathom_sampler_params);
  FIELD(fathom_sampler_params, struct_size);
  FIELD(fathom_sampler_params, top_k);
  FIELD(fathom_sampler_params, seed);
  FIELD(fathom_sampler_params, temperature);
  FIELD(fathom_sampler_params, top_p);
  FIELD(fathom_sampler_params, min_p);
  FIELD(fathom_sampler_params, repeat_penalty);
  FIELD(fathom_sampler_params, repeat_window);
  STRUCT(fathom_session_params);
  FIELD(fathom_session_params, struct_size);
  FIELD(fathom_session_params, flags);
  FIELD(fathom_session_params, max_tokens);
  FIELD(fathom_session_params, reserve_tokens);
  STRUCT(fathom_session_info);
  FIELD(fathom_session_info, struct_size);
  FIELD(fathom_session_info, has_logits);
  FIELD(fathom_session_info, n_tokens);
  FIELD(fathom_session_info, capacity_tokens);
  FIELD(fathom_session_info, max_tokens);
  FIELD(fathom_session_info, bytes_kv);
  FIELD(fathom_session_info, kv_bytes_per_token);
  FIELD(fathom_session_info, n_prefilled);
  FIELD(fathom_session_info, n_decoded);
  FIELD(fathom_session_info, prefill_ms);
  FIELD(fathom_session_info, decode_ms);
  STRUCT(fathom_generate_params);
  FIELD(fathom_generate_params, struct_size);
  FIELD(fathom_generate_params, flags);
  FIELD(fathom_generate_params, max_new_tokens);
  FIELD(fathom_generate_params, on_token);
  FIELD(fathom_generate_params, user);
  FIELD(fathom_generate_params, stop_ids);
  FIELD(fathom_generate_params, n_stop_ids);
  FIELD(fathom_generate_params, stop_strings);
  FIELD(fathom_generate_params, n_stop_strings);
  STRUCT(fathom_generate_result);
  FIELD(fathom_generate_result, struct_size);
  FIELD(fathom_generate_result, stop_reason);
  FIELD(fathom_generate_result, end_code);
  FIELD(fathom_generate_result, n_new_tokens);
  FIELD(fathom_generate_result, bytes_needed);
  FIELD(fathom_generate_result, bytes_available);
  STRUCT(fathom_memory_item);
  FIELD(fathom_memory_item, struct_size);
  FIELD(fathom_memory_item, device);
  FIELD(fathom_memory_item, category);
  FIELD(fathom_memory_item, bytes_now);
  FIELD(fathom_memory_item, bytes_peak);
  FIELD(fathom_memory_item, bytes_planned);
  FIELD(fathom_memory_item, bytes_budget);
  return layout;
}

}  // namespace

TEST_CASE("the header compiles in every version of C and C++") {
  const std::string c = compiler("cc", "gcc", "clang"), cxx = compiler("c++", "g++", "clang++");
  REQUIRE(!c.empty());
  REQUIRE(!cxx.empty());
  for (const char* standard : {"c89", "gnu89", "c99", "c11", "c17"}) {
    INFO(c << " -std=" << standard);
    CHECK(compiles(c, "c", standard));
  }
  for (const char* standard : {"c++98", "c++11", "c++14", "c++17", "c++20"}) {
    INFO(cxx << " -std=" << standard);
    CHECK(compiles(cxx, "c++", standard));
  }
}

TEST_CASE("structs have only grown at their ends") {
  // Lines "struct.field offset size" and "struct 0 size", for pointers of 8 bytes.
  if (sizeof(void*) != 8) return;
  const Layout now = current_layout();
  std::ifstream file(std::string(FATHOM_TEST_SOURCE_DATA) + "/capi/layout.txt");
  REQUIRE(file);
  size_t n = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string name;
    size_t offset = 0, size = 0;
    words >> name >> offset >> size;
    INFO(line);
    REQUIRE(now.count(name) == 1);
    if (name.find('.') == std::string::npos) {
      CHECK(now.at(name).second >= size);
    } else {
      CHECK(now.at(name).first == offset);
      CHECK(now.at(name).second == size);
    }
    ++n;
  }
  CHECK(n == now.size());  // a new field gets its line, never to be changed again
}
