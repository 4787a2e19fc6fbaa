// A whole safetensors file.  Seed: small_safetensors() of tests/io_raw_files.h.
#include "tensor_file_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  test::check_tensor_file(io::TensorFile::parse_safetensors(test::fuzz_source(data, size)));
  return 0;
}
