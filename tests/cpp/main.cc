// Runs the tests of the core: `core-tests [--seed N] [part of a test's name]`.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "check.h"

namespace commlib::testing {

std::vector<Test> pool_tests();
std::vector<Test> dispatch_tests();
std::vector<Test> combine_tests();
std::vector<Test> interleaving_tests();
std::vector<Test> fault_tests();
std::vector<Test> slot_tests();
std::vector<Test> capacity_tests();

namespace {

constexpr unsigned kSecondsPerTest =
    120;  // a test that hangs is killed by SIGALRM; its name is printed by then
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
  int passed = 0, failed = 0;
  for (const auto& tests : {pool_tests(), slot_tests(), dispatch_tests(), combine_tests(), capacity_tests(),
                            fault_tests(), interleaving_tests()}) {
    for (const Test& test : tests) {
      if (std::strstr(test.name, part)) ++(passes(test) ? passed : failed);
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
