#include "placement_pins.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "config_schema.h"

namespace fathom::run {
namespace {

constexpr std::string_view kLayersKey = "placement.layers", kExpertsKey = "placement.experts";
constexpr std::string_view kKvKey = "placement.kv";
constexpr std::string_view kAuto = "auto", kHome = "home";

struct Range {
  int64_t first = 0, last = 0;
};
// Numbers and ranges; none: all ("*").
using Ranges = std::vector<Range>;

struct Part {
  std::string_view text, device;
  Ranges layers;
  std::optional<Ranges> experts;
};

Status bad(std::string_view part, std::string_view why) {
  return Status(Code::kConfig, fmt::format("{}: {}", shown(part), why));
}

bool read_number(std::string_view text, int64_t& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size() && out >= 0 && !text.empty();
}

// Calls visit(piece) for the pieces of a list; false from it ends.
template <class Visit>
bool each(std::string_view list, char separator, Visit&& visit) {
  for (size_t at = 0; at <= list.size();) {
    const size_t end = std::min(list.find(separator, at), list.size());
    if (!visit(list.substr(at, end - at))) return false;
    at = end + 1;
  }
  return true;
}

Result<Ranges> read_ranges(std::string_view text, std::string_view part) {
  Ranges ranges;
  if (text == "*") return ranges;
  const bool good = each(text, '+', [&](std::string_view piece) {
    const size_t dash = piece.find('-');
    Range range;
    const bool read = dash == std::string_view::npos
                          ? read_number(piece, range.first) && ((range.last = range.first), true)
                          : read_number(piece.substr(0, dash), range.first) &&
                                read_number(piece.substr(dash + 1), range.last);
    ranges.push_back(range);
    return read && range.first <= range.last;
  });
  if (!good)
    return bad(part, fmt::format("{} is not *, numbers or ranges such as 0-3+8", shown(text)));
  return ranges;
}

Result<std::vector<Part>> read_parts(std::string_view text, bool with_experts) {
  std::vector<Part> parts;
  if (text == kAuto) return parts;
  Status status;
  each(text, ',', [&](std::string_view piece) {
    const size_t equals = piece.find('=');
    if (equals == std::string_view::npos || equals == 0) {
      status = bad(piece, with_experts ? "must be device=layers or device=layers:experts"
                                       : "must be device=layers");
      return false;
    }
    Part part{.text = piece, .device = piece.substr(0, equals), .layers = {}, .experts = {}};
    std::string_view layers = piece.substr(equals + 1);
    if (const size_t colon = layers.find(':'); colon != std::string_view::npos && with_experts) {
      Result<Ranges> experts = read_ranges(layers.substr(colon + 1), piece);
      if (!experts.ok()) return (status = std::move(experts).status()).ok();
      part.experts = std::move(experts).value();
      layers = layers.substr(0, colon);
    }
    Result<Ranges> ranges = read_ranges(layers, piece);
    if (!ranges.ok()) return (status = std::move(ranges).status()).ok();
    part.layers = std::move(ranges).value();
    parts.push_back(std::move(part));
    return true;
  });
  if (!status.ok()) return status;
  return parts;
}

// Puts a device on the things that parts name.  `rank` of what put it there before: a higher one
// wins, an equal one with another device is a conflict.
class Setter {
 public:
  explicit Setter(size_t n) : ranks_(n, 0) {}
  bool set(std::vector<int>& devices, size_t index, int device, int rank) {
    if (rank == ranks_[index] && devices[index] != device) return false;
    if (rank >= ranks_[index]) devices[index] = device, ranks_[index] = rank;
    return true;
  }

