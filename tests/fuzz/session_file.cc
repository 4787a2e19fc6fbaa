// A saved session, read with and without checksums: what is accepted without them must still be a
// session that works.  Seed: five tokens of the tiny model in pages of 16.
#include <cstring>

#include "lib/run/session_file.h"
#include "tensor_file_checks.h"

namespace {

const fathom::Model& tiny_model() {
  static const fathom::Model model = [] {
    fathom::Config config;
    for (const auto& [key, value] : {std::pair{"kv.page_tokens", "16"},
                                     {"prefill.chunk", "16"},
                                     {"context.max", "256"},
                                     {"kv.type", "f16"},
                                     {"threads", "1"}})
      fathom::test::require(config.set(key, value).ok());
    auto loaded = fathom::Model::load(FATHOM_TEST_DATA "/models/tiny-v2-lite", config);
    fathom::test::require(loaded.ok());
    return std::move(loaded).value();
  }();
  return model;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  const ReadFunction read = [&](int64_t offset, std::span<std::byte> out) {
    test::require(offset >= 0 && static_cast<size_t>(offset) <= size &&
                  out.size() <= size - static_cast<size_t>(offset));
    if (!out.empty()) std::memcpy(out.data(), data + offset, out.size());
    return Status();
  };
  for (const auto checksums : {run::Checksums::kVerified, run::Checksums::kIgnored}) {
    Result<Session> session =
        run::read_session(tiny_model(), read, static_cast<int64_t>(size), {}, {}, checksums);
    if (!session.ok()) {
      test::require(!session.status().message().empty());
      test::require(session.status().code() != Code::kInternal);
      continue;
    }
    for (const int32_t id : session->tokens())
      test::require(id >= 0 && id < tiny_model().config().vocab_size);
    test::require(session->cache().capacity_tokens() >= session->n_tokens());
    if (session->n_tokens() < session->max_tokens()) test::require(session->step(1).ok());
  }
  return 0;
}
