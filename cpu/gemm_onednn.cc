// oneDNN behind Bf16Gemm.  Scratch comes from the caller; products whose implementation would
// allocate its own (those named "gemm:...") are refused.
#include "cpu/gemm_onednn.h"

#ifdef FATHOM_HAVE_ONEDNN

#include <algorithm>
#include <cstring>
#include <dnnl.hpp>
#include <mutex>
#include <new>

#include "cpu/isa.h"

// oneDNN runs on OpenMP, whose teams collapse on shared cores: each of our workers is a team of
// one.  Weak, because the library is loaded by oneDNN and not by us.
extern "C" {
void omp_set_num_threads(int n) __attribute__((weak));
int omp_get_max_threads() __attribute__((weak));
}

namespace fathom::cpu {
namespace {

// One thread per team while it lives; the host's own setting comes back afterwards.
class SingleThread {
 public:
  SingleThread() noexcept {
    if (omp_set_num_threads == nullptr || omp_get_max_threads == nullptr) return;
    before_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
  ~SingleThread() {
    if (before_ > 0) omp_set_num_threads(before_);
  }

 private:
  int before_ = 0;
};

using dnnl::memory;

}  // namespace

struct Bf16Gemm::Impl {
  dnnl::engine engine;
  memory::desc x, weights, out, scratch;
  dnnl::matmul product;
};

bool onednn_serves_bf16() noexcept {
  return cpu_features().avx512_bf16;
}
const char* onednn_refusal() noexcept {
  return onednn_serves_bf16() ? "" : "the processor lacks AVX512_BF16";
}

namespace {

// A product before it is made: nothing is generated for it yet.
struct Description {
  dnnl::engine engine;
  memory::desc x, weights, out;
  dnnl::matmul::primitive_desc product;
  bool refused;

  Description(int64_t n_rows, int64_t n_cols, int64_t k)
      : engine(dnnl::engine::kind::cpu, 0),
        x({n_rows, k}, memory::data_type::bf16, memory::dims{k, 1}),
        weights({k, n_cols}, memory::data_type::bf16, memory::dims{1, k}),
        out({n_rows, n_cols}, memory::data_type::f32, memory::dims{n_cols, 1}) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    product = dnnl::matmul::primitive_desc(engine, x, weights, out, attributes);
    refused = std::strncmp(product.impl_info_str(), "brg:", 4) != 0;
  }
};

// What products want, once known: later answers do not depend on the heap.  Models have six shapes
// or so; those beyond the last place are asked for again.
class Answers {
 public:
  struct Shape {
    int64_t n_rows = 0, n_cols = 0, k = 0;
    bool operator==(const Shape&) const = default;
  };
  // -1: not known.
  int64_t find(const Shape& shape) noexcept {
    const std::lock_guard lock(mutex_);
    Answer* const end = answers_ + n_;
    Answer* const found =
        std::find_if(answers_, end, [&](const Answer& answer) { return answer.shape == shape; });
    return found == end ? -1 : found->bytes;
  }
  void keep(const Shape& shape, int64_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    if (n_ < kMost) answers_[n_++] = {shape, bytes};
  }

 private:
  struct Answer {
    Shape shape;
    int64_t bytes = 0;
  };
  static constexpr int kMost = 64;
  std::mutex mutex_;
  Answer answers_[kMost];
  int n_ = 0;
};
Answers answers;

}  // namespace

int64_t Bf16Gemm::scratch_bytes(int64_t n_rows, int64_t n_cols, int64_t k) noexcept try {
  if (n_rows == 0 || n_cols == 0 || !onednn_serves_bf16()) return 0;
  const Answers::Shape shape{n_rows, n_cols, k};
  if (const int64_t known = answers.find(shape); known >= 0) return known;
  const SingleThread single;  // how much scratch a product wants depends on the team
  const Description d(n_rows, n_cols, k);
  if (d.refused) return 0;
  const auto bytes = static_cast<int64_t>(d.product.scratchpad_desc().get_size());
  answers.keep(shape, bytes);
  return bytes;
} catch (const dnnl::error&) {
  return 0;
} catch (const std::bad_alloc&) {
  return 0;
}

Bf16Gemm::Bf16Gemm(int64_t n_rows, int64_t n_cols, int64_t k) noexcept {
  if (n_rows == 0 || n_cols == 0) {
    refused_ = false;
    return;
  }
  if (!onednn_serves_bf16()) return;
  try {  // not around the constructor, which would throw on
    const SingleThread single;
    const Description d(n_rows, n_cols, k);
    if (d.refused) return;
    impl_.reset(new Impl{d.engine, d.x, d.weights, d.out, d.product.scratchpad_desc(),
                         dnnl::matmul(d.product)});
    refused_ = false;
  } catch (const dnnl::error&) {
  } catch (const std::bad_alloc&) {
  }
}

Bf16Gemm::~Bf16Gemm() = default;
Bf16Gemm::Bf16Gemm(Bf16Gemm&&) noexcept = default;

int64_t Bf16Gemm::scratch_bytes() const noexcept {
  return impl_ == nullptr ? 0 : static_cast<int64_t>(impl_->scratch.get_size());
}

bool Bf16Gemm::run(const uint16_t* x, const uint16_t* weights, float* out,
                   std::byte* scratch) const noexcept try {
  if (impl_ == nullptr) return !refused_;
  const SingleThread single;
  dnnl::stream stream(impl_->engine);
  const auto at = [&](const memory::desc& desc, const void* data) {
    return memory(desc, impl_->engine, const_cast<void*>(data));
  };
  impl_->product.execute(stream, {{DNNL_ARG_SRC, at(impl_->x, x)},
                                  {DNNL_ARG_WEIGHTS, at(impl_->weights, weights)},
                                  {DNNL_ARG_DST, at(impl_->out, out)},
                                  {DNNL_ARG_SCRATCHPAD, at(impl_->scratch, scratch)}});
  stream.wait();
  return true;
} catch (const dnnl::error&) {
  return false;
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace fathom::cpu

#else

namespace fathom::cpu {

struct Bf16Gemm::Impl {};

bool onednn_serves_bf16() noexcept {
  return false;
}
const char* onednn_refusal() noexcept {
  return "not built in";
}
Bf16Gemm::Bf16Gemm(int64_t n_rows, int64_t n_cols, int64_t) noexcept
    : refused_(n_rows != 0 && n_cols != 0) {}
Bf16Gemm::~Bf16Gemm() = default;
Bf16Gemm::Bf16Gemm(Bf16Gemm&&) noexcept = default;
int64_t Bf16Gemm::scratch_bytes() const noexcept {
  return 0;
}
int64_t Bf16Gemm::scratch_bytes(int64_t, int64_t, int64_t) noexcept {
  return 0;
}
bool Bf16Gemm::run(const uint16_t*, const uint16_t*, float*, std::byte*) const noexcept {
  return !refused_;
}

}  // namespace fathom::cpu

#endif