 private:
  std::vector<int> ranks_;
};

Result<int> find_device(std::string_view name, std::string_view key,
                        const std::vector<std::string>& devices) {
  const auto found = std::find(devices.begin(), devices.end(), name);
  if (found == devices.end())
    return Status(Code::kConfig, fmt::format("{}: devices = \"{}\" has no device {}", key,
                                             fmt::join(devices, ","), shown(name)))
        .about(key);
  return static_cast<int>(found - devices.begin());
}

// Calls visit(i) for all of [0, count) that `ranges` name.  Errors: kConfig beyond it.
template <class Visit>
Status each_in(const Ranges& ranges, int64_t count, std::string_view what, const Part& part,
               std::string_view key, Visit&& visit) {
  if (ranges.empty())
    for (int64_t i = 0; i < count; ++i) FATHOM_TRY(visit(i));
  for (const Range& range : ranges) {
    if (range.last >= count)
      return Status(Code::kConfig, fmt::format("{}: {}: the model has {} 0 to {}", key,
                                               shown(part.text), what, count - 1))
          .about(key);
    for (int64_t i = range.first; i <= range.last; ++i) FATHOM_TRY(visit(i));
  }
  return {};
}

// "home=65536,cpu=*": names and numbers of tokens; kKvNoEnd for "*".
Result<std::vector<std::pair<std::string_view, int64_t>>> read_kv_parts(std::string_view text) {
  std::vector<std::pair<std::string_view, int64_t>> parts;
  if (text == kAuto) return parts;
  Status status;
  each(text, ',', [&](std::string_view piece) {
    const size_t equals = piece.find('=');
    const std::string_view tokens =
        equals == std::string_view::npos ? std::string_view() : piece.substr(equals + 1);
    int64_t n = kKvNoEnd;
    constexpr int64_t kMost = int64_t{1} << 31;  // beyond every context.max
    if (equals == 0 || (tokens != "*" && (!read_number(tokens, n) || n == 0 || n > kMost)))
      status = bad(piece, "must be device=tokens, or device=* at the end");
    else if (!parts.empty() && parts.back().second == kKvNoEnd)
      status = bad(piece, "stands behind a part with *, which takes all that follows");
    else
      parts.emplace_back(piece.substr(0, equals), n);
    return status.ok();
  });
  if (!status.ok()) return status;
  return parts;
}

Status read_kv(const Config& config, const std::vector<std::string>& names, PlacementPins& pins) {
  FATHOM_TRY_ASSIGN(const auto parts, read_kv_parts(config.placement_kv));
  for (const auto& [name, n_rows] : parts) {
    int device = -1;
    if (name != kHome) {
      FATHOM_TRY_ASSIGN(device, find_device(name, kKvKey, names));
    }
    pins.kv.push_back({device, n_rows});
  }
  return {};
}

Status twice(std::string_view key, const Part& part, std::string_view what) {
  return Status(Code::kConfig, fmt::format("{}: {}: {} is pinned to another device too", key,
                                           shown(part.text), what))
      .about(key);
}

Status read_layers(const Config& config, const std::vector<std::string>& names,
                   PlacementPins& pins) {
  FATHOM_TRY_ASSIGN(const auto parts, read_parts(config.placement_layers, false));
  Setter setter(pins.layers.size());
  for (const Part& part : parts) {
    FATHOM_TRY_ASSIGN(const int device, find_device(part.device, kLayersKey, names));
    const int rank = part.layers.empty() ? 1 : 2;
    FATHOM_TRY(each_in(part.layers, static_cast<int64_t>(pins.layers.size()), "layers", part,
                       kLayersKey, [&](int64_t l) -> Status {
                         if (setter.set(pins.layers, static_cast<size_t>(l), device, rank))
                           return {};
                         return twice(kLayersKey, part, fmt::format("layer {}", l));
                       }));
  }
  return {};
}

Status read_experts(const Config& config, const ModelConfig& model,
                    const std::vector<std::string>& names, PlacementPins& pins) {
  FATHOM_TRY_ASSIGN(const auto parts, read_parts(config.placement_experts, true));
  std::vector<Setter> setters(pins.experts.size(),
                              Setter(static_cast<size_t>(model.n_routed_experts)));
  for (const Part& part : parts) {
    FATHOM_TRY_ASSIGN(const int device, find_device(part.device, kExpertsKey, names));
    const bool all = !part.experts || part.experts->empty();
    const int rank = 1 + (part.layers.empty() ? 0 : 1) + (all ? 0 : 2);
    bool any = false;
    FATHOM_TRY(each_in(part.layers, static_cast<int64_t>(pins.layers.size()), "layers", part,
                       kExpertsKey, [&](int64_t l) -> Status {
                         std::vector<int>& experts = pins.experts[static_cast<size_t>(l)];
                         if (experts.empty()) return {};  // a dense layer in a range of layers
                         any = true;
                         return each_in(part.experts.value_or(Ranges{}), model.n_routed_experts,
                                        "experts", part, kExpertsKey, [&](int64_t e) -> Status {
                                          if (setters[static_cast<size_t>(l)].set(
                                                  experts, static_cast<size_t>(e), device, rank))
                                            return {};
                                          return twice(kExpertsKey, part,
                                                       fmt::format("expert {} of layer {}", e, l));
                                        });
                       }));
    if (!any)
      return Status(Code::kConfig, fmt::format("{}: {}: no layer there has routed experts",
                                               kExpertsKey, shown(part.text)))
          .about(kExpertsKey);
  }
  return {};
}

}  // namespace

bool PlacementPins::any_expert(size_t layer) const noexcept {
  return std::any_of(experts[layer].begin(), experts[layer].end(), [](int d) { return d >= 0; });
}

Status check_pins(std::string_view text, bool with_experts) {
  return read_parts(text, with_experts).status();
}

Status check_kv_pins(std::string_view text) {
  return read_kv_parts(text).status();
}

Result<PlacementPins> read_pins(const Config& config, const ModelConfig& model,
                                const std::vector<std::string>& devices) {
  PlacementPins pins;
  const auto n_layers = static_cast<size_t>(model.num_hidden_layers);
  pins.layers.assign(n_layers, -1);
  pins.experts.resize(n_layers);
  for (size_t l = 0; l < n_layers; ++l)
    if (model.is_moe_layer(static_cast<int64_t>(l)))
      pins.experts[l].assign(static_cast<size_t>(model.n_routed_experts), -1);
  FATHOM_TRY(read_layers(config, devices, pins));
  FATHOM_TRY(read_experts(config, model, devices, pins));
  FATHOM_TRY(read_kv(config, devices, pins));
  if (config.placement_embed != kAuto) {
    FATHOM_TRY_ASSIGN(pins.embed_device,
                      find_device(config.placement_embed, "placement.embed", devices));
  }
  if (config.placement_head != kAuto) {
    FATHOM_TRY_ASSIGN(pins.head_device,
                      find_device(config.placement_head, "placement.head", devices));
  }
  return pins;
}

}  // namespace fathom::run
