// CpuBackend as a whole: options obeyed or refused, what it says about itself, its memory calls,
// and operations from several threads at once.
#include "cpu/cpu_backend.h"

#include <catch2/catch.hpp>
#include <thread>

#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

TEST_CASE("options are obeyed") {
  for (const std::string& isa : runnable_isas())
    for (const int threads : {1, 3}) {
      CpuOptions options;
      options.name = "host";
      options.isa = isa;
      options.threads = threads;
      options.numerics = Numerics::kExact;
      auto made = make_cpu_backend(options);
      REQUIRE(made.ok());
      Backend& backend = **made;
      CHECK(backend.kind() == DeviceKind::kCpu);
      CHECK(backend.name() == "host");
      CHECK(backend.host_accessible());
      const std::string text = backend.describe();
      CHECK(text.find("instruction set " + isa + " (as configured)") != std::string::npos);
      CHECK(text.find(fmt::format("{} thread", threads)) != std::string::npos);
      CHECK(text.find("numerics exact") != std::string::npos);
      CHECK(backend.runtime_bytes() >= (threads - 1) * cpu::ThreadPool::kStackBytes);
      CHECK(backend.runtime_bytes() < threads * cpu::ThreadPool::kStackBytes);
    }
}

TEST_CASE("the defaults say what was chosen and what was refused") {
  auto made = make_cpu_backend({});
  REQUIRE(made.ok());
  const std::string text = (*made)->describe();
  CHECK((*made)->name() == "cpu");
  CHECK(text.find("best that runs here") != std::string::npos);
  CHECK(text.find("numerics fast") != std::string::npos);
  for (const IsaInfo& info : cpu_isas())
    CHECK((text.find("not " + info.name + ": ") != std::string::npos) == !info.available);
}

TEST_CASE("options that cannot be obeyed are refused") {
  CpuOptions options;
  options.isa = "sse9";
  auto made = make_cpu_backend(options);
  REQUIRE_FALSE(made.ok());
  CHECK(made.status().code() == Code::kConfig);
  CHECK(made.status().key() == "isa");
  options.isa = "auto";
  for (const int threads : {-1, 100000}) {
    options.threads = threads;
    auto refused = make_cpu_backend(options);
    REQUIRE_FALSE(refused.ok());
    CHECK(refused.status().code() == Code::kConfig);
    CHECK(refused.status().key() == "threads");
    CHECK(refused.status().message().find(std::to_string(threads)) != std::string_view::npos);
  }
}

TEST_CASE("memory is reserved, committed, used and given back") {
  auto backend = make_backend("auto", 1);
  const int64_t unit = backend->granularity();
  CHECK(unit > 0);
  auto base = backend->reserve(10 * unit);
  REQUIRE(base.ok());
  CHECK(reinterpret_cast<uintptr_t>(*base) % static_cast<uintptr_t>(unit) == 0);
  REQUIRE(backend->commit(*base, 2 * unit, 3 * unit).ok());
  auto* data = static_cast<char*>(*base) + 2 * unit;
  CHECK(data[0] == 0);
  CHECK(backend->upload(data, "four", 4).ok());
  char back[4];
  CHECK(backend->download(back, data, 4).ok());
  CHECK(std::string(back, 4) == "four");
  CHECK(backend->upload(nullptr, nullptr, 0).ok());
  backend->decommit(*base, 2 * unit, 3 * unit);
  REQUIRE(backend->commit(*base, 0, 10 * unit).ok());
  CHECK(data[0] == 0);
  backend->release(*base, 10 * unit);
  const MemoryState state = backend->memory();
  CHECK(state.total_bytes > 0);
  CHECK(state.free_bytes <= state.total_bytes);
  CHECK(backend->sync({}).ok());
}

TEST_CASE("operations may come from several threads at once") {
  auto backend = make_backend("auto", 3);
  const int64_t n = 64, width = 700;
  const std::vector<float> x = random_values(n * width, 1), weight = random_values(width, 2);
  const auto norm = [&] {
    std::vector<float> out(static_cast<size_t>(n * width));
    backend->rms_norm({}, {.x = x.data(),
                           .x_stride = width,
                           .weight = weight.data(),
                           .eps = 1e-6f,
                           .n_rows = n,
                           .n_cols = width,
                           .out = out.data(),
                           .out_stride = width});
    return out;
  };
  const std::vector<float> expected = norm();
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) wrong += norm() != expected;
    });
  for (std::thread& t : callers) t.join();
  CHECK(wrong == 0);
}
