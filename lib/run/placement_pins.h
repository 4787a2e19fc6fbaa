// What a user pins of the placement: placement.layers, .experts, .embed, .head and .kv as text, and
// what they mean for a model.
//
//   placement.layers    device=LAYERS, ...            "cuda:0=0-29,cuda:1=*"
//   placement.experts   device=LAYERS[:EXPERTS], ...  "cpu=*,cuda:1=3-10,cuda:0=3-10:0-15"
//   placement.kv        device=TOKENS, ...            "home=65536,cuda:1=65536,cpu=*"
//
// LAYERS and EXPERTS are numbers and ranges joined by "+" ("0-3+8"), or "*".  More than one part
// may name a layer or expert: the narrower wins - numbers over "*", a part with EXPERTS over one
// without; between equals it is an error.  What no part names is the planner's to place.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/config.hpp"
#include "fathom/model_config.hpp"
#include "fathom/placement.hpp"

namespace fathom::run {

// -1: not pinned.
struct PlacementPins {
  int embed_device = -1, head_device = -1;
  std::vector<int> layers;                // [num_hidden_layers]
  std::vector<std::vector<int>> experts;  // [num_hidden_layers][n_routed_experts]; empty when dense

  // Rows of the cache, in the order of the text.
  struct Rows {
    int device = -1;            // -1: that of the layer
    int64_t n_rows = kKvNoEnd;  // kKvNoEnd: all that follow
  };
  std::vector<Rows> kv;  // empty: not pinned

  bool any_expert(size_t layer) const noexcept;
};

// Whether the text of placement.layers (`with_experts` false) or placement.experts can be read.
// Errors: kConfig; the message names the part.
Status check_pins(std::string_view text, bool with_experts);
// The same of placement.kv.
Status check_kv_pins(std::string_view text);

// The pins of `config` on devices of these names.  Errors: kConfig, about the key: an unknown
// device, a layer or expert that the model does not have, two devices for one thing.
Result<PlacementPins> read_pins(const Config& config, const ModelConfig& model,
                                const std::vector<std::string>& devices);

}  // namespace fathom::run
