// Sums of rows, 16 bytes or one element at a time, in the order and with the roundings of the CPU backend:
// the same bits. Only the products of whole rows are summed in an order of their own, by lanes. Compiled with
// -fmad=false, so that multiply and add stay apart.
#pragma once

#include "base/scalar_types.h"
#include "cuda/ptx.cuh"
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

// From the accumulator and to it: in hardware where there is an instruction.
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
__device__ inline Bf16 narrowed<Bf16>(float v) {
  return {static_cast<uint16_t>(ptx::bf16x2_of_floats(v, 0))};
}
template <>
__device__ inline Half narrowed<Half>(float v) {
  return {static_cast<uint16_t>(ptx::half2_of_floats(v, 0))};
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

// 16 bytes of T from their sums, rounded once.
__device__ inline ptx::Vec16 packed(const float* sums, Bf16) {
  return {{ptx::bf16x2_of_floats(sums[0], sums[1]), ptx::bf16x2_of_floats(sums[2], sums[3]),
           ptx::bf16x2_of_floats(sums[4], sums[5]), ptx::bf16x2_of_floats(sums[6], sums[7])}};
}
__device__ inline ptx::Vec16 packed(const float* sums, Half) {
  return {{ptx::half2_of_floats(sums[0], sums[1]), ptx::half2_of_floats(sums[2], sums[3]),
           ptx::half2_of_floats(sums[4], sums[5]), ptx::half2_of_floats(sums[6], sums[7])}};
}
__device__ inline ptx::Vec16 packed(const float* sums, float) {
  return {{bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])}};
}
__device__ inline ptx::Vec16 packed(const double* sums, double) {
  const uint64_t a = bits_of(sums[0]), b = bits_of(sums[1]);
  return {{static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b),
           static_cast<uint32_t>(b >> 32)}};
}

// The sum of 16 bytes of each row.
template <class T>
class Sum16 {
 public:
  using Acc = Accumulator<T>;

  __device__ void add(const ptx::Vec16& row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums_[i] += value(row, i);
  }
  __device__ void add(const ptx::Vec16& row, Acc weight) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums_[i] += weight * value(row, i);
  }
  __device__ ptx::Vec16 rounded() const { return packed(sums_, T{}); }

 private:
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  __device__ static Acc value(const ptx::Vec16& row, int i) { return widened(element_of(row, i, T{})); }
  Acc sums_[kElements] = {};
};

// 16 bytes of a row, which are weighed, and the same ones of y, by which they are multiplied.
template <class T>
struct Weighed16 {
  using Acc = Accumulator<T>;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));

  Acc row[kElements], y[kElements];

  // Adds the sum of the products, taken as a tree, to *dot.
  __device__ void weigh(Acc weight, Acc* dot) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      y[i] = row[i] * y[i];
      row[i] = weight * row[i];
    }
#pragma unroll
    for (int half = kElements / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) y[i] += y[i + half];
    }
    *dot += y[0];
  }
};

template <class T>
__device__ ptx::Vec16 weigh16(const ptx::Vec16& row, const ptx::Vec16& y, Accumulator<T> weight,
                              Accumulator<T>* dot) {
  Weighed16<T> of;
#pragma unroll
  for (int i = 0; i < of.kElements; ++i) {
    of.row[i] = widened(element_of(row, i, T{}));
    of.y[i] = widened(element_of(y, i, T{}));
  }
  of.weigh(weight, dot);
  return packed(of.row, T{});
}

// The same, one element at a time, of those before `end`.
template <class T>
__device__ void weigh_elements(T* dst, const T* row, const T* y, int64_t end, Accumulator<T> weight,
                               Accumulator<T>* dot) {
  Weighed16<T> of;
#pragma unroll
  for (int i = 0; i < of.kElements; ++i) {
    of.row[i] = i < end ? widened(row[i]) : 0;
    of.y[i] = i < end ? widened(y[i]) : 0;
  }
  of.weigh(weight, dot);
#pragma unroll
  for (int i = 0; i < of.kElements; ++i) {
    if (i < end) dst[i] = narrowed<T>(of.row[i]);
  }
}

template <class T>
__device__ T sum_element(List<Term> terms, int64_t i) {
  using Acc = Accumulator<T>;
  Acc all = 0, part = 0;
  for (int j = 0; j < terms.count; ++j) {
    const Term& term = terms.items[j];
    const Acc v = widened(reinterpret_cast<const T*>(term.row)[i]);
    const Acc weighted = term.weight ? *reinterpret_cast<const Acc*>(term.weight) * v : v;
    if (term.kind == TermKind::whole) {
      all += weighted;
      continue;
    }
    part += weighted;
    if (term.kind != TermKind::last_part) continue;
    all += widened(narrowed<T>(part));
    part = 0;
  }
  return narrowed<T>(all);
}

}  // namespace commlib::cuda
