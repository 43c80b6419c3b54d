// The data path of the CPU worker: two primitives, in the widest form that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "protocol/worker.h"

namespace commlib {

// Loads each part of `src` once and stores it n times.
using MulticastFn = void (*)(std::byte* const* dst, int n, const std::byte* src, int64_t bytes);

// dst[i] = round(sum over j of terms[j].weight * terms[j].row[i]), accumulated in fp32 (fp64 for fp64 rows)
// in the order of j; parts of a term (see Term) on their own, and rounded. Multiply and add stay apart (no
// fused multiply-add), so all vector widths give the same bits. n = 0 writes zeros.
using ReduceFn = void (*)(std::byte* dst, const Term* terms, int n, int64_t elements);

struct VectorOps {
  const char* name;
  MulticastFn multicast;
  ReduceFn reduce[kNumDTypes];
  void (*flush)();  // orders streaming stores before later release stores
};

// The widest of "avx512", "avx2", "neon", "plain" that this processor runs; or the one named.
// Throws std::invalid_argument if that is unknown or the processor lacks it.
const VectorOps& vector_ops(const std::string& name = "");

std::vector<std::string> available_vector_ops();

}  // namespace commlib
