// Fathom: DeepSeek-family models (MLA + MoE), long text without memory surprises.
// This is the door; a whole program:
//
//   #include <fathom/fathom.hpp>
//   #include <cstdio>
//
//   int main() {
//     auto model = fathom::Model::load("model.gguf");
//     if (!model.ok()) return std::fprintf(stderr, "%s\n", model.status().message().data()), 1;
//     auto session = fathom::Session::create(*model);
//     std::vector<int32_t> ids;
//     if (!model->tokenizer()->encode("Once upon a time", {.add_bos = true}, ids).ok()) return 1;
//     if (!session->prefill(ids).ok()) return 1;
//     auto result = session->generate({.max_new_tokens = 64}, [](const fathom::GeneratedToken& t) {
//       return std::fwrite(t.text.data(), 1, t.text.size(), stdout) == t.text.size();
//     });
//     return result.ok() ? 0 : 1;
//   }
//
// Read next: model.hpp, session.hpp, plan.hpp, config.hpp, memory.hpp.  backend.hpp is for those
// who add a device.
#pragma once

#include "fathom/backend.hpp"
#include "fathom/config.hpp"
#include "fathom/engine.hpp"
#include "fathom/kv_cache.hpp"
#include "fathom/kv_page.hpp"
#include "fathom/machine.hpp"
#include "fathom/memory.hpp"
#include "fathom/model.hpp"
#include "fathom/model_config.hpp"
#include "fathom/plan.hpp"
#include "fathom/sampling.hpp"
#include "fathom/session.hpp"
#include "fathom/status.hpp"
#include "fathom/tensor.hpp"
#include "fathom/timeline.hpp"
#include "fathom/tokenizer.hpp"
#include "fathom/tune.hpp"
#include "fathom/version.hpp"
