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

// Conversions to and from the accumulator: in hardware where there is an instruction.
template <class T>
__device__ Accumulator<T> widened(T e) {
  return widen(e);
}
__device__ inline float widened(Half e) { return ptx::float_of_half(e.bits); }

template <class T>
__device__ T narrowed(Accumulator<T> v) {
  T e;
  narrow(v, &e);
  return e;
}
template <>
__device__ inline Half narrowed<Half>(float v) {
  return {ptx::half_of_float(v)};
}

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
    if (!weight) {  // the same for all lanes
#pragma unroll
      for (int i = 0; i < kElements; ++i) sums_[i] += value(row, i);
      return;
    }
    const Acc w = *reinterpret_cast<const Acc*>(weight);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums_[i] += w * value(row, i);
  }
  __device__ ptx::Vec16 rounded() const {
    ptx::Vec16 out{};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      set_element(out, i, narrowed<T>(sums_[i]));
    }
    return out;
  }

 private:
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  __device__ static Acc value(const ptx::Vec16& row, int i) { return widened(element_of(row, i, T{})); }
  Acc sums_[kElements] = {};
};

template <class T>
__device__ T sum_element(List<Term> terms, int64_t i) {
  using Acc = Accumulator<T>;
  Acc sum = 0;
  for (int j = 0; j < terms.count; ++j) {
    const Acc v = widened(reinterpret_cast<const T*>(terms.items[j].row)[i]);
    sum += terms.items[j].weight ? *reinterpret_cast<const Acc*>(terms.items[j].weight) * v : v;
  }
  return narrowed<T>(sum);
}

}  // namespace commlib::cuda
