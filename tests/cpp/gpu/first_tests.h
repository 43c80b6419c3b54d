// What is tried first on a GPU, from small to large: each test needs what those before it have shown to work.
#pragma once

#include <vector>

#include "cpp/check.h"

namespace commlib::testing {

const std::vector<Test>& first_tests();

}  // namespace commlib::testing
