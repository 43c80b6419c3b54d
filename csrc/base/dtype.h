// The element types of rows.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace commlib {

enum class DType : uint8_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };
constexpr int kNumDTypes = 4;

COMMLIB_HD constexpr int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Sums are taken in fp32, and in fp64 for fp64 rows; weights come in that type as well.
COMMLIB_HD constexpr int accumulator_size(DType t) { return t == DType::f64 ? 8 : 4; }

}  // namespace commlib
