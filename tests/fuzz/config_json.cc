// The text of a config.json.  Seeds: those of the golden checkpoints.
#include <string_view>

#include "lib/io/model_config.h"
#include "tensor_file_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const Result<ModelConfig> config = io::parse_config_json(text);
  if (config.ok())
    test::check_model_config(*config);
  else
    test::require(!config.status().message().empty());
  return 0;
}
