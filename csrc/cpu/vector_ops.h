// The data path of the CPU worker: four primitives, in the widest form that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "protocol/quantize.h"
#include "protocol/worker.h"

namespace commlib {

// Loads each part of `src` once and stores it n times.
using MulticastFn = void (*)(std::byte* const* dst, int n, const std::byte* src, int64_t bytes);

// Rows that the next sum will read, as far as that is known; their beginnings are fetched at the end of this
// one.
struct Ahead {
  const std::byte* rows[kMaxTopk + 1];
  int count = 0;
};

// dst[i] = round(sum over j of terms[j].weight * terms[j].row[i]), accumulated in fp32 (fp64 for fp64 rows)
// in the order of j; parts of a term (see Term) on their own, and rounded. Multiply and add stay apart (no
// fused multiply-add), so all vector widths give the same bits. n = 0 writes zeros.
using ReduceFn = void (*)(std::byte* dst, const Term* terms, int n, int64_t elements, const Ahead& ahead);

// dst[i] = round(row.weight * row.row[i]), and *dot = sum of row.row[i] * y[i], an accumulator as in reduce,
// whose order of sums is dot_of's.
using WeighFn = void (*)(std::byte* dst, const Term& row, const std::byte* y, int64_t elements,
                         std::byte* dot);

// Converts a row: bytes, and the scales of its blocks, as protocol/quantize.h has it.
using QuantizeFn = void (*)(std::byte* rows, std::byte* scales, const std::byte* src, const Conversion& how);

struct VectorOps {
  const char* name;
  MulticastFn multicast;
  ReduceFn reduce[kNumDTypes];
  WeighFn weigh[kNumDTypes];
  QuantizeFn quantize[kNumDTypes];  // from each type; null: fp64
  void (*flush)();                  // orders streaming stores before later release stores
};

// The widest of "avx512", "avx2", "neon", "plain" that this processor runs; or the one named.
// Throws std::invalid_argument if that is unknown or the processor lacks it.
const VectorOps& vector_ops(const std::string& name = "");

std::vector<std::string> available_vector_ops();

}  // namespace commlib
