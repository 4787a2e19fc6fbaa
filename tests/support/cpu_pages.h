// Pages of a KV cache for the tests of the CPU backend: given rows are written into pages of given
// types, and the rows as the pages hold them are known.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/page_codec.h"
#include "cpu/rows.h"
#include "fathom/kv_page.hpp"

namespace fathom::cpu_test {

class Pages {
 public:
  // `types` are given to the pages in turn.  rows: [n_rows, r + rope].
  Pages(int64_t page_tokens, int64_t r, int64_t rope, std::vector<KvType> types, int64_t n_rows,
        int64_t n_layers = 1, int64_t layer_slot = 0) {
    rows_.layout = {page_tokens, r, rope};
    rows_.layer_slot = layer_slot;
    rows_.n_rows = n_rows;
    const int64_t n_pages = (n_rows + page_tokens - 1) / page_tokens;
    for (int64_t i = 0; i < n_pages; ++i) {
      const KvType type = types[static_cast<size_t>(i) % types.size()];
      const auto bytes = static_cast<size_t>(rows_.layout.page_bytes(type, n_layers));
      memory_.emplace_back(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
      std::memset(memory_.back().get(), 0xff, bytes);  // rows that nobody wrote are NaN
      pages_.push_back({memory_.back().get(), type});
    }
    rows_.pages = pages_.data();
  }

  void write(const std::vector<float>& values) {
    const auto [page_tokens, r, rope] = rows_.layout;
    const cpu::RowKernels& scalar = cpu::row_kernels(cpu::Isa::kScalar);
    for (int64_t row = 0; row < rows_.n_rows; ++row) {
      const cpu::PageRun run = cpu::page_run(rows_, row, 1);
      const float* x = values.data() + row * (r + rope);
      for (int64_t c = 0; c < r; c += cpu::kEncodeColumns)
        cpu::encode_columns(scalar, cpu::latent_row_type(run.type), x + c, c,
                            std::min(cpu::kEncodeColumns, r - c), r, run.latent);
      for (int64_t c = 0; c < rope; c += cpu::kEncodeColumns)
        cpu::encode_columns(scalar, cpu::rope_row_type(run.type), x + r + c, c,
                            std::min(cpu::kEncodeColumns, rope - c), rope, run.rope);
    }
  }

  // [n_rows, r + rope], as decode_row() reads them.
  std::vector<float> decoded() const {
    const auto [page_tokens, r, rope] = rows_.layout;
    std::vector<float> values(static_cast<size_t>(rows_.n_rows * (r + rope)));
    for (int64_t row = 0; row < rows_.n_rows; ++row) {
      const cpu::PageRun run = cpu::page_run(rows_, row, 1);
      float* x = values.data() + row * (r + rope);
      cpu::decode_row(cpu::latent_row_type(run.type), run.latent, r, x);
      cpu::decode_row(cpu::rope_row_type(run.type), run.rope, rope, x + r);
    }
    return values;
  }

  const KvRows& rows() const { return rows_; }
  KvRows rows(int64_t first, int64_t n) const {
    KvRows part = rows_;
    part.first_row = first;
    part.n_rows = n;
    return part;
  }
  KvPage& page(int64_t index) { return pages_[static_cast<size_t>(index)]; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<std::byte[], Free>> memory_;
  std::vector<KvPage> pages_;
  KvRows rows_;
};

}  // namespace fathom::cpu_test
