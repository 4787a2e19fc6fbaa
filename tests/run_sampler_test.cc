// Sampler: cuts and penalties on cases computed by hand, frequencies, hostile logits, memory.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "fathom/sampling.hpp"

using namespace fathom;
using Catch::Contains;

namespace {
int64_t allocations = 0;  // counted by the operators below
}

// Not inlined: the compiler would see malloc paired with delete and warn.
[[gnu::noinline]] void* operator new(size_t n) {
  ++allocations;
  if (void* p = std::malloc(n ? n : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t n, const std::nothrow_t&) noexcept {
  return std::malloc(n ? n : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Sampler make(const SamplingOptions& options) {
  Result<Sampler> sampler = Sampler::create(options);
  REQUIRE(sampler.ok());
  return std::move(*sampler);
}

int32_t pick(Sampler& sampler, const std::vector<float>& logits,
             const std::vector<int32_t>& history = {}) {
  const Result<int32_t> id = sampler.pick(logits, history);
  REQUIRE(id.ok());
  return *id;
}

// How often each token comes in n draws.
std::map<int32_t, int> draws(const SamplingOptions& options, const std::vector<float>& logits,
                             int n, const std::vector<int32_t>& history = {}) {
  Sampler sampler = make(options);
  std::map<int32_t, int> counts;
  for (int i = 0; i < n; ++i) ++counts[pick(sampler, logits, history)];
  return counts;
}

std::set<int32_t> support(const SamplingOptions& options, const std::vector<float>& logits,
                          const std::vector<int32_t>& history = {}) {
  std::set<int32_t> ids;
  for (const auto& [id, count] : draws(options, logits, 2000, history)) ids.insert(id);
  return ids;
}

// Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 at shuffled places.
const std::vector<float> kHalves = {std::log(0.125f), std::log(0.5f), std::log(0.0625f),
                                    std::log(0.25f), std::log(0.0625f)};

}  // namespace

TEST_CASE("options out of range are refused by name, NaN included") {
  const auto refused = [](SamplingOptions options, const char* name) {
    const Result<Sampler> sampler = Sampler::create(options);
    REQUIRE(!sampler.ok());
    CHECK(sampler.status().code() == Code::kInvalidArgument);
    CHECK(sampler.status().key() == name);
    CHECK_THAT(std::string(sampler.status().message()), Contains(name) && Contains("must be in"));
  };
  for (const float v : {-1.0f, 101.0f, kNan, kInf, -kInf})
    refused({.temperature = v}, "temperature");
  refused({.top_k = -1}, "top_k");
  for (const float v : {0.0f, -0.5f, 1.5f, kNan}) refused({.top_p = v}, "top_p");
  for (const float v : {-0.1f, 1.1f, kNan}) refused({.min_p = v}, "min_p");
  for (const float v : {0.0f, -1.0f, 101.0f, kNan})
    refused({.repeat_penalty = v}, "repeat_penalty");
  refused({.repeat_window = -1}, "repeat_window");
  refused({.repeat_window = (1 << 20) + 1}, "repeat_window");
}

TEST_CASE("greedy takes the best, the lowest id among equals") {
  Sampler greedy = make({});
  CHECK(pick(greedy, {1, 3, 2}) == 1);
  CHECK(pick(greedy, {-5, 7, 7, 7}) == 1);
  CHECK(pick(greedy, {0.0f, -0.0f}) == 0);
  CHECK(pick(greedy, {-kInf, -kInf, -3}) == 2);
  CHECK(pick(greedy, {42}) == 0);
  // top-k, top-p and min-p do not matter.
  Sampler all = make({.top_k = 1, .top_p = 0.1f, .min_p = 1});
  CHECK(pick(all, {1, 3, 2}) == 1);
}

TEST_CASE("broken logits are an error, not a token") {
  for (const float temperature : {0.0f, 1.0f}) {
    Sampler sampler = make({.temperature = temperature, .top_k = 2, .top_p = 0.9f});
    const auto error = [&](const std::vector<float>& logits) {
      const Result<int32_t> id = sampler.pick(logits, {});
      REQUIRE(!id.ok());
      return id.status().clone();
    };
    CHECK(error({1, kNan, 2}).code() == Code::kNumeric);
    CHECK_THAT(std::string(error({1, kNan, 2}).message()), Contains("token 1") && Contains("nan"));
    CHECK(error({1, 2, kInf}).code() == Code::kNumeric);
    CHECK_THAT(std::string(error({1, 2, kInf}).message()), Contains("token 2"));
    CHECK(error({-kInf, -kInf}).code() == Code::kNumeric);
    CHECK(error({}).code() == Code::kInvalidArgument);
    CHECK(pick(sampler, {-kInf, 1, -kInf}) == 1);
  }
}

TEST_CASE("frequencies follow the probabilities") {
  const int n = 40000;
  const std::map<int32_t, int> counts = draws({.temperature = 1, .seed = 1}, kHalves, n);
  const double p[] = {0.125, 0.5, 0.0625, 0.25, 0.0625};
  double chi2 = 0;
  for (int i = 0; i < 5; ++i) {
    const double expected = p[i] * n;
    chi2 += std::pow(counts.at(i) - expected, 2) / expected;
  }
  CHECK(chi2 < 18.5);  // 4 degrees of freedom: exceeded once in a thousand seeds; this one is fixed
}

TEST_CASE("temperature sharpens and flattens") {
  const std::vector<float> logits = {0, std::log(4.0f)};
  const int n = 40000;
  const auto share = [&](float t) {
    return draws({.temperature = t, .seed = 3}, logits, n).at(1) / double(n);
  };
  CHECK(share(1) == Approx(4.0 / 5).margin(0.01));
  CHECK(share(0.5f) == Approx(16.0 / 17).margin(0.01));
  CHECK(share(2) == Approx(2.0 / 3).margin(0.01));
  CHECK(support({.temperature = 1e-30f}, logits) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1e-45f}, {-3e38f, 3e38f}) == std::set<int32_t>{1});
}

TEST_CASE("top-k keeps the k most likely, the lower id among equals") {
  CHECK(support({.temperature = 1, .top_k = 1}, kHalves) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1, .top_k = 2}, kHalves) == std::set<int32_t>{1, 3});
  CHECK(support({.temperature = 1, .top_k = 3}, kHalves) == std::set<int32_t>{0, 1, 3});
  CHECK(support({.temperature = 1, .top_k = 4}, kHalves) == std::set<int32_t>{0, 1, 2, 3});
  CHECK(support({.temperature = 1, .top_k = 99}, kHalves).size() == 5);
  CHECK(support({.temperature = 1, .top_k = 3}, std::vector<float>(1000, 2.5f)) ==
        std::set<int32_t>{0, 1, 2});
}

