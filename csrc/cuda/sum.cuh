// Sums of rows, 16 bytes or one element at a time, in the order and with the roundings of the CPU backend:
// the same bits. Compiled with -fmad=false, so that multiply and add stay apart.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/scalar_types.h"
#include "protocol/worker.h"

namespace commlib::cuda {

template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::Type;

// The i-th element of 16 bytes, i known at compile time.
__device__ inline Bf16 element_of(const ptx::Vec16& v, int i, Bf16) {
  return {static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16))};
}
__device__ inline Half element_of(const ptx::Vec16& v, int i, Half) {
  return {static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16))};
}
__device__ inline float element_of(const ptx::Vec16& v, int i, float) { return float_of(v.word[i]); }
__device__ inline double element_of(const ptx::Vec16& v, int i, double) {
  return double_of(static_cast<uint64_t>(v.word[2 * i + 1]) << 32 | v.word[2 * i]);
}

__device__ inline void set_element(ptx::Vec16& v, int i, Bf16 e) {
  v.word[i / 2] |= static_cast<uint32_t>(e.bits) << (i % 2 * 16);
}
__device__ inline void set_element(ptx::Vec16& v, int i, Half e) {
  v.word[i / 2] |= static_cast<uint32_t>(e.bits) << (i % 2 * 16);
}
__device__ inline void set_element(ptx::Vec16& v, int i, float e) { v.word[i] = bits_of(e); }
__device__ inline void set_element(ptx::Vec16& v, int i, double e) {
  const uint64_t bits = bits_of(e);
  v.word[2 * i] = static_cast<uint32_t>(bits);
  v.word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
}

// The sum of 16 bytes of each row.
template <class T>
class Sum16 {
 public:
  using Acc = Accumulator<T>;

  __device__ void add(const ptx::Vec16& row, const std::byte* weight) {
    const Acc w = weight ? *reinterpret_cast<const Acc*>(weight) : Acc{1};  // times 1 is exact
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums_[i] += w * static_cast<Acc>(widen(element_of(row, i, T{})));
  }
  __device__ ptx::Vec16 rounded() const {
    ptx::Vec16 out{};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      T e{};
      narrow(sums_[i], &e);
      set_element(out, i, e);
    }
    return out;
  }

 private:
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  Acc sums_[kElements] = {};
};

template <class T>
__device__ T sum_element(List<Term> terms, int64_t i) {
  using Acc = Accumulator<T>;
  Acc sum = 0;
  for (int j = 0; j < terms.count; ++j) {
    const Acc v = widen(reinterpret_cast<const T*>(terms.items[j].row)[i]);
    sum += terms.items[j].weight ? *reinterpret_cast<const Acc*>(terms.items[j].weight) * v : v;
  }
  T out{};
  narrow(sum, &out);
  return out;
}

}  // namespace commlib::cuda
