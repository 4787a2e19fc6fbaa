#include "demo_text.h"

#include <iterator>
#include <string_view>
#include <vector>

#include <fmt/format.h>

namespace cli {
namespace {

using Words = std::vector<std::string_view>;

const Words kNames = {"Anna",  "Ben",   "Clara", "David", "Emma",  "Felix", "Grace", "Henry",
                      "Ida",   "Kate",  "Leo",   "Mara",  "Nora",  "Oscar", "Paula", "Sam",
                      "Tom",   "Wendy", "Alice", "Bruno", "Fiona", "Hanna", "Ivan",  "Lena",
                      "Nina",  "Peter", "Tessa", "Lucy",  "Hugo",  "Olga",  "Theo",  "Vera",
                      "Hilda", "Milo",  "Otto",  "Sofia", "Viola", "Edith", "Frank", "Karen"};
const Words kPlaces = {"in the garden",  "in the barn",    "in the library", "at the market",
                       "at the harbour", "on the bridge",  "at the mill",    "in the forest",
                       "in the meadow",  "in the tower",   "at the station", "in the workshop",
                       "on the hill",    "at the lake",    "on the island",  "in the castle",
                       "in the orchard", "in the cottage", "on the pier",    "in the village"};
const Words kAdjectives = {"old",    "new",   "small",  "heavy",  "broken", "shiny",  "dusty",
                           "square", "plain", "golden", "wooden", "copper", "silver", "strange"};
const Words kObjects = {"key",    "lantern", "book",   "map",  "rope",   "basket",  "hammer",
                        "bottle", "letter",  "bell",   "drum", "violin", "hat",     "scarf",
                        "mirror", "shovel",  "kettle", "kite", "lamp",   "trumpet", "notebook"};
const Words kAnimals = {"dog", "cat", "horse", "goat", "rabbit", "crow", "owl", "duck", "seal"};
const Words kFoods = {"bread", "cheese", "soup", "apples", "honey", "beans", "nuts", "pie"};
const Words kFeelings = {"happy", "tired", "hungry", "proud", "worried", "calm", "excited"};
const Words kVehicles = {"cart", "boat", "train", "bicycle", "wagon", "ferry", "truck"};
const Words kNumbers = {"two",   "three", "four", "five",   "six",    "seven",
                        "eight", "nine",  "ten",  "eleven", "twelve", "thirteen"};
const Words kWeather = {
    "The sun was shining.", "It was raining.",   "It was a warm day.",
    "The sky was grey.",    "Snow was falling.", "The air was still.",
    "The waves were high.", "The sea was calm.", "Thick fog lay over the land."};
const Words kDirections = {"north", "south", "east", "west", "north-east", "south-west"};
const Words kSightings = {"ships", "whales", "dolphins", "small boats", "seals", "gulls"};
const Words kParts = {"anchor", "sail", "mast", "pump", "compass", "rudder"};
const Words kCodeKeys = {"harbour", "gate",   "tower",  "vault",      "cellar",  "castle",
                         "station", "engine", "museum", "laboratory", "theatre", "greenhouse",
                         "library", "radio",  "signal", "lighthouse", "bakery",  "elevator"};

// SplitMix64: small, seedable, the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t below(uint64_t n) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
  }
  std::string_view of(const Words& words) { return words[below(words.size())]; }

 private:
  uint64_t state_;
};

// The people of one stretch of text.
struct Scene {
  std::string_view people[3];

  explicit Scene(Random& random) {
    for (size_t i = 0; i < std::size(people); ++i) {
      do people[i] = random.of(kNames);
      while ((i > 0 && people[i] == people[0]) || (i > 1 && people[i] == people[1]));
    }
  }
};

