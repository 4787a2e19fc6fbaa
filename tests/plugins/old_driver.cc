// A driver of NVIDIA that is too old, as far as the CUDA runtime asks: a library with the driver's
// name (libcuda.so.1), which the runtime takes once it is loaded.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0, kNotFound = 500;
constexpr int kVersion = 11040;  // CUDA 11.4

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int cuInit(unsigned) {
  return kSuccess;
}
__attribute__((visibility("default"))) int cuDriverGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}
__attribute__((visibility("default"))) int cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}
__attribute__((visibility("default"))) int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return kNotFound;
}
__attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* name, void** function,
                                                               int, uint64_t, int* found) {
  *function =
      std::strcmp(name, "cuInit") == 0               ? reinterpret_cast<void*>(cuInit)
      : std::strcmp(name, "cuDriverGetVersion") == 0 ? reinterpret_cast<void*>(cuDriverGetVersion)
      : std::strcmp(name, "cuGetProcAddress") == 0   ? reinterpret_cast<void*>(cuGetProcAddress_v2)
                                                     : nullptr;
  if (found != nullptr) *found = *function == nullptr;
  return *function != nullptr ? kSuccess : kNotFound;
}
__attribute__((visibility("default"))) int cuGetProcAddress(const char* name, void** function,
                                                            int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

}  // extern "C"
