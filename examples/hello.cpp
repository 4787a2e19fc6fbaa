// Continues a text:  hello_cpp examples/models/trained.Q8_0.gguf "Once upon a time"
#include <cstdio>
#include <fathom/fathom.hpp>

static int report(const fathom::Status& status) {
  std::fprintf(stderr, "%.*s\n", static_cast<int>(status.message().size()),
               status.message().data());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s MODEL TEXT\n", argv[0]), 2;
  auto model = fathom::Model::load(argv[1]);
  if (!model.ok()) return report(model.status());
  if (!model->tokenizer()) return std::fprintf(stderr, "%s has no tokenizer\n", argv[1]), 1;
  auto session = fathom::Session::create(*model);
  if (!session.ok()) return report(session.status());

  std::vector<int32_t> ids;
  fathom::Status status = model->tokenizer()->encode(argv[2], {.add_bos = true}, ids);
  if (status.ok()) status = session->prefill(ids);
  if (!status.ok()) return report(status);

  auto result = session->generate({.max_new_tokens = 64}, [](const fathom::GeneratedToken& token) {
    return std::fwrite(token.text.data(), 1, token.text.size(), stdout) == token.text.size();
  });
  if (!result.ok()) return report(result.status());
  std::puts("");
  return 0;
}
