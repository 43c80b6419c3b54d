#include "options.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>

namespace commlib::testing {
namespace {

double number(const std::string& option, const std::string& text, double least) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= least))
    throw std::invalid_argument(option + " takes a number of at least " +
                                std::to_string(static_cast<int>(least)) + ", not \"" + text + "\"");
  return value;
}

uint64_t seed_of(const std::string& text) {
  char* end = nullptr;
  const uint64_t value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || *end) throw std::invalid_argument("--seed takes an integer, not \"" + text + "\"");
  return value;
}

// Small enough to type. Not std::random_device, which would need a newer C library than the rest.
uint64_t any_seed() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<uint64_t>(now.count() ^ getpid()) % 1'000'000'000;
}

bool is_managed(const std::string& text) {
  if (text == "managed") return true;
  if (text == "pinned") return false;
  throw std::invalid_argument("--memory is \"pinned\" or \"managed\", not \"" + text + "\"");
}

}  // namespace

const char* usage() {
  return "The tests of the protocol on a GPU, each rank a thread and a stream of device 0.\n"
         "  --list            names of the tests, in the order they run, and which do not, and why\n"
         "  --only PART       tests whose names have this part; may be given again\n"
         "  --skip PART       and not this one; may be given again\n"
         "  --after NAME      those after this test: how to go on after one that hung\n"
         "  --seed N          repeat a run\n"
         "  --limit SECONDS   for each test (60); then every thread's stack is printed, and the run ends\n"
         "  --fewer N         of many random rounds take one in N (4)\n"
         "  --ranks-max N     go without what needs more ranks\n"
         "  --memory KIND     of tensors: \"pinned\" host memory (the default), or \"managed\"\n"
         "Exit codes: 0 all passed, 1 some failed, 2 bad argument, 3 one took too long, 4 the device is "
         "lost,\n"
         "5 no GPU.\n";
}

Options parse(int argc, char** argv) {
  Options o;
  o.seed = any_seed();
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::invalid_argument(option + " wants a value");
      return argv[++i];
    };
    if (option == "--help") {
      o.help = true;
    } else if (option == "--list") {
      o.list = true;
    } else if (option == "--only") {
      o.only.push_back(value());
    } else if (option == "--skip") {
      o.skip.push_back(value());
    } else if (option == "--after") {
      o.after = value();
    } else if (option == "--seed") {
      o.seed = seed_of(value());
    } else if (option == "--limit") {
      o.limit = number(option, value(), 1);
    } else if (option == "--fewer") {
      o.fewer = static_cast<int>(number(option, value(), 1));
    } else if (option == "--ranks-max") {
      o.ranks_max = static_cast<int>(number(option, value(), 1));
    } else if (option == "--memory") {
      o.managed = is_managed(value());
    } else {
      throw std::invalid_argument("what is \"" + option + "\"?");
    }
  }
  return o;
}

}  // namespace commlib::testing
