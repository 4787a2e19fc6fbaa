// Counting over a placement.  Who decides it: lib/run/placement.cc.
#include "fathom/placement.hpp"

#include <algorithm>

namespace fathom {

Placement Placement::by_layer(const ModelConfig& config, const std::vector<int>& layer_device) {
  Placement placement;
  for (size_t l = 0; l < layer_device.size(); ++l) {
    LayerPlacement layer{.device = layer_device[l], .slot = 0, .experts = {}};
    if (config.is_moe_layer(static_cast<int64_t>(l)))
      layer.experts.push_back({layer.device, 0, config.n_routed_experts});
    placement.layers.push_back(std::move(layer));
  }
  placement.embed_device = layer_device.front();
  placement.head_device = layer_device.back();
  placement.number_slots();
  return placement;
}

void Placement::number_slots() {
  std::vector<int64_t> next;
  for (LayerPlacement& layer : layers) {
    const auto device = static_cast<size_t>(layer.device);
    if (next.size() <= device) next.resize(device + 1, 0);
    layer.slot = next[device]++;
  }
}

int64_t Placement::layers_on(int device) const noexcept {
  return std::count_if(layers.begin(), layers.end(),
                       [&](const LayerPlacement& layer) { return layer.device == device; });
}

int64_t Placement::experts_on(int device) const noexcept {
  int64_t n = 0;
  for (const LayerPlacement& layer : layers)
    for (const ExpertSpan& span : layer.experts)
      if (span.device == device) n += span.count;
  return n;
}

bool Placement::holds_rows_of_others(int device) const noexcept {
  return std::any_of(kv.begin(), kv.end(), [&](const KvSpan& span) {
    return span.device == device && span.home != device && layers_on(span.home) > 0;
  });
}

bool Placement::uses(int device) const noexcept {
  return embed_device == device || head_device == device || layers_on(device) > 0 ||
         experts_on(device) > 0 || holds_rows_of_others(device);
}

}  // namespace fathom
