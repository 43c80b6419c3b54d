// multicast, reduce, weigh and quantize, written once over an instruction set `Isa`. Included by each
// simd_*.cc after the instruction set has been switched on for that file, and after the headers below, which
// must not be compiled for it; everything stays in its unnamed namespace, so that code for one instruction
// set can never be linked into another's path.
//
// Isa::Bytes     : static load(p), stream(p, v), kBytes
// Isa::Lanes<T>  : static load(const T*) -> Vec of accumulators, store(T*, Vec), stream(T*, Vec), set(acc),
//                  mul, add, round(Vec) -> what T keeps of each, spread(acc*, Vec): the accumulators in
//                  the order of their elements, kWidth
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/scalar_types.h"
#include "cpu/vector_ops.h"
#include "protocol/quantize.h"

namespace commlib {
namespace {

constexpr int kUnroll = 4;

// How far ahead a sum prefetches its rows. The hardware prefetcher stops at each 4 KiB page, and rows are 3
// or 4 pages long: prefetching took the sum of 4 ranks' rows from 7.4 to 5.6 ms (docs/measurements/cpu.md).
// Past the end of its rows it fetches those of the next sum; where they are not known, what follows each row,
// which is most often needed next. A prefetch never faults.
constexpr int64_t kPrefetchBytes = 2048;

inline bool whole_lines(const void* p, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(bytes)) % 64 == 0;
}

template <class Isa>
void multicast_lines(std::byte* const* dst, int n, const std::byte* src, int64_t bytes) {
  constexpr int64_t step = kUnroll * Isa::Bytes::kBytes;
  int64_t i = 0;
  for (; i + step <= bytes; i += step) {
    typename Isa::Bytes::Vec v[kUnroll];
    for (int u = 0; u < kUnroll; ++u) v[u] = Isa::Bytes::load(src + i + u * Isa::Bytes::kBytes);
    for (int j = 0; j < n; ++j) {
      for (int u = 0; u < kUnroll; ++u) Isa::Bytes::stream(dst[j] + i + u * Isa::Bytes::kBytes, v[u]);
    }
  }
  for (; i < bytes; i += Isa::Bytes::kBytes) {
    const typename Isa::Bytes::Vec v = Isa::Bytes::load(src + i);
    for (int j = 0; j < n; ++j) Isa::Bytes::stream(dst[j] + i, v);
  }
}

template <class Isa>
void multicast(std::byte* const* dst, int n, const std::byte* src, int64_t bytes) {
  bool lines = n > 0;  // without a target nothing is read either
  for (int j = 0; j < n; ++j) lines = lines && whole_lines(dst[j], bytes);
  if (lines) return multicast_lines<Isa>(dst, n, src, bytes);
  for (int j = 0; j < n; ++j) std::memcpy(dst[j], src, static_cast<size_t>(bytes));
}

inline void prefetch(const std::byte* from, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
}

template <class L, class T, int kCount, bool kPrefetch>
inline void add_term(typename L::Vec (&sums)[kCount], const Term& term, int64_t i) {
  using Acc = typename L::Acc;
  const T* row = reinterpret_cast<const T*>(term.row) + i;
  if (kPrefetch) {
    prefetch(reinterpret_cast<const std::byte*>(row) + kPrefetchBytes, kCount * L::kWidth * sizeof(T));
  }
  if (term.weight) {
    const typename L::Vec w = L::set(*reinterpret_cast<const Acc*>(term.weight));
    for (int u = 0; u < kCount; ++u) sums[u] = L::add(sums[u], L::mul(w, L::load(row + u * L::kWidth)));
  } else {
    for (int u = 0; u < kCount; ++u) sums[u] = L::add(sums[u], L::load(row + u * L::kWidth));
  }
}

template <class L, class T, int kCount, bool kStream, bool kPrefetch>
inline void reduce_block(T* dst, const Term* terms, int n, int64_t i) {
  using Acc = typename L::Acc;
  typename L::Vec acc[kCount];
  for (int u = 0; u < kCount; ++u) acc[u] = L::set(Acc{0});
  for (int j = 0; j < n; ++j) {
    if (terms[j].kind == TermKind::whole) {
      add_term<L, T, kCount, kPrefetch>(acc, terms[j], i);
      continue;
    }
    // A loop of its own: the registers hold the sum of the parts, and acc waits in memory.
    typename L::Vec part[kCount];
    for (int u = 0; u < kCount; ++u) part[u] = L::set(Acc{0});
    for (;; ++j) {
      add_term<L, T, kCount, kPrefetch>(part, terms[j], i);
      if (terms[j].kind == TermKind::last_part) break;
    }
    for (int u = 0; u < kCount; ++u) acc[u] = L::add(acc[u], L::round(part[u]));
  }
  for (int u = 0; u < kCount; ++u) {
    if (kStream) {
      L::stream(dst + i + u * L::kWidth, acc[u]);
    } else {
      L::store(dst + i + u * L::kWidth, acc[u]);
    }
  }
}

template <class T, class Acc>
inline void reduce_tail(T* dst, const Term* terms, int n, int64_t i) {
  Acc acc = 0, part = 0;
  for (int j = 0; j < n; ++j) {
    const Acc v = widen(reinterpret_cast<const T*>(terms[j].row)[i]);
    Acc& sum = terms[j].kind == TermKind::whole ? acc : part;
    sum += terms[j].weight ? *reinterpret_cast<const Acc*>(terms[j].weight) * v : v;
    if (terms[j].kind != TermKind::last_part) continue;
    T rounded;
    narrow(part, &rounded);
    acc += widen(rounded);
    part = 0;
  }
  narrow(acc, dst + i);
}

template <class L, class T, bool kStream>
void reduce_row(T* dst, const Term* terms, int n, int64_t elements, const Ahead& ahead) {
  constexpr int64_t kBlock = kUnroll * L::kWidth, kBlockBytes = kBlock * sizeof(T);
  const int64_t bytes = elements * sizeof(T);
  int64_t i = 0;
  for (; i + kBlock <= elements; i += kBlock) {
    const int64_t past = i * static_cast<int64_t>(sizeof(T)) + kPrefetchBytes - bytes;
    if (past < 0 || ahead.count == 0) {
      reduce_block<L, T, kUnroll, kStream, true>(dst, terms, n, i);
    } else {
      reduce_block<L, T, kUnroll, kStream, false>(dst, terms, n, i);
      for (int j = 0; j < ahead.count; ++j) prefetch(ahead.rows[j] + past, kBlockBytes);
    }
  }
  for (; i + L::kWidth <= elements; i += L::kWidth) reduce_block<L, T, 1, kStream, false>(dst, terms, n, i);
  for (; i < elements; ++i) reduce_tail<T, typename L::Acc>(dst, terms, n, i);
}

template <class Isa, class T>
void reduce(std::byte* dst, const Term* terms, int n, int64_t elements, const Ahead& ahead) {
  using L = typename Isa::template Lanes<T>;
  T* out = reinterpret_cast<T*>(dst);
  if (whole_lines(dst, elements * static_cast<int64_t>(sizeof(T)))) {
    reduce_row<L, T, true>(out, terms, n, elements, ahead);
  } else {
    reduce_row<L, T, false>(out, terms, n, elements, ahead);
  }
}

// A product of rows is summed in so many parts, element i in part i % kDotParts, however many of them a
// vector holds: more than one vector's, because each addition takes a few cycles.
constexpr int kDotParts = 32;

// The sum of the parts, as a tree: the upper half is added to the lower one, again and again.
template <class Acc>
inline Acc dot_of(Acc (&parts)[kDotParts]) {
  for (int half = kDotParts / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

template <class L, class T, bool kStream>
void weigh_row(T* dst, const T* row, const T* y, typename L::Acc weight, int64_t elements,
               typename L::Acc* dot) {
  constexpr int kVectors = kDotParts / L::kWidth;
  typename L::Vec sums[kVectors];
  for (int u = 0; u < kVectors; ++u) sums[u] = L::set(0);
  const typename L::Vec w = L::set(weight);
  int64_t i = 0;
  for (; i + kDotParts <= elements; i += kDotParts) {
    for (int64_t b = 0; b < static_cast<int64_t>(kDotParts * sizeof(T)); b += 64) {
      __builtin_prefetch(reinterpret_cast<const std::byte*>(y + i) + kPrefetchBytes + b);
      __builtin_prefetch(reinterpret_cast<const std::byte*>(row + i) + kPrefetchBytes + b);
    }
    for (int u = 0; u < kVectors; ++u) {
      const int64_t at = i + u * L::kWidth;
      const typename L::Vec v = L::load(row + at), weighed = L::mul(w, v);
      kStream ? L::stream(dst + at, weighed) : L::store(dst + at, weighed);
      sums[u] = L::add(sums[u], L::mul(v, L::load(y + at)));
    }
  }
  typename L::Acc parts[kDotParts];
  for (int u = 0; u < kVectors; ++u) L::spread(parts + u * L::kWidth, sums[u]);
  for (int part = 0; i < elements; ++i, ++part) {
    narrow(weight * widen(row[i]), dst + i);
    parts[part] += widen(row[i]) * widen(y[i]);
  }
  *dot = dot_of(parts);
}

template <class Isa, class T>
void weigh(std::byte* dst, const Term& row, const std::byte* y, int64_t elements, std::byte* dot) {
  using L = typename Isa::template Lanes<T>;
  const bool lines = whole_lines(dst, elements * static_cast<int64_t>(sizeof(T)));
  (lines ? weigh_row<L, T, true>
         : weigh_row<L, T, false>)(reinterpret_cast<T*>(dst), reinterpret_cast<const T*>(row.row),
                                   reinterpret_cast<const T*>(y),
                                   *reinterpret_cast<const typename L::Acc*>(row.weight), elements,
                                   reinterpret_cast<typename L::Acc*>(dot));
}

// Plain loops over plain arithmetic, which compilers turn into vectors of this file's instruction set: the
// rule itself stays in one place.
template <class T>
inline uint32_t greatest_of(const T* block, int64_t n) {
  uint32_t greatest = 0;
  for (int64_t k = 0; k < n; ++k) greatest = std::max(greatest, magnitude_of(widen(block[k])));
  return greatest;
}

template <class To, class T>
inline void encode(uint8_t* __restrict to, const T* __restrict block, int64_t n, float factor) {
  for (int64_t k = 0; k < n; ++k) to[k] = To::of(widen(block[k]) * factor);
}

inline std::byte* store_scale(std::byte* at, const BlockScale& scale, bool power) {
  if (power) {
    *at = static_cast<std::byte>(scale.stored);
    return at + 1;
  }
  std::memcpy(at, &scale.stored, 4);
  return at + 4;
}

// Several blocks at a time, which stay in the first cache: all maxima, all scales, all elements. Block by
// block each of these would wait for the one before; rows of small blocks took twice as long. kBlock: of how,
// or 0 where that is not known here.
template <class To, int kBlock, class T>
void quantize_blocks(uint8_t* rows, std::byte* scales, const T* src, const Conversion& how) {
  constexpr int64_t kAtOnce = 16;
  const int64_t block = kBlock ? kBlock : how.block(), blocks = how.elements / block;
  for (int64_t first = 0; first < blocks; first += kAtOnce) {
    const int64_t n = std::min(kAtOnce, blocks - first);
    const T* from = src + first * block;
    uint8_t* to = rows + first * block;
    uint32_t greatest[kAtOnce];
    float factors[kAtOnce];
    for (int64_t b = 0; b < n; ++b) greatest[b] = greatest_of(from + b * block, block);
    for (int64_t b = 0; b < n; ++b) {
      const BlockScale scale = scale_of(greatest[b], To::kMost, how.scales_are_powers());
      factors[b] = scale.factor;
      scales = store_scale(scales, scale, how.scales_are_powers());
    }
    for (int64_t b = 0; b < n; ++b) encode<To>(to + b * block, from + b * block, block, factors[b]);
  }
}

template <class Isa, class T>
void quantize(std::byte* rows, std::byte* scales, const std::byte* src, const Conversion& how) {
  const auto convert = how.to_integers()   ? quantize_blocks<ToInt8, 0, T>
                       : how.block() == 32 ? quantize_blocks<ToE4m3, 32, T>
                                           : quantize_blocks<ToE4m3, 128, T>;
  convert(reinterpret_cast<uint8_t*>(rows), scales, reinterpret_cast<const T*>(src), how);
}

template <class Isa>
VectorOps make_vector_ops(const char* name) noexcept {
  return {name,
          multicast<Isa>,
          {reduce<Isa, Bf16>, reduce<Isa, Half>, reduce<Isa, float>, reduce<Isa, double>},
          {weigh<Isa, Bf16>, weigh<Isa, Half>, weigh<Isa, float>, weigh<Isa, double>},
          {quantize<Isa, Bf16>, quantize<Isa, Half>, quantize<Isa, float>, nullptr},
          Isa::flush};
}

}  // namespace
}  // namespace commlib
