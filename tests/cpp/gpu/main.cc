// Runs the linked tests on a GPU; options.cc says how. Every line is out before the next thing happens, so
// that a run that is cut off shows where it was.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpp/suite.h"
#include "cuda/driver.h"
#include "first_tests.h"
#include "options.h"
#include "watchdog.h"

namespace commlib::testing {
namespace {

enum Exit { kPassed = 0, kFailed = 1, kBadArgument = 2, kDeviceLost = 4, kNoGpu = 5 };

struct Excuse {
  const char* test;
  const char* reason;
};
constexpr Excuse kExcuses[] = {
    {"a_region_of_another_process_is_the_same_memory", "it writes and reads device memory on the host"},
};

// Parts of the names of tests that wait for deadlines, lose ranks or delay a network: these run last.
constexpr const char* kLate[] = {"node",  "cut",      "dies",     "left",       "gone",   "fails_the_others",
                                 "named", "mismatch", "deadline", "interrupts", "failure"};

uint64_t run_seed = 0;

bool has(const std::string& name, const std::string& part) { return name.find(part) != std::string::npos; }

const char* excuse_of(const std::string& name) {
  for (const Excuse& e : kExcuses) {
    if (name == e.test) return e.reason;
  }
  return nullptr;
}

bool is_late(const std::string& name) {
  return std::any_of(std::begin(kLate), std::end(kLate), [&](const char* part) { return has(name, part); });
}

std::vector<Test> all_tests() {
  std::vector<Test> rest = Suite::all();
  std::sort(rest.begin(), rest.end(), [](const Test& a, const Test& b) {
    const bool late = is_late(a.name);
    return late == is_late(b.name) ? std::strcmp(a.name, b.name) < 0 : !late;
  });
  std::vector<Test> tests = first_tests();
  tests.insert(tests.end(), rest.begin(), rest.end());
  return tests;
}

bool is_test(const std::vector<Test>& tests, const std::string& name) {
  return std::any_of(tests.begin(), tests.end(), [&](const Test& t) { return t.name == name; });
}

// The tests asked for. Throws std::invalid_argument if there are none, or if a name is no test's.
std::vector<Test> chosen(const Options& options) {
  std::vector<Test> tests = all_tests();
  for (const Excuse& e : kExcuses) {
    if (!is_test(tests, e.test)) throw std::logic_error(std::string("there is no test ") + e.test);
  }
  if (!options.after.empty()) {
    if (!is_test(tests, options.after)) throw std::invalid_argument("there is no test " + options.after);
    while (tests.front().name != options.after) tests.erase(tests.begin());
    tests.erase(tests.begin());
  }
  const auto unwanted = [&](const Test& t) {
    const auto in_name = [&](const std::string& part) { return has(t.name, part); };
    const bool wanted =
        options.only.empty() || std::any_of(options.only.begin(), options.only.end(), in_name);
    return !wanted || std::any_of(options.skip.begin(), options.skip.end(), in_name);
  };
  tests.erase(std::remove_if(tests.begin(), tests.end(), unwanted), tests.end());
  if (tests.empty()) throw std::invalid_argument("no test is left");
  return tests;
}

void list(const std::vector<Test>& tests) {
  for (const Test& t : tests) {
    if (!excuse_of(t.name)) std::printf("%s\n", t.name);
  }
  for (const Test& t : tests) {
    if (const char* why = excuse_of(t.name)) std::printf("not run: %s: %s\n", t.name, why);
  }
}

void print_machine(const Options& options) {
  const cuda::DeviceFacts facts = cuda::facts_of(0);
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  std::printf("%s, compute capability %d.%d, %d SMs, %.0f GiB; CUDA driver %d, runtime %d\n",
              facts.name.c_str(), facts.capability / 10, facts.capability % 10, facts.sms,
              static_cast<double>(facts.memory) / (1 << 30), driver, runtime);
  std::printf("seed %llu (repeat with --seed); tensors in %s memory; one in %d of random rounds\n",
              static_cast<unsigned long long>(run_seed), options.managed ? "managed" : "pinned",
              options.fewer);
}

enum class Outcome { passed, failed, not_run };

Outcome run(const Test& test) {
  if (const char* why = excuse_of(test.name)) {
    std::printf("not run: %s\n", why);
    return Outcome::not_run;
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    test.run();
  } catch (const NotRun& e) {
    std::printf("not run: %s\n", e.what());
    return Outcome::not_run;
  } catch (const std::exception& e) {
    std::printf("FAILED\n    %s\n", e.what());
    return Outcome::failed;
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("ok (%.2f s)\n", took.count());
  return Outcome::passed;
}

// After an error of the device no later result means anything.
void check_device(const Test& test) {
  const cudaError_t waited = cudaDeviceSynchronize();
  const cudaError_t left = cudaGetLastError();
  const cudaError_t error = waited != cudaSuccess ? waited : left;
  if (error == cudaSuccess) return;
  std::printf("    %s left an error behind: %s (%s)\n", test.name, cudaGetErrorName(error),
              cudaGetErrorString(error));
  if (waited == cudaSuccess) return;
  std::printf("THE DEVICE IS LOST in %s; --after %s goes on\n", test.name, test.name);
  std::fflush(stdout);
  _exit(kDeviceLost);
}

int run_all(const std::vector<Test>& tests, const Options& options) {
  int counts[3] = {};
  Watchdog watchdog;
  for (const Test& test : tests) {
    std::printf("%s ... ", test.name);
    std::fflush(stdout);
    watchdog.watch(test.name, options.limit);
    ++counts[static_cast<int>(run(test))];
    check_device(test);
    watchdog.rest();
  }
  std::printf("%d passed, %d failed, %d not run\n", counts[0], counts[1], counts[2]);
  return counts[1] == 0 && counts[0] > 0 ? kPassed : kFailed;
}

int run_on_gpu(const std::vector<Test>& tests, const Options& options) {
  const std::string why = cuda::why_not();
  if (!why.empty()) {
    std::printf("nothing is run: %s\n", why.c_str());
    return kNoGpu;
  }
  print_machine(options);
  {
    Watchdog watchdog;
    watchdog.watch("(making the context)", options.limit);
    start(options);
  }
  return run_all(tests, options);
}

}  // namespace

uint64_t seed() { return run_seed; }

}  // namespace commlib::testing

int main(int argc, char** argv) {
  using namespace commlib::testing;
  // Ranks wait for each other on the device: no kernel may be loaded meanwhile, and no stream queue behind
  // another's. Both are read when the context is made.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  try {
    const Options options = parse(argc, argv);
    run_seed = options.seed;
    if (options.help) {
      std::fputs(usage(), stdout);
      return kPassed;
    }
    const std::vector<Test> tests = chosen(options);
    if (options.list) {
      list(tests);
      return kPassed;
    }
    return run_on_gpu(tests, options);
  } catch (const std::invalid_argument& e) {
    std::fprintf(stderr, "%s\n%s", e.what(), usage());
    return kBadArgument;
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return kFailed;
  }
}
