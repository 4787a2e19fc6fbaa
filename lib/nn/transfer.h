// Copies between the memories of two devices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fathom/backend.hpp"
#include "fathom/model_config.hpp"
#include "fathom/placement.hpp"
#include "layers.h"

namespace fathom::nn {

// Host memory that transfer() needs between these devices for passes of n_tokens rows: one block of
// hidden rows, or of queries that go to rows of the cache, when neither end can be read by the
// host, else nothing.
int64_t staging_bytes(const Placement& placement, std::span<const Backend* const> devices,
                      const ModelConfig& config, int64_t n_tokens) noexcept;

// Copies `bytes` from memory of `from` to memory of `to`; both have no work queued on these bytes.
// `staging` holds as many bytes when neither is readable by the host; else it is not used.
Status transfer(Backend& from, const void* source, Backend& to, void* target, int64_t bytes,
                std::byte* staging) noexcept;

// The hidden rows of a pass (x_norm) and the experts chosen for them, from the layer's device to
// another one that has some of them.  Errors: kDevice.
Status send_rows(const Step& step, const Stage& guest, std::byte* staging) noexcept;

}  // namespace fathom::nn
