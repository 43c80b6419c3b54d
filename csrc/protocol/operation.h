// Words that every part of commlib shares.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define COMMLIB_HD __host__ __device__ __forceinline__
#else
#define COMMLIB_HD inline
#endif

namespace commlib {

constexpr int kMaxRanks = 64;  // ranks that map each other's memory: a set of them fits in one 64-bit mask
constexpr int kMaxTopk = 32;

enum class DType : uint8_t { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };
constexpr int kNumDTypes = 4;

COMMLIB_HD constexpr int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Sums are taken in fp32, and in fp64 for fp64 rows; weights come in that type as well.
COMMLIB_HD constexpr int accumulator_size(DType t) { return t == DType::f64 ? 8 : 4; }

enum class OpKind : uint8_t { none = 0, dispatch = 1, redispatch = 2, combine = 3 };
enum class Phase : uint8_t { counts = 0, arrival = 1, slot_reuse = 2, call = 3, network = 4 };

constexpr const char* name_of(OpKind op) {
  constexpr const char* names[] = {"nothing", "dispatch", "dispatch with a handle", "combine"};
  return op <= OpKind::combine ? names[static_cast<int>(op)] : "what is no operation";  // as a word may say
}

constexpr const char* name_of(Phase phase) {
  constexpr const char* names[] = {"counts", "arrival", "slot reuse", "call", "network"};
  return names[static_cast<int>(phase)];
}

// Experts lie on ranks in contiguous, balanced blocks: rank r owns [first_expert(r), first_expert(r + 1)).
// E need not be a multiple of R; block sizes then differ by one. E is at most 2^20, so products fit in 32
// bits, in which a GPU divides much faster.
struct Placement {
  int64_t experts;
  int64_t ranks;

  COMMLIB_HD int64_t first_expert(int64_t rank) const { return quotient(rank * experts, ranks); }
  COMMLIB_HD int64_t count(int64_t rank) const { return first_expert(rank + 1) - first_expert(rank); }
  COMMLIB_HD int64_t max_count() const { return quotient(experts + ranks - 1, ranks); }
  COMMLIB_HD int owner(int64_t expert) const {
    return static_cast<int>(quotient((expert + 1) * ranks - 1, experts));
  }

 private:
  COMMLIB_HD static int64_t quotient(int64_t a, int64_t b) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
};

}  // namespace commlib
