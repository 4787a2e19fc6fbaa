// The text of the demo: ship's logs and small stories, made up from word lists by a seeded
// generator, with one code planted in it and other codes as distraction.  The small model in
// examples/models was trained on texts of this kind.
#pragma once

#include <cstdint>
#include <string>

namespace cli {

struct DemoText {
  std::string text;        // paragraphs
  std::string question;    // "What is the greenhouse code?"
  std::string code;        // "8158"
  size_t code_offset = 0;  // of the sentence with the code, in bytes of `text`
};

// About `n_chars` bytes; the code stands `depth` (0 .. 1) of the way into the text.  Same
// arguments, same text, on every machine.
DemoText make_demo_text(uint64_t seed, size_t n_chars, double depth);

}  // namespace cli
