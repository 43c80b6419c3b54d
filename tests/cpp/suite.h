// Test files register themselves, so the makefile that links them decides which tests there are.
#pragma once

#include <vector>

#include "check.h"

namespace commlib::testing {

// static const Suite suite({{"what it promises", function}, ...});
struct Suite {
  explicit Suite(const std::vector<Test>& tests) { all().insert(all().end(), tests.begin(), tests.end()); }

  static std::vector<Test>& all() {
    static std::vector<Test> tests;
    return tests;
  }
};

}  // namespace commlib::testing
