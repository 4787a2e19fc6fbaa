// The golden models, by the names that test_data() takes.
#pragma once

namespace fathom::test {

// Every architecture, file layout and dense type, and the two usual quantisations.
inline constexpr const char* kGoldenModels[] = {
    "models/tiny-v2",
    "models/tiny-v2-lite",
    "models/tiny-v2-lite-sharded",
    "models/tiny-v3",
    "models/tiny-v3-fp8",
    "gguf/tiny-v2.old.F16.gguf",
    "gguf/tiny-v2.new.BF16.gguf",
    "gguf/tiny-v2-lite.mid.F16.gguf",
    "gguf/tiny-v3.new.BF16.gguf",
    "quant/quant.Q8_0.gguf",
    "quant/quant.Q4_K_M.gguf",
};

// All others.
inline constexpr const char* kMoreGoldenModels[] = {
    "gguf/tiny-v2-lite.old.F16.gguf", "gguf/tiny-v2-lite.split-00001-of-00003.gguf",
    "quant/quant.Q2_K.gguf",          "quant/quant.Q3_K.gguf",
    "quant/quant.Q4_0.gguf",          "quant/quant.Q4_K.gguf",
    "quant/quant.Q5_K.gguf",          "quant/quant.Q6_K.gguf",
    "quant/quant.IQ4_NL.gguf",        "trained/trained.Q8_0.gguf",
};

}  // namespace fathom::test
