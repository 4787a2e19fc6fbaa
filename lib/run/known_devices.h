// Devices known by name, with the rates that a machine file may leave out.
#pragma once

#include <string_view>

#include "fathom/machine.hpp"

namespace fathom::run {

// Fills in the rates of `device` that are 0: those of `like`, or of its kind's default when `like`
// is empty.  False when there is no such device of this kind.
bool fill_documented(MachineDevice& device);

// The documented link between devices of these kinds.
MachineLink documented_link(DeviceKind a, DeviceKind b) noexcept;

// Reads of a file that the system does not hold in memory: an NVMe disk behind PCIe 3.0.
inline constexpr double kDocumentedFileRate = 2e9;

}  // namespace fathom::run
