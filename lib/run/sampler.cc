// From logits to a token.  Probabilities are integers: e^((logit - best) / temperature) in units
// of 2^-bits, rounded down.  Sums of integers do not depend on the order of summation and the
// exponential below uses only exactly rounded operations, so that the choice is the same on every
// machine.  Nothing is sorted but the last few candidates at a cut: top-k and top-p are found by
// selection, in linear time, and the draw walks the kept tokens in the order of their ids.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <utility>

#include "fathom/sampling.hpp"

namespace fathom {
namespace {

// e^x for x in [-44, 0]: x = k ln 2 + r, Taylor series of degree 11 on |r| <= 0.347 (its rest is
// below 1e-14), times 2^k.  libm's exp differs between versions and instruction sets.
double exp_negative(double x) noexcept {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  constexpr double kInverseFactorials[] = {
      1.0,       1.0,        1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,
      1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800};
  const auto k = static_cast<int64_t>(x * kLog2E - 0.5);  // truncation: to the nearest
  const auto whole = static_cast<double>(k);
  const double r = (x - whole * kLn2High) - whole * kLn2Low;
  double sum = 0;
  for (int i = 11; i >= 0; --i) sum = sum * r + kInverseFactorials[i];
  return sum * std::bit_cast<double>(static_cast<uint64_t>(1023 + k) << 52);
}

// Mass of a logit under the temperature.
class Mass {
 public:
  Mass(float best, float temperature, size_t vocab_size) noexcept
      : best_(best), inverse_temperature_(1 / double{temperature}) {
    // The sum of all masses stays below 2^62.
    bits_ = std::min(52, 62 - static_cast<int>(std::bit_width(vocab_size)));
  }
  uint64_t full() const noexcept { return uint64_t{1} << bits_; }  // of the best logit
  // False for logits so low that their mass is zero; cheap.
  bool may_count(float logit) const noexcept { return exponent(logit) >= kLeastExponent; }
  uint64_t operator()(float logit) const noexcept {
    const double x = exponent(logit);
    if (!(x >= kLeastExponent)) return 0;
    return static_cast<uint64_t>(exp_negative(x) * static_cast<double>(full()));
  }

