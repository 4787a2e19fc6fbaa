// The small programs of examples/ in C, C++ and Python: they run, agree, and fail politely.
#include <sys/wait.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

namespace {

struct Output {
  std::string text;  // stdout and stderr together
  int exit_code = -1;
};

Output run(const std::string& command) {
  Output out;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.text.append(buffer, n);
  const int status = pclose(pipe);
  if (WIFEXITED(status)) out.exit_code = WEXITSTATUS(status);
  return out;
}

const std::string kC = "'" FATHOM_BINARY_DIR "/bin/hello_c'";
const std::string kCpp = "'" FATHOM_BINARY_DIR "/bin/hello_cpp'";
const std::string kPython = "FATHOM_LIBRARY='" FATHOM_BINARY_DIR
                            "/lib/libfathom.so' python3 '" FATHOM_SOURCE_DIR "/examples/hello.py'";
const std::string kModel = " '" FATHOM_EXAMPLE_MODEL "'";

bool built() {
  if (std::ifstream(FATHOM_BINARY_DIR "/bin/hello_c") &&
      std::ifstream(FATHOM_BINARY_DIR "/bin/hello_cpp"))
    return true;
  WARN("SKIPPED: the examples are not built");
  return false;
}

// An instrumented library cannot be loaded into a plain Python.
bool instrumented() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return true;
#else
  return false;
#endif
}

}  // namespace

TEST_CASE("hello in C, C++ and Python continue a text alike") {
  if (!built()) return;
  const Output c = run(kC + kModel + " 'Once upon a time'");
  CHECK(c.exit_code == 0);
  CHECK(c.text.size() > 100);
  const Output cpp = run(kCpp + kModel + " 'Once upon a time'");
  CHECK(cpp.exit_code == 0);
  CHECK(cpp.text == c.text);
  if (instrumented()) return;
  const Output python = run(kPython + kModel + " 'Once upon a time'");
  CHECK(python.exit_code == 0);
  CHECK(python.text == c.text);
}

TEST_CASE("hello without a model says which file is missing") {
  if (!built()) return;
  for (const std::string& program : {kC, kCpp, kPython}) {
    if (program == kPython && instrumented()) continue;
    const Output out = run(program + " /no/such.gguf text");
    INFO(program << ": " << out.text);
    CHECK(out.exit_code == 1);
    CHECK(out.text.find("/no/such.gguf") != std::string::npos);
  }
  CHECK(run(kC).exit_code == 2);
  CHECK(run(kCpp).exit_code == 2);
}
