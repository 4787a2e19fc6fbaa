// Machine files: whatever is accepted can be written and read back as the same text.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "fathom/machine.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto machine = fathom::MachineDescription::parse(
      std::string_view(reinterpret_cast<const char*>(data), size));
  if (!machine.ok()) return 0;
  const std::string text = machine->to_json();
  const auto again = fathom::MachineDescription::parse(text);
  if (!again.ok() || again->to_json() != text) std::abort();
  const int n = static_cast<int>(machine->devices.size());
  for (int a = 0; a < n; ++a)
    for (int b = a + 1; b < n; ++b)
      if (machine->link(a, b).from != a || machine->link(b, a).to != b) std::abort();
  return 0;
}