 private:
  static constexpr double kLeastExponent = -44;  // e^-44 < 2^-62
  double exponent(float logit) const noexcept {
    return (double{logit} - best_) * inverse_temperature_;
  }
  double best_, inverse_temperature_;
  int bits_;
};

uint64_t next_random(uint64_t (&s)[4]) noexcept {  // xoshiro256** (Blackman, Vigna 2018)
  const uint64_t result = std::rotl(s[1] * 5, 7) * 9;
  const uint64_t t = s[1] << 17;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= t;
  s[3] = std::rotl(s[3], 45);
  return result;
}

// Uniform in [0, bound), without bias; bound > 0.
uint64_t random_below(uint64_t bound, uint64_t (&state)[4]) noexcept {
  const uint64_t mask = std::bit_ceil(bound) - 1;
  for (;;)
    if (const uint64_t r = next_random(state) & mask; r < bound) return r;
}

// Keskar et al. 2019.  A small penalty may lead beyond float: then the largest value counts.
float penalise(float logit, float penalty) noexcept {
  if (std::isinf(logit)) return logit;
  const double changed =
      logit > 0 ? double{logit} / double{penalty} : double{logit} * double{penalty};
  return static_cast<float>(std::clamp(changed, -double{FLT_MAX}, double{FLT_MAX}));
}

// Calls f(id, logit) for every token in ascending order of id.  `penalised` ascends.
template <class F>
void for_each_logit(std::span<const float> logits, std::span<const int32_t> penalised,
                    float penalty, F&& f) {
  size_t next = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    float logit = logits[i];
    if (next < penalised.size() && penalised[next] == id) {
      logit = penalise(logit, penalty);
      ++next;
    }
    f(id, logit);
  }
}

// The order of likelihood: ties go to the lower id.
bool likelier(const TokenLogit& a, const TokenLogit& b) noexcept {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The least likely token of the smallest set of most likely ones whose mass reaches `target`, which
// is at most the mass of all.  Reorders the candidates.
TokenLogit nucleus_end(std::span<TokenLogit> rest, uint64_t target, const Mass& mass) {
  constexpr size_t kFirstGuess = 256, kSorted = 64;
  size_t guess = kFirstGuess;  // usually holds the nucleus; afterwards halves
  while (rest.size() > kSorted) {
    const size_t half = std::min(guess, rest.size() / 2);
    guess = std::numeric_limits<size_t>::max();
    std::nth_element(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(half), rest.end(),
                     likelier);
    uint64_t sum = 0;
    for (size_t i = 0; i < half; ++i) sum += mass(rest[i].logit);
    if (sum >= target) {
      rest = rest.first(half);
    } else {
      rest = rest.subspan(half);
      target -= sum;
    }
  }
  std::sort(rest.begin(), rest.end(), likelier);
  uint64_t sum = 0;
  for (const TokenLogit& candidate : rest)
    if ((sum += mass(candidate.logit)) >= target) return candidate;
  return rest.back();
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Status broken_logit(TokenLogit token) {
  return Status(Code::kNumeric, fmt::format("the logit of token {} is {}", token.id, token.logit));
}
Status all_impossible(int64_t n) {
  return Status(Code::kNumeric, fmt::format("all {} logits are -infinity", n));
}

Status out_of_range(const char* name, double value, const char* range) {
  return Status(Code::kInvalidArgument, fmt::format("{} is {}, must be in {}", name, value, range))
      .about(name);
}

}  // namespace

Result<Sampler> Sampler::create(const SamplingOptions& o) {
  // Written so that NaN is refused.
  if (!(o.temperature >= 0 && o.temperature <= 100))
    return out_of_range("temperature", o.temperature, "[0, 100]");
  if (o.top_k < 0) return out_of_range("top_k", o.top_k, "[0, 2147483647]");
  if (!(o.top_p > 0 && o.top_p <= 1)) return out_of_range("top_p", o.top_p, "(0, 1]");
  if (!(o.min_p >= 0 && o.min_p <= 1)) return out_of_range("min_p", o.min_p, "[0, 1]");
  if (!(o.repeat_penalty > 0 && o.repeat_penalty <= 100))
    return out_of_range("repeat_penalty", o.repeat_penalty, "(0, 100]");
  if (o.repeat_window < 0 || o.repeat_window > 1 << 20)
    return out_of_range("repeat_window", o.repeat_window, "[0, 1048576]");
  return Sampler(o);
}

Sampler::Sampler(const SamplingOptions& options) : options_(options) {
  reset(options.seed);
}

void Sampler::reset(uint64_t seed) noexcept {
  for (uint64_t& word : state_) {  // splitmix64
    uint64_t z = seed += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    word = z ^ (z >> 31);
  }
}

Result<int32_t> Sampler::pick(std::span<const float> logits, std::span<const int32_t> history) {
  if (logits.empty() || std::cmp_greater(logits.size(), std::numeric_limits<int32_t>::max()))
    return Status(Code::kInvalidArgument,
                  fmt::format("{} logits, must be in [1, 2147483647]", logits.size()));
  const float penalty = options_.repeat_penalty;
  penalised_.clear();
  if (penalty != 1 && options_.repeat_window > 0) {
    const auto window = static_cast<size_t>(options_.repeat_window);
    penalised_.reserve(window);
    for (const int32_t id : history.last(std::min(window, history.size())))
      if (id >= 0 && std::cmp_less(id, logits.size())) penalised_.push_back(id);
    std::sort(penalised_.begin(), penalised_.end());
    penalised_.erase(std::unique(penalised_.begin(), penalised_.end()), penalised_.end());
  }

  TokenLogit best{.logit = -kInfinity, .id = -1};
  int32_t broken = -1;
  for_each_logit(logits, penalised_, penalty, [&](int32_t id, float logit) {
    if (!(logit < kInfinity) && broken < 0) broken = id;
    if (logit > best.logit) best = {logit, id};
  });
  if (broken >= 0) return broken_logit({logits[static_cast<size_t>(broken)], broken});
  if (best.id < 0) return all_impossible(static_cast<int64_t>(logits.size()));
  if (options_.temperature == 0) return best.id;
  candidates_.reserve(logits.size());
  return draw(best, logits.size(),
              [&](auto&& f) { for_each_logit(logits, penalised_, penalty, f); });
}

int32_t Sampler::n_deciding() const noexcept {
  if (options_.repeat_penalty != 1 && options_.repeat_window > 0) return 0;
  return options_.temperature == 0 ? 1 : options_.top_k;
}

Result<int32_t> Sampler::pick_from(std::span<const TokenLogit> likeliest, int64_t vocab_size,
                                   TokenLogit broken) {
  if (likeliest.empty() || std::cmp_less(vocab_size, likeliest.size()))
    return Status(Code::kInvalidArgument,
                  fmt::format("{} likeliest of {} tokens: must be in [1, {}]", likeliest.size(),
                              vocab_size, vocab_size));
  if (broken.id >= 0) return broken_logit(broken);
  const TokenLogit best = likeliest.front();
  if (!(best.logit > -kInfinity)) return all_impossible(vocab_size);
  if (options_.temperature == 0) return best.id;
  likeliest_.assign(likeliest.begin(), likeliest.end());
  std::sort(likeliest_.begin(), likeliest_.end(),
            [](const TokenLogit& a, const TokenLogit& b) { return a.id < b.id; });
  return draw(best, static_cast<size_t>(vocab_size), [&](auto&& f) {
    for (const TokenLogit& token : likeliest_) f(token.id, token.logit);
  });
}

template <class Each>
int32_t Sampler::draw(TokenLogit best, size_t vocab_size, const Each& each) {
  const Mass mass(best.logit, options_.temperature, vocab_size);
  // Least likely token kept.
  TokenLogit last{.logit = -kInfinity, .id = std::numeric_limits<int32_t>::max()};
  const auto top_k = static_cast<size_t>(options_.top_k);
  const bool cut_k = top_k > 0 && top_k < vocab_size;
  if (cut_k || options_.top_p < 1) {
    candidates_.clear();
    each([&](int32_t id, float logit) {
      if (mass.may_count(logit)) candidates_.push_back({logit, id});
    });
    if (cut_k && top_k < candidates_.size()) {
      const auto end = candidates_.begin() + options_.top_k;
      std::nth_element(candidates_.begin(), end - 1, candidates_.end(), likelier);
      last = *(end - 1);
      candidates_.erase(end, candidates_.end());
    }
    if (options_.top_p < 1) {
      uint64_t total = 0;
      for (const TokenLogit& candidate : candidates_) total += mass(candidate.logit);
      const double share = std::ceil(double{options_.top_p} * static_cast<double>(total));
      const uint64_t target = std::clamp(static_cast<uint64_t>(share), uint64_t{1}, total);
      last = nucleus_end(std::span(candidates_), target, mass);
    }
  }
  const uint64_t least = std::max<uint64_t>(
      1,
      static_cast<uint64_t>(std::ceil(double{options_.min_p} * static_cast<double>(mass.full()))));

  uint64_t total = 0;
  candidates_.clear();
  each([&](int32_t id, float logit) {
    const TokenLogit candidate{logit, id};
    if (likelier(last, candidate)) return;
    if (const uint64_t m = mass(logit); m >= least) {
      total += m;
      candidates_.push_back(candidate);
    }
  });
  uint64_t rest = random_below(total, state_);
  for (const TokenLogit& candidate : candidates_) {
    const uint64_t m = mass(candidate.logit);
    if (rest < m) return candidate.id;
    rest -= m;
  }
  return best.id;  // not reached: rest < total
}

}  // namespace fathom
