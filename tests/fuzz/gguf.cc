// A whole GGUF file.  Seeds: small_gguf() of tests/io_raw_files.h in both layouts, and a
// vocabulary.
#include "tensor_file_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  const Result<io::TensorFile> file = io::TensorFile::parse_gguf(test::fuzz_source(data, size));
  test::check_tensor_file(file);
  if (file.ok() && file->has_config()) test::check_model_config(file->config());
  return 0;
}
