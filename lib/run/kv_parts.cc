#include "kv_parts.h"

#include <algorithm>

namespace fathom::run {

std::vector<KvPart> kv_parts(std::span<const KvSpan> spans,
                             std::span<const int64_t> layers_on_device, int64_t page_tokens,
                             int64_t max_pages) {
  std::vector<KvPart> parts;
  for (int home = 0; home < static_cast<int>(layers_on_device.size()); ++home) {
    int64_t page = 0;
    const auto add = [&](int device, int64_t end) {
      if (end > page) parts.push_back({home, device, page, end});
      page = std::max(page, end);
    };
    if (layers_on_device[static_cast<size_t>(home)] > 0)
      for (const KvSpan& span : spans) {
        if (span.home != home) continue;
        add(home, std::min(span.first_row / page_tokens, max_pages));
        add(span.device,
            span.end_row == kKvNoEnd ? max_pages : std::min(span.end_row / page_tokens, max_pages));
      }
    add(home, max_pages);
  }
  return parts;
}

std::vector<KvPart> kv_parts(const Plan& plan) {
  std::vector<int64_t> layers;
  for (const PlanDevice& device : plan.devices) layers.push_back(device.n_layers);
  return kv_parts(plan.placement.kv, layers, plan.kv_page_tokens, INT64_MAX);
}

int64_t kv_page_bytes(const Plan& plan, const KvPart& part, KvType type) noexcept {
  return committed_bytes(kv_payload_bytes(plan, part, type),
                         plan.devices[static_cast<size_t>(part.device)].granularity);
}

int64_t kv_payload_bytes(const Plan& plan, const KvPart& part, KvType type) noexcept {
  const KvLayout layout{plan.kv_page_tokens, plan.model.kv_lora_rank, plan.model.qk_rope_head_dim};
  return layout.page_bytes(type, plan.devices[static_cast<size_t>(part.home)].n_layers);
}

}  // namespace fathom::run

namespace fathom {

int64_t Plan::kv_bytes(int device, int64_t n_tokens) const {
  int64_t bytes = 0;
  for (const run::KvPart& part : run::kv_parts(*this)) {
    if (part.device != device) continue;
    const int64_t cold = run::kv_page_bytes(*this, part, kv_type);
    const int64_t hot = run::kv_page_bytes(*this, part, kv_policy.hot_type);
    bytes += std::max(kv_policy.bytes(kv_policy.last_page_begun(n_tokens, part.end_page), cold, hot,
                                      part.first_page, part.end_page),
                      kv_policy.reserved_bytes(std::min(config.context_reserve, n_tokens), cold,
                                               hot, part.first_page, part.end_page));
  }
  return bytes;
}

}  // namespace fathom
