// A plan as JSON for programs and as a table for people.
#include <fmt/format.h>

#include "config_schema.h"
#include "fathom/plan.hpp"

namespace fathom {
namespace {

double gib(int64_t bytes) {
  return static_cast<double>(bytes) / static_cast<double>(int64_t{1} << 30);
}

// 1234567 -> "1,234,567".
std::string grouped(int64_t value) {
  std::string digits = fmt::format("{}", value);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > (value < 0 ? 1 : 0); at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

std::string purposes_json(const PlanDevice& device, int phase) {
  std::string out;
  for (int p = 0; p < kPurposeCount; ++p) {
    const auto purpose = static_cast<Purpose>(p);
    const int64_t bytes = phase < 0
                              ? device.planned(purpose)
                              : device.bytes[static_cast<size_t>(phase)][static_cast<size_t>(p)];
    out += fmt::format("{}\"{}\": {}", p ? ", " : "", purpose_name(purpose), bytes);
  }
  return fmt::format("{{{}}}", out);
}

std::string note(const Plan& plan, const PlanDevice& device, Purpose purpose) {
  switch (purpose) {
    case Purpose::kKv:
      if (device.n_layers == 0) return "pages of layers that live on other devices";
      return fmt::format("{} tokens, {} latent {} + rope {}, {} layers, pages of {} tokens",
                         grouped(plan.max_context), kv_type_name(plan.kv_type),
                         plan.model.kv_lora_rank, plan.model.qk_rope_head_dim, device.n_layers,
                         plan.kv_page_tokens);
    case Purpose::kExperts:
      return fmt::format("{} experts", grouped(device.n_experts));
    case Purpose::kActivations:
      if (plan.prefill_in_flight > 1)
        return fmt::format("prefill chunk {}, {} in flight", plan.prefill_chunk,
                           plan.prefill_in_flight);
      [[fallthrough]];
    case Purpose::kWorkspace:
      return fmt::format("prefill chunk {}", plan.prefill_chunk);
    case Purpose::kStaging:
      return device.bytes[static_cast<size_t>(Phase::kDecode)][static_cast<size_t>(purpose)] > 0
                 ? "while loading; moved pages on their way to attention"
                 : "while loading";
    case Purpose::kExpertCache:
      return "copies of the most used experts elsewhere; given back as the text grows";
    case Purpose::kRuntime:
      return "threads, token history";
    default:
      return "";
  }
}

// How fast, and who works how much.
std::string balance_text(const Plan& plan) {
  const PlanSpeed& speed = plan.speed;
  std::string out = fmt::format(
      "predicted ({} rates): prefill {:.4g} tokens/s, {:.4g} at {} tokens; decode {:.4g} tokens/s, "
      "{:.4g} at {} tokens\n",
      rate_source_name(speed.source), speed.prefill_first, speed.prefill_last,
      grouped(plan.max_context), speed.decode_first, speed.decode_last, grouped(plan.max_context));
  if (plan.devices.size() < 2) return out;
  for (const PlanDevice& device : plan.devices)
    out += fmt::format(
        "{:<8} works {:.4g} ms of a decode step, {:.4g} ms of a chunk; {:.0f} % of its "
        "budget\n",
        device.name, device.decode_seconds * 1e3, device.prefill_seconds * 1e3,
        static_cast<double>(device.peak_bytes()) /
            static_cast<double>(std::max<int64_t>(device.budget_bytes, 1)) * 100);
  const bool cards = std::ranges::any_of(
      plan.devices, [](const PlanDevice& device) { return device.kind != DeviceKind::kCpu; });
  out += fmt::format("balance{}: memory max/mean {:.2f}, decode time max/mean {:.2f}\n",
                     cards ? " of the cards" : "", plan.balance.memory, plan.balance.time);
  return out;
}

// Layers that lie alike are one entry: [first, last].
std::string placement_json(const Plan& plan) {
  const auto name = [&](int device) {
    return run::json_quote(plan.devices[static_cast<size_t>(device)].name);
  };
  const std::vector<LayerPlacement>& layers = plan.placement.layers;
  std::string list;
  for (size_t l = 0; l < layers.size();) {
    size_t end = l + 1;
    while (end < layers.size() && layers[end].device == layers[l].device &&
           layers[end].experts == layers[l].experts)
      ++end;
    std::string experts;
    for (const ExpertSpan& span : layers[l].experts)
      experts +=
          fmt::format("{}{{\"device\": {}, \"first\": {}, \"count\": {}}}",
                      experts.empty() ? "" : ", ", name(span.device), span.first, span.count);
    list += fmt::format("{}    {{\"layers\": [{}, {}], \"device\": {}, \"experts\": [{}]}}",
                        list.empty() ? "" : ",\n", l, end - 1, name(layers[l].device), experts);
    l = end;
  }
  std::string kv;
  for (const KvSpan& span : plan.placement.kv)
    kv += fmt::format("{}{{\"home\": {}, \"device\": {}, \"rows\": [{}, {}]}}",
                      kv.empty() ? "" : ", ", name(span.home), name(span.device), span.first_row,
                      std::min(span.end_row, plan.max_context));
  return fmt::format("{{\"embed\": {}, \"head\": {}, \"kv\": [{}], \"layers\": [\n{}\n  ]}}",
                     name(plan.placement.embed_device), name(plan.placement.head_device), kv, list);
}

std::string balance_json(const Plan& plan) {
  const PlacementBalance& b = plan.balance;
  const auto name = [&](int device) {
    return device < 0 ? "null" : run::json_quote(plan.devices[static_cast<size_t>(device)].name);
  };
  const auto seconds = [](const PlacementSeconds& s) {
    return fmt::format("{{\"step\": {:.6g}, \"goal\": {:.6g}}}", s.step, s.goal);
  };
  std::string full;
  for (const int device : b.full) full += (full.empty() ? "" : ", ") + name(device);
  std::string out = fmt::format(
      "{{\"memory\": {:.4f}, \"time\": {:.4f}, \"slowest\": {}, \"full\": [{}], \"seconds\": {}, "
      "\"chunk_tokens\": {}, \"context_tokens\": {}, \"cause\": \"{}\"",
      b.memory, b.time, name(b.slowest), full, seconds(b.seconds), b.chunk_tokens, b.context_tokens,
      uneven_cause_name(b.cause));
  if (b.cause != UnevenCause::kNone && b.cause != UnevenCause::kGrown)
    out += fmt::format(
        ", \"giver\": {}, \"part_bytes\": {}, \"room_bytes\": {}, \"fastest\": {},\n    "
        "\"even\": {{\"meets\": {}, \"memory\": {:.4f}, \"time\": {:.4f}, \"seconds\": {}}}",
        name(b.giver), b.part_bytes, b.room_bytes, seconds(b.fastest), b.even_meets, b.even_memory,
        b.even_time, seconds(b.even_seconds));
  return out + "}";
}

}  // namespace

std::string Plan::to_json() const {
  std::string out = "{\n";
  const auto add = [&](std::string_view key, const std::string& value) {
    out += fmt::format("{}  \"{}\": {}", out.size() > 2 ? ",\n" : "", key, value);
  };
  add("model", run::json_quote(model_path));
  add("feasible", feasible ? "true" : "false");
  add("kv_bytes_per_token", fmt::format("{}", kv_bytes_per_token));
  add("max_context", fmt::format("{}", max_context));
  add("max_context_feasible", fmt::format("{}", max_context_feasible));
  add("by_ladder", by_ladder ? "true" : "false");
  add("max_context_resident", fmt::format("{}", max_context_resident));
  add("prefill_chunk", fmt::format("{}", prefill_chunk));
  add("prefill_in_flight", fmt::format("{}", prefill_in_flight));
  add("attention_form",
      attention_form == AttentionForm::kExpanded ? "\"expanded\"" : "\"absorbed\"");
  add("kv_type", run::json_quote(kv_type_name(kv_type)));
  add("kv_page_tokens", fmt::format("{}", kv_page_tokens));
  add("sessions", fmt::format("{}", config.sessions_max));
  std::string list;
  for (const PlanDevice& device : devices) {
    std::string phases;
    for (int p = 0; p < kPhaseCount; ++p)
      phases += fmt::format("{}\"{}\": {}", p ? ", " : "", phase_name(static_cast<Phase>(p)),
                            purposes_json(device, p));
    list += fmt::format(
        "{}    {{\"name\": {}, \"kind\": \"{}\", \"budget_bytes\": {}, \"peak_bytes\": {}, "
        "\"n_layers\": {}, \"n_experts\": {}, \"kv_page_bytes\": {}, \"kv_moved_bytes\": {}, "
        "\"kv_host_bytes\": {}, \"kv_file_bytes\": {}, \"expert_cache_bytes\": {},\n     "
        "\"prefill_seconds\": {:.6g}, \"decode_seconds\": {:.6g},\n     \"purposes\": {},\n     "
        "\"phases\": {{{}}}}}",
        list.empty() ? "" : ",\n", run::json_quote(device.name),
        device.kind == DeviceKind::kCpu ? "cpu" : "cuda", device.budget_bytes, device.peak_bytes(),
        device.n_layers, device.n_experts, device.kv_page_bytes, device.kv_moved_bytes,
        device.kv_host_bytes, device.kv_file_bytes, device.expert_cache_bytes,
        device.prefill_seconds, device.decode_seconds, purposes_json(device, -1), phases);
  }
  add("devices", fmt::format("[\n{}\n  ]", list));
  add("placement", placement_json(*this));
  add("balance", balance_json(*this));
  add("predicted",
      fmt::format("{{\"rates\": \"{}\", \"prefill_first_tokens_per_s\": {:.6g}, "
                  "\"prefill_last_tokens_per_s\": {:.6g}, \"decode_first_tokens_per_s\": {:.6g}, "
                  "\"decode_last_tokens_per_s\": {:.6g}}}",
                  rate_source_name(speed.source), speed.prefill_first, speed.prefill_last,
                  speed.decode_first, speed.decode_last));
  if (!feasible && binding_device >= 0) {
    add("binding", fmt::format("{{\"device\": {}, \"purpose\": \"{}\", \"bytes_short\": {}}}",
                               run::json_quote(devices[static_cast<size_t>(binding_device)].name),
                               purpose_name(binding_purpose), bytes_short));
  }
  list.clear();
  for (const PlanAlternative& alternative : alternatives) {
    std::string changes;
    for (const auto& [key, value] : alternative.changes)
      changes += fmt::format("{}{}: {}", changes.empty() ? "" : ", ", run::json_quote(key),
                             run::json_quote(value));
    list += fmt::format("{}{{\"set\": {{{}}}, \"max_context\": {}, \"text\": {}}}",
                        list.empty() ? "" : ", ", changes, alternative.max_context,
                        run::json_quote(alternative.text));
  }
  add("alternatives", fmt::format("[{}]", list));
  list.clear();
  for (const std::string& remark : remarks)
    list += (list.empty() ? "" : ", ") + run::json_quote(remark);
  add("remarks", fmt::format("[{}]", list));
  return out + "\n}";
}

std::string Plan::describe() const {
  const auto phases_text = [](const auto& bytes_in) {
    std::string text;
    for (int p = 0; p < kPhaseCount; ++p)
      text += fmt::format(" {:>9.3f}", gib(bytes_in(static_cast<Phase>(p))));
    return text;
  };
  std::string out =
      fmt::format("{:<8} {:<12} {:>18} {:>9} {:>9} {:>9}  {:>12}  {}\n", "device", "purpose",
                  "bytes", "load GiB", "prefill", "decode", "per token", "note");
  for (const PlanDevice& device : devices) {
    for (int p = 0; p < kPurposeCount; ++p) {
      const auto purpose = static_cast<Purpose>(p);
      const int64_t bytes = device.planned(purpose);
      if (bytes == 0) continue;
      const std::string per_token =
          purpose == Purpose::kKv
              ? fmt::format("{} B",
                            grouped(kv_bytes_per_token * device.n_layers / model.num_hidden_layers))
              : "-";
      const auto in_phase = [&](Phase phase) {
        return device.bytes[static_cast<size_t>(phase)][static_cast<size_t>(p)];
      };
      out += fmt::format("{:<8} {:<12} {:>18}{}  {:>12}  {}\n", device.name, purpose_name(purpose),
                         grouped(bytes), phases_text(in_phase), per_token,
                         note(*this, device, purpose));
    }
    out += fmt::format("{:<8} {:<12} {:>18}{}  {:>12}  budget {:.3f} GiB\n", device.name, "peak",
                       grouped(device.peak_bytes()),
                       phases_text([&](Phase phase) { return device.total(phase); }), "",
                       gib(device.budget_bytes));
  }
  out += balance_text(*this);
  if (feasible) {
    out += fmt::format("FITS: {} tokens per session", grouped(max_context));
    if (by_ladder) out += fmt::format(", by the ladder from {} on", grouped(max_context_resident));
    if (max_context_feasible > max_context)
      out += fmt::format(" ({} would)", grouped(max_context_feasible));
  } else {
    out += "DOES NOT FIT";
    if (binding_device >= 0)
      out += fmt::format(": short by {:.3f} GiB on {} ({})", gib(bytes_short),
                         devices[static_cast<size_t>(binding_device)].name,
                         purpose_name(binding_purpose));
    out += alternatives.empty() ? ". No single change found that fits" : ". Nearest that fit:";
    for (size_t i = 0; i < alternatives.size(); ++i)
      out += fmt::format("\n  [{}] {}", i + 1, alternatives[i].text);
  }
  return out;
}

}  // namespace fathom
