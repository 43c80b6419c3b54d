// What a run on a GPU is asked for.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace commlib::testing {

struct Options {
  bool help = false, list = false;
  uint64_t seed = 0;
  std::vector<std::string> only, skip;  // parts of tests' names
  std::string after;                    // go on behind this test
  double limit = 60;                    // seconds for each test
  int fewer = 4;                        // of many rounds, take one in this many
  int ranks_max = 64;
  bool managed = false;  // tensors in managed memory instead of pinned host memory
};

// Throws std::invalid_argument.
Options parse(int argc, char** argv);
const char* usage();

// A test, or the rest of it, needs something that this run lacks.
class NotRun : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Makes the context, and all memory and streams that tests take later: making them may wait for kernels that
// run, which wait for other ranks. Throws std::runtime_error.
void start(const Options& options);

}  // namespace commlib::testing
