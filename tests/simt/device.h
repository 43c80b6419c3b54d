// What device code calls, through cuda.h and ptx.h. Each function runs on the fiber of its thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// -- barriers.cc: threads that wait for each other
// --------------------------------------------------------------

enum class Collective : uint8_t { syncwarp, shfl, ballot, any, all, match };

// Waits for all lanes of `mask`; returns the collective's result for this lane.
uint64_t collective(Collective kind, uint32_t mask, uint64_t value = 0, int source = 0);
bool sync_threads(bool vote);  // whether all threads of the block voted for it

// -- memory.cc: words and 16-byte accesses
// ----------------------------------------------------------------------

uint64_t load_acquire(const uint64_t* word);
void store_release(uint64_t* word, uint64_t v);
uint64_t add_release(uint64_t* word, uint64_t v);
uint64_t add_acquire_release(uint64_t* word, uint64_t v);
uint64_t exchange_if(uint64_t* word, uint64_t expected, uint64_t desired);
void add_relaxed(uint32_t* word, uint32_t v);

// Whole, but not ordered with accesses before or after.
uint64_t load_relaxed(const uint64_t* word);
void store_relaxed(uint64_t* word, uint64_t v);

void load_global_16(void* to, const void* p);
void store_global_16(void* p, const void* from);
void load_shared_16(void* to, const void* p);

std::byte* dynamic_shared();

uint64_t globaltimer();
void nanosleep(uint32_t ns);

// -- bulk.cc: mbarriers and the bulk copy engine
// ------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier);
void fence_mbarrier_init();
void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity);

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait_read(size_t pending);
void bulk_wait_written();
void fence_proxy_async();

}  // namespace simt
