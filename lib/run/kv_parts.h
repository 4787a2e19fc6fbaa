// Where the pages of a session's cache lie, for plan, allocation and forecast alike: the layers of
// each device (`home`) have pages of their own, and runs of these pages lie on devices.
#pragma once

#include <span>
#include <vector>

#include "fathom/placement.hpp"
#include "fathom/plan.hpp"
#include "memory_range.h"

namespace fathom::run {

// Pages [first_page, end_page) of the layers of `home`, on `device`.
struct KvPart {
  int home = 0, device = 0;
  int64_t first_page = 0, end_page = 0;
};

// All parts, by home and page, of a cache of at most `max_pages` pages.  A home without layers has
// one part of its own.
std::vector<KvPart> kv_parts(std::span<const KvSpan> spans,
                             std::span<const int64_t> layers_on_device, int64_t page_tokens,
                             int64_t max_pages);
// Those of a plan, for any number of pages.
std::vector<KvPart> kv_parts(const Plan& plan);

// Committed bytes of one page of a part: all layers of its home.
inline int64_t kv_page_bytes(const KvLayout& layout, KvType type, int64_t n_layers,
                             int64_t granularity) noexcept {
  return committed_bytes(layout.page_bytes(type, n_layers), granularity);
}
int64_t kv_page_bytes(const Plan& plan, const KvPart& part, KvType type) noexcept;
// The same without rounding to what the device commits: as a page is in the file.
int64_t kv_payload_bytes(const Plan& plan, const KvPart& part, KvType type) noexcept;

}  // namespace fathom::run