// In both sentence makers everything random is drawn first, in a fixed order: the order in which
// the arguments of a call are evaluated is the compiler's choice.
std::string story_sentence(Random& r, const Scene& scene) {
  const uint64_t kind = r.below(12);
  const size_t first = r.below(3), second = (first + 1 + r.below(2)) % 3;
  const std::string_view p = scene.people[first], q = scene.people[second];
  const std::string_view adjective = r.of(kAdjectives), object = r.of(kObjects);
  const std::string_view place = r.of(kPlaces);                      // "in the garden"
  const std::string_view where = place.substr(place.find(' ') + 1);  // "the garden"
  const std::string_view food = r.of(kFoods), feeling = r.of(kFeelings);
  const std::string_view vehicle = r.of(kVehicles), number = r.of(kNumbers);
  const std::string_view animal = r.of(kAnimals), weather = r.of(kWeather);
  const std::string thing = fmt::format("{} {}", adjective, object);
  switch (kind) {
    case 0:
      return fmt::format("{} took the {}.", p, thing);
    case 1:
      return fmt::format("{} found the {} {} and took it.", p, thing, place);
    case 2:
      return fmt::format("{} gave the {} to {}.", p, thing, q);
    case 3:
      return fmt::format("{} left the {} {}.", p, thing, place);
    case 4:
      return fmt::format("{} went to {} to look for {}.", p, where, q);
    case 5:
      return fmt::format("{} took the {} to {}.", p, vehicle, where);
    case 6:
      return fmt::format("\"Where is the {0}?\" asked {1}. \"The {0} is {2},\" said {3}.", thing, p,
                         place, q);
    case 7:
      return fmt::format("{} ate some {} and felt {}.", p, food, feeling);
    case 8:
      return fmt::format("{} and {} talked about the {}.", p, q, food);
    case 9:
      return fmt::format("{} counted {} {}s.", p, number, animal);
    case 10:
      return fmt::format("\"Good morning, {0},\" said {1}. \"Good morning, {1},\" said {0}.", q, p);
    default:
      return std::string(weather);
  }
}

std::string log_sentence(Random& r, const Scene& scene) {
  const uint64_t kind = r.below(6);
  const std::string_view p = scene.people[r.below(3)];
  const std::string_view direction = r.of(kDirections), number = r.of(kNumbers);
  const std::string_view sighting = r.of(kSightings), part = r.of(kParts);
  const std::string_view food = r.of(kFoods), feeling = r.of(kFeelings);
  switch (kind) {
    case 0:
      return fmt::format("Wind from the {}, {} knots.", direction, number);
    case 1:
      return fmt::format("We saw {} {} in the {}.", number, sighting, direction);
    case 2:
      return fmt::format("{} repaired the {}.", p, part);
    case 3:
      return fmt::format("{} cooked {} for the crew.", p, food);
    case 4:
      return fmt::format("{} kept watch until midnight.", p);
    default:
      return fmt::format("{} was {} and stayed in the cabin.", p, feeling);
  }
}

// One paragraph; the log's days count on.
std::string paragraph(Random& r, const Scene& scene, bool log, int& day,
                      const std::string& planted) {
  std::vector<std::string> sentences;
  if (log) sentences.push_back(fmt::format("Day {}. {}", day++, r.of(kWeather)));
  const uint64_t n = log ? 2 + r.below(3) : 4 + r.below(4);
  for (uint64_t i = 0; i < n; ++i)
    sentences.push_back(log ? log_sentence(r, scene) : story_sentence(r, scene));
  if (!planted.empty())
    sentences.insert(sentences.begin() + 1 + static_cast<long>(r.below(sentences.size() - 1)),
                     planted);
  return fmt::format("{}", fmt::join(sentences, " "));
}

}  // namespace

DemoText make_demo_text(uint64_t seed, size_t n_chars, double depth) {
  Random random(seed);
  constexpr size_t kCodes = 5;  // the first is the one asked for
  std::string keys[kCodes], codes[kCodes], sentences[kCodes];
  double places[kCodes];
  for (size_t i = 0; i < kCodes; ++i) {
    for (bool fresh = false; !fresh;) {
      keys[i] = random.of(kCodeKeys);
      fresh = true;
      for (size_t k = 0; k < i; ++k) fresh = fresh && keys[k] != keys[i];
    }
    codes[i] = fmt::format("{:04}", random.below(10000));
    sentences[i] = fmt::format("The {} code is {}.", keys[i], codes[i]);
    places[i] = i == 0 ? depth : static_cast<double>(random.below(1000)) / 1000;
  }

  DemoText demo;
  demo.question = fmt::format("What is the {} code?", keys[0]);
  demo.code = codes[0];
  int day = 1 + static_cast<int>(random.below(50));
  Scene scene(random);
  bool log = true;
  bool planted[kCodes] = {};
  for (int n = 0; demo.text.size() < n_chars; ++n) {
    if (n % 8 == 7) {
      scene = Scene(random);
      log = random.below(2) == 0;
    }
    std::string plant;
    const double position = static_cast<double>(demo.text.size()) / static_cast<double>(n_chars);
    for (size_t i = 0; i < kCodes && plant.empty(); ++i)
      if (!planted[i] && places[i] <= position) {
        plant = sentences[i];
        planted[i] = true;
      }
    if (!demo.text.empty()) demo.text += "\n\n";
    const size_t begin = demo.text.size();
    demo.text += paragraph(random, scene, log, day, plant);
    if (plant == sentences[0]) demo.code_offset = demo.text.find(plant, begin);
  }
  return demo;
}

}  // namespace cli
