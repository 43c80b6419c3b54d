// The part of CUDA C++ that the kernels use, for g++.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/device.h"

// CUDA's own headers may have been included first.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace simt {
struct Index {
  unsigned x = 0, y = 0, z = 0;
};
}  // namespace simt

// Of the running thread; the scheduler sets them at each switch.
extern simt::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { simt::sync_threads(true); }
inline int __syncthreads_and(int predicate) { return simt::sync_threads(predicate != 0); }

inline void __syncwarp(unsigned mask = 0xffffffff) { simt::collective(simt::Collective::syncwarp, mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::collective(simt::Collective::shfl, mask, bits, source & 31);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::collective(simt::Collective::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::collective(simt::Collective::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::collective(simt::Collective::all, mask, predicate != 0));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T key) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  std::memcpy(&bits, &key, sizeof(T));
  return static_cast<unsigned>(simt::collective(simt::Collective::match, mask, bits));
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }

inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