TEST_CASE("top-p keeps the smallest set that reaches the probability") {
  CHECK(support({.temperature = 1, .top_p = 0.01f}, kHalves) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1, .top_p = 0.49f}, kHalves) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1, .top_p = 0.51f}, kHalves) == std::set<int32_t>{1, 3});
  CHECK(support({.temperature = 1, .top_p = 0.74f}, kHalves) == std::set<int32_t>{1, 3});
  CHECK(support({.temperature = 1, .top_p = 0.76f}, kHalves) == std::set<int32_t>{0, 1, 3});
  CHECK(support({.temperature = 1, .top_p = 0.93f}, kHalves) == std::set<int32_t>{0, 1, 2, 3});
  CHECK(support({.temperature = 1, .top_p = 0.95f}, kHalves).size() == 5);
  CHECK(support({.temperature = 1, .top_p = 1e-30f}, kHalves) == std::set<int32_t>{1});
  // Of the tokens that top-k left: 0.5 and 0.25 are 2/3 and 1/3 of them.
  CHECK(support({.temperature = 1, .top_k = 2, .top_p = 0.6f}, kHalves) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1, .top_k = 2, .top_p = 0.7f}, kHalves) == std::set<int32_t>{1, 3});
}

TEST_CASE("top-p over a flat vocabulary keeps a prefix of the ids") {
  // 512 equal tokens: a quarter of them is the nucleus, ties in the order of the ids.
  const std::vector<float> flat(512, -1.0f);
  for (const float p : {0.25f, 0.5f, 0.75f}) {
    const auto counts = draws({.temperature = 1, .top_p = p, .seed = 5}, flat, 8000);
    const auto kept = static_cast<int32_t>(512 * p);
    CHECK(counts.rbegin()->first < kept);
    CHECK(static_cast<int>(counts.size()) > kept * 99 / 100);
  }
}

