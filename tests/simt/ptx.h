// The functions of csrc/cuda/ptx.cuh, with the same contracts, on the simulated machine.
// -DCOMMLIB_SIMT_NO_BULK: a target without the bulk copy engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/scalar_types.h"
#include "protocol/quantize.h"
#include "simt/cuda.h"
#include "simt/device.h"

namespace commlib::ptx {

#ifdef COMMLIB_SIMT_NO_BULK
constexpr bool kHasBulkCopies = false;
#else
constexpr bool kHasBulkCopies = true;
#endif

// -- words that ranks share, and words of one GPU: scopes are not modelled
// ---------------------------------------

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* word) {
  return simt::load_acquire(word);
}
__device__ __forceinline__ void store_release_sys(uint64_t* word, uint64_t v) {
  simt::store_release(word, v);
}
// Less than on a GPU: here only an atomic access that releases passes anything on.
__device__ __forceinline__ void fence_acq_rel_sys() {}
__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* word) {
  return simt::load_relaxed(word);
}
__device__ __forceinline__ void store_relaxed_sys(uint64_t* word, uint64_t v) {
  simt::store_relaxed(word, v);
}

__device__ __forceinline__ uint64_t load_acquire_gpu(const uint64_t* word) {
  return simt::load_acquire(word);
}
__device__ __forceinline__ void store_relaxed_gpu(uint64_t* word, uint64_t v) {
  simt::store_relaxed(word, v);
}
__device__ __forceinline__ uint64_t add_acq_rel_gpu(uint64_t* word, uint64_t v) {
  return simt::add_acquire_release(word, v);
}
__device__ __forceinline__ uint64_t exchange_if_gpu(uint64_t* word, uint64_t expected, uint64_t desired) {
  return simt::exchange_if(word, expected, desired);
}
__device__ __forceinline__ void add_relaxed_gpu(uint32_t* word, uint32_t v) { simt::add_relaxed(word, v); }

// -- time
// -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t globaltimer() { return simt::globaltimer(); }
__device__ __forceinline__ void nanosleep(uint32_t ns) { simt::nanosleep(ns); }

// -- half precision and bfloat16
// --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float float_of_half(uint16_t bits) { return widen(Half{bits}); }

// As on the GPU, which keeps nothing of a NaN.
template <class T>
uint32_t two_of_floats(float low, float high) {
  T a, b;
  narrow(low, &a);
  narrow(high, &b);
  return (low != low ? 0x7fffu : a.bits) | (high != high ? 0x7fffu : b.bits) << 16;
}
__device__ __forceinline__ uint32_t half2_of_floats(float low, float high) {
  return two_of_floats<Half>(low, high);
}
__device__ __forceinline__ uint32_t bf16x2_of_floats(float low, float high) {
  return two_of_floats<Bf16>(low, high);
}

__device__ __forceinline__ uint32_t e4m3x2_of_floats(float low, float high) {
  return ToE4m3::of(low) | static_cast<uint32_t>(ToE4m3::of(high)) << 8;
}

// -- 16-byte accesses
// -------------------------------------------------------------------------------------------

struct alignas(16) Vec16 {
  uint32_t word[4];
};

__device__ __forceinline__ Vec16 load_global(const void* p) {
  Vec16 v;
  simt::load_global_16(&v, p);
  return v;
}
__device__ __forceinline__ void store_global(void* p, Vec16 v) { simt::store_global_16(p, &v); }
__device__ __forceinline__ Vec16 load_shared(const void* p) {
  Vec16 v;
  simt::load_shared_16(&v, p);
  return v;
}

// -- the bulk copy engine
// ---------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const std::byte*>(p) - simt::dynamic_shared());
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier) {
  if (kHasBulkCopies) simt::mbarrier_init(barrier);
}
__device__ __forceinline__ void fence_mbarrier_init() {
  if (kHasBulkCopies) simt::fence_mbarrier_init();
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  if (kHasBulkCopies) simt::mbarrier_expect(barrier, bytes);
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return !kHasBulkCopies || simt::mbarrier_try_wait(barrier, parity);
}
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  if (kHasBulkCopies) simt::bulk_load(shared, global, bytes, barrier);
}
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  if (kHasBulkCopies) simt::bulk_store(global, shared, bytes);
}
__device__ __forceinline__ void bulk_commit() {
  if (kHasBulkCopies) simt::bulk_commit();
}
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  if (kHasBulkCopies) simt::bulk_wait_read(kPending);
}
__device__ __forceinline__ void bulk_wait_written() {
  if (kHasBulkCopies) simt::bulk_wait_written();
}
__device__ __forceinline__ void fence_proxy_async() {
  if (kHasBulkCopies) simt::fence_proxy_async();
}

// -- shared memory
// ----------------------------------------------------------------------------------------------

__device__ __forceinline__ std::byte* dynamic_shared() { return simt::dynamic_shared(); }

}  // namespace commlib::ptx
