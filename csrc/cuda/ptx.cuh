// All PTX of commlib: one named function for each instruction, with its contract above it. Under
// COMMLIB_SIMT the same names come from the emulation in tests/simt/, and the kernels run on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/quantize.h"

#ifdef COMMLIB_SIMT
#include "simt/ptx.h"
#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define COMMLIB_BULK 1  // the bulk copy engine (TMA) and its proxy
#else
#define COMMLIB_BULK 0
#endif

namespace commlib::ptx {

// Whether this target has the bulk copy engine; the functions on it below do nothing elsewhere.
constexpr bool kHasBulkCopies = COMMLIB_BULK;

// -- words that ranks share (system scope: other GPUs and the host see them)
// ---------------------------------

// Later reads of this thread see what was written before the store or add that it reads.
__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* word) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(word) : "memory");
  return v;
}

// Everything this thread wrote, or has seen written, is visible to any thread that acquires the value.
__device__ __forceinline__ void store_release_sys(uint64_t* word, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(v) : "memory");
}
// What this thread wrote, or has seen written, comes before what it writes after this, for all observers.
__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Whole, and nothing else: no order with any other access.
__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* word) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(word) : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed_sys(uint64_t* word, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(v) : "memory");
}

// -- words of one GPU
// ----------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t load_acquire_gpu(const uint64_t* word) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(word) : "memory");
  return v;
}

// Whole, and no order with any other access.
__device__ __forceinline__ void store_relaxed_gpu(uint64_t* word, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(v) : "memory");
}

// Returns the value before. Release for what came before, acquire for what follows.
__device__ __forceinline__ uint64_t add_acq_rel_gpu(uint64_t* word, uint64_t v) {
  uint64_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(word), "l"(v) : "memory");
  return old;
}

// Sets *word to `desired` if it is `expected`; returns the value before.
__device__ __forceinline__ uint64_t exchange_if_gpu(uint64_t* word, uint64_t expected, uint64_t desired) {
  uint64_t old;
  asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(word), "l"(expected), "l"(desired)
               : "memory");
  return old;
}

// Unordered: a thread that reads the sum needs a barrier first. The word may lie in shared memory.
__device__ __forceinline__ void add_relaxed_gpu(uint32_t* word, uint32_t v) {
  asm volatile("red.relaxed.gpu.add.u32 [%0], %1;" ::"l"(word), "r"(v) : "memory");
}

// -- time
// ----------------------------------------------------------------------------------------------------

// Nanoseconds since some moment, equal on all SMs of a device; advances in steps of up to a microsecond.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// Leaves the issue slots to other warps for about this long.
__device__ __forceinline__ void nanosleep(uint32_t ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

// -- half precision and bfloat16: the bits of base/scalar_types.h, but for NaNs
// ------------------------------------------------------------------------------------------

// Exact. A NaN stays one.
__device__ __forceinline__ float float_of_half(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// Two numbers in one word, the first in its low half; both rounded to nearest, ties to even, subnormal
// results too. Every NaN becomes 0x7fff, without its sign and payload.
__device__ __forceinline__ uint32_t half2_of_floats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t bf16x2_of_floats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// -- fp8: the bits of ToE4m3 in protocol/quantize.h

// Two numbers in a word's lower 16 bits, the first in the lowest byte; rounded to nearest, ties to even, and
// every NaN is 0x7f.
__device__ __forceinline__ uint32_t e4m3x2_of_floats(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return ToE4m3::of(low) | static_cast<uint32_t>(ToE4m3::of(high)) << 8;
#endif
}

// -- 16-byte accesses
// ----------------------------------------------------------------------------------------

struct alignas(16) Vec16 {
  uint32_t word[4];
};

__device__ __forceinline__ Vec16 load_global(const void* p) {
  Vec16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_global(void* p, Vec16 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
__device__ __forceinline__ Vec16 load_shared(const void* p) {
  Vec16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return v;
}

// -- the bulk copy engine: shared memory <-> global memory, behind the thread's back
// ---------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One thread arrives in each phase; the expected bytes must also have come in before the phase ends.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier) {
  if constexpr (!kHasBulkCopies) return;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes initialised barriers known to the copy engine; then a barrier of the threads that use them.
__device__ __forceinline__ void fence_mbarrier_init() {
#if COMMLIB_BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives, and says how many bytes copies will bring in this phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
#if COMMLIB_BULK
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Whether the phase of this parity has ended; may sleep a little. If so, its bytes are visible to this thread
// and to copies that it starts.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 1;
#if COMMLIB_BULK
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return done != 0;
}

// Starts a copy of `bytes` from global to shared memory, all multiples of 16; counts on the barrier.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
#if COMMLIB_BULK
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Starts a copy of `bytes` from shared to global memory, all multiples of 16, in the thread's current group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
#if COMMLIB_BULK
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
#endif
}

// Closes the thread's current group of stores, which may be empty.
__device__ __forceinline__ void bulk_commit() {
#if COMMLIB_BULK
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until all but the thread's newest kPending groups have read their shared memory: it may be
// overwritten.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
#if COMMLIB_BULK
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits until all the thread's groups have written: this thread sees it, and may release it.
__device__ __forceinline__ void bulk_wait_written() {
#if COMMLIB_BULK
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// Orders ordinary accesses to global memory, this thread's and those it has acquired, before bulk copies that
// follow; and bulk copies that it knows to be complete before ordinary accesses that follow.
__device__ __forceinline__ void fence_proxy_async() {
#if COMMLIB_BULK
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// -- shared memory
// -------------------------------------------------------------------------------------------

// The block's dynamic shared memory, 128-byte aligned.
__device__ __forceinline__ std::byte* dynamic_shared() {
  extern __shared__ __align__(128) std::byte commlib_dynamic_shared[];
  return commlib_dynamic_shared;
}

}  // namespace commlib::ptx

#endif  // COMMLIB_SIMT