TEST_CASE("top-p agrees with sorting everything") {
  // A peaked distribution over 50,000 tokens; the reference sorts and sums in double.
  std::vector<float> logits(20000);
  uint32_t x = 1;
  for (float& l : logits) {
    x = x * 1664525 + 1013904223;
    l = static_cast<float>(x >> 8) / (1 << 24) * 18;
  }
  std::vector<std::pair<double, int32_t>> sorted;
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    sorted.emplace_back(std::exp(double{logits[i]} - 18), static_cast<int32_t>(i));
    total += sorted.back().first;
  }
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  });
  for (const float p : {0.001f, 0.1f, 0.5f, 0.9f}) {
    double sum = 0;
    size_t n = 0;
    std::set<int32_t> nucleus;
    while (sum < double{p} * total) {
      sum += sorted[n].first;
      nucleus.insert(sorted[n++].second);
    }
    Sampler sampler = make({.temperature = 1, .top_p = p, .seed = 11});
    std::set<int32_t> seen;
    const int n_draws = n < 10 ? 1000 : 30;
    for (int i = 0; i < n_draws; ++i) {
      const int32_t id = pick(sampler, logits);
      CHECK(nucleus.count(id) == 1);
      seen.insert(id);
    }
    if (n < 10) CHECK(seen == nucleus);
  }
}

TEST_CASE("min-p drops what is far below the best") {
  CHECK(support({.temperature = 1, .min_p = 0.6f}, kHalves) == std::set<int32_t>{1});
  CHECK(support({.temperature = 1, .min_p = 0.4f}, kHalves) == std::set<int32_t>{1, 3});
  CHECK(support({.temperature = 1, .min_p = 0.2f}, kHalves) == std::set<int32_t>{0, 1, 3});
  CHECK(support({.temperature = 1, .min_p = 0.1f}, kHalves).size() == 5);
  CHECK(support({.temperature = 1, .min_p = 1}, {3, 5, 5, 4}) == std::set<int32_t>{1, 2});
  // Relative to the best, whatever top-p left, and under the temperature.
  CHECK(support({.temperature = 1, .top_p = 0.8f, .min_p = 0.4f}, kHalves) ==
        std::set<int32_t>{1, 3});
  CHECK(support({.temperature = 0.5f, .min_p = 0.3f}, kHalves) == std::set<int32_t>{1});
}

TEST_CASE("the repetition penalty weakens tokens of the window once") {
  Sampler greedy = make({.repeat_penalty = 2, .repeat_window = 3});
  CHECK(pick(greedy, {4, 3, 1}) == 0);
  CHECK(pick(greedy, {4, 3, 1}, {0}) == 1);           // 4 / 2 < 3
  CHECK(pick(greedy, {4, 1.5f, 1}, {0, 0, 0}) == 0);  // once: 2, not 0.5
  CHECK(pick(greedy, {4, 3, 1}, {0, 2, 2, 2}) == 0);  // out of the window
  CHECK(pick(greedy, {-1, -1.5f}, {0}) == 1);         // -1 x 2 < -1.5
  CHECK(pick(greedy, {4, 3, 1}, {-7, 0, 99}) == 1);   // ids that are no tokens do not count
  CHECK(pick(greedy, {-kInf, -3}, {0, 1}) == 1);
  Sampler off = make({.repeat_penalty = 2, .repeat_window = 0});
  CHECK(pick(off, {4, 3}, {0, 0}) == 0);
  Sampler favour = make({.repeat_penalty = 0.5f});
  CHECK(pick(favour, {4, 3}, {1}) == 1);
  Sampler extreme = make({.repeat_penalty = 1e-45f});
  CHECK(pick(extreme, {4, 3, 5}, {1}) == 1);  // 3 / 1e-45 stays finite
  // Sampling sees the penalised logits as well.
  CHECK(support({.temperature = 1, .top_k = 1, .repeat_penalty = 2}, {4, 3, 1}, {0}) ==
        std::set<int32_t>{1});
}

TEST_CASE("same seed, same tokens; another seed, others") {
  const std::vector<float> flat(1000, 0.0f);
  const auto stream = [&](Sampler& s) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 50; ++i) ids.push_back(pick(s, flat));
    return ids;
  };
  Sampler a = make({.temperature = 1, .seed = 42}), b = make({.temperature = 1, .seed = 42});
  const std::vector<int32_t> first = stream(a);
  CHECK(stream(b) == first);
  CHECK(stream(a) != first);
  a.reset(42);
  CHECK(stream(a) == first);
  a.reset(43);
  CHECK(stream(a) != first);
}

