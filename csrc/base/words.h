// Words of 8 bytes that a thread of the host shares with other threads, processes or a GPU.
#pragma once

#include <cstdint>

namespace commlib {

inline uint64_t load_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline void store_word(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

}  // namespace commlib
