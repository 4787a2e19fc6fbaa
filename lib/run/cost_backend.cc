#include "cost_backend.h"

#include <fmt/format.h>

namespace fathom::run {
namespace {

Status holds_nothing() noexcept {
  return Status(Code::kInternal, "a backend that only adds up times holds nothing");
}

}  // namespace

std::string CostBackend::describe() const {
  return fmt::format(
      "{}: simulated, {:.1f} GiB, {:.0f} GB/s, {:.1f} / {:.1f} / {:.1f} TFLOP/s (quantised, dense, "
      "attention), {:.1f} us per operation; rates {}",
      device_.name, static_cast<double>(device_.bytes) / (int64_t{1} << 30),
      device_.read_bytes_per_s / 1e9, device_.quantised_flops_per_s / 1e12,
      device_.dense_flops_per_s / 1e12, device_.attention_flops_per_s / 1e12,
      device_.operation_s * 1e6, rate_source_name(device_.source));
}

Result<void*> CostBackend::reserve(int64_t) noexcept {
  return holds_nothing();
}
Status CostBackend::commit(void*, int64_t, int64_t) noexcept {
  return holds_nothing();
}
Status CostBackend::weight_layout(Weight&) const noexcept {
  return holds_nothing();
}

void CostBackend::spend(const Work& work, bool routed) noexcept {
  const double s = seconds(device_, work);
  busy_ += s;
  if (routed) experts_ += s;
}

double CostBackend::row_bytes(const KvRows& rows) const noexcept {
  return static_cast<double>(rows.layout.latent_row_bytes(kv_type_) +
                             rows.layout.rope_row_bytes(kv_type_));
}

}  // namespace fathom::run