TEST_CASE("the stream for a seed is fixed for good") {
  // xoshiro256** seeded by splitmix64(0): with 2^10 equal tokens of 2^51 units a draw takes 61
  // bits of the generator's word, whose top ten are the id.  First words from the authors' code.
  const std::vector<float> flat(1024, 0.0f);
  Sampler sampler = make({.temperature = 1, .seed = 0});
  for (const uint64_t word : {0x99ec5f36cb75f2b4u, 0xbf6e1f784956452au, 0x1a5f849d4933e6e0u,
                              0x6aa594f1262d2d2cu, 0xbba5ad4a1f842e59u})
    CHECK(pick(sampler, flat) == static_cast<int32_t>(word >> 51 & 1023));
}

TEST_CASE("nothing is allocated after the first pick") {
  std::vector<float> logits(5000);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 97) * 0.1f;
  std::vector<int32_t> history(3000);
  for (size_t i = 0; i < history.size(); ++i) history[i] = static_cast<int32_t>(i * 7 % 5000);
  for (const SamplingOptions& options :
       {SamplingOptions{.repeat_penalty = 1.1f, .repeat_window = 2048},
        SamplingOptions{.temperature = 0.8f, .top_k = 40, .top_p = 0.9f, .min_p = 0.01f},
        SamplingOptions{.temperature = 1, .top_p = 0.99f, .repeat_penalty = 1.2f},
        SamplingOptions{.temperature = 2}}) {
    Sampler sampler = make(options);
    (void)sampler.pick(logits, std::span<const int32_t>(history).first(10));
    const int64_t before = allocations;
    for (size_t n = 11; n < history.size(); n += 100)
      (void)sampler.pick(logits, std::span<const int32_t>(history).first(n));
    CHECK(allocations == before);
  }
}

TEST_CASE("the likeliest tokens alone give the same picks") {
  uint64_t seed = 1;
  const auto random = [&] {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(seed >> 40) / static_cast<float>(1 << 24);
  };
  for (const int32_t top_k : {0, 1, 7, 40, 500})
    for (const float temperature : {0.0f, 0.7f, 3.0f})
      for (const float top_p : {1.0f, 0.8f})
        for (const float min_p : {0.0f, 0.05f}) {
          const SamplingOptions options{.temperature = temperature,
                                        .top_k = top_k,
                                        .top_p = top_p,
                                        .min_p = min_p,
                                        .seed = 11};
          Sampler all = make(options), few = make(options);
          const int32_t n = few.n_deciding();
          CHECK(n == (temperature == 0 ? 1 : top_k));
          if (n == 0) continue;
          for (int round = 0; round < 20; ++round) {
            std::vector<float> logits(300);
            for (float& v : logits) v = std::round(random() * 40) / 4;  // ties
            logits[static_cast<size_t>(round)] = -kInf;
            std::vector<TokenLogit> likeliest;
            for (size_t i = 0; i < logits.size(); ++i)
              likeliest.push_back({logits[i], static_cast<int32_t>(i)});
            std::stable_sort(
                likeliest.begin(), likeliest.end(),
                [](const TokenLogit& a, const TokenLogit& b) { return a.logit > b.logit; });
            likeliest.resize(std::min(likeliest.size(), static_cast<size_t>(n)));
            const Result<int32_t> id = few.pick_from(likeliest, 300);
            REQUIRE(id.ok());
            CHECK(*id == pick(all, logits));
          }
        }
  // Those that count the whole text need all logits.
  CHECK(make({.temperature = 1, .top_k = 5, .repeat_penalty = 1.1f}).n_deciding() == 0);
  Sampler greedy = make({});
  const TokenLogit best{2, 5};
  CHECK(greedy.pick_from({&best, 1}, 10, {kNan, 3}).status().code() == Code::kNumeric);
  CHECK_THAT(std::string(greedy.pick_from({&best, 1}, 10, {kNan, 3}).status().message()),
             Contains("the logit of token 3 is nan"));
  const TokenLogit impossible{-kInf, 0};
  CHECK(greedy.pick_from({&impossible, 1}, 10).status().code() == Code::kNumeric);
  CHECK(greedy.pick_from({}, 10).status().code() == Code::kInvalidArgument);
}
