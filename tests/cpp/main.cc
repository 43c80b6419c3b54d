// Runs the tests that are linked: `PROGRAM [--seed N] [part of a test's name]`.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "suite.h"

namespace commlib::testing {
namespace {

constexpr unsigned kSecondsPerTest = 300;  // one that hangs is killed by SIGALRM; its name is printed by then
uint64_t run_seed = 0;

bool passes(const Test& test) {
  std::printf("%s ... ", test.name);
  std::fflush(stdout);
  alarm(kSecondsPerTest);
  const auto start = std::chrono::steady_clock::now();
  try {
    test.run();
  } catch (const std::exception& e) {
    std::printf("FAILED\n    %s\n", e.what());
    return false;
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("ok (%.1f s)\n", took.count());
  return true;
}

}  // namespace

uint64_t seed() { return run_seed; }

}  // namespace commlib::testing

int main(int argc, char** argv) {
  using namespace commlib::testing;
  const char* part = "";
  run_seed = std::random_device{}();
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      run_seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      part = argv[i];
    }
  }
  std::printf("seed %llu (repeat with --seed)\n", static_cast<unsigned long long>(run_seed));
  std::vector<Test> tests = Suite::all();
  std::sort(tests.begin(), tests.end(),  // files are linked in any order
            [](const Test& a, const Test& b) { return std::strcmp(a.name, b.name) < 0; });
  int passed = 0, failed = 0;
  for (const Test& test : tests) {
    if (std::strstr(test.name, part)) ++(passes(test) ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
