// AVX2 with F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "base/scalar_types.h"
#include "cpu/vector_ops.h"
#include "protocol/quantize.h"

// From here on, after all other headers: see vector_kernels.h.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#include "cpu/vector_kernels.h"

namespace commlib {
namespace {

struct Avx2 {
  struct Bytes {
    using Vec = __m256i;
    static constexpr int kBytes = 32;
    static Vec load(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const Vec*>(p)); }
    static void stream(std::byte* p, Vec v) { _mm256_stream_si256(reinterpret_cast<Vec*>(p), v); }
  };

  struct Float8 {
    using Acc = float;
    using Vec = __m256;
    static constexpr int kWidth = 8;
    static Vec set(float v) { return _mm256_set1_ps(v); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static void spread(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  };

  template <class T>
  struct Lanes;

  static void flush() { _mm_sfence(); }
};

// Even and odd elements in vectors of their own, as in simd_avx512.cc.
template <>
struct Avx2::Lanes<Bf16> {
  using Acc = float;
  struct Vec {
    __m256 even, odd;
  };
  static constexpr int kWidth = 16;
  static Vec set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.even, b.even), _mm256_mul_ps(a.odd, b.odd)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.even, b.even), _mm256_add_ps(a.odd, b.odd)}; }
  static void spread(float* to, Vec v) {
    float even[kWidth / 2], odd[kWidth / 2];
    _mm256_storeu_ps(even, v.even);
    _mm256_storeu_ps(odd, v.odd);
    for (int i = 0; i < kWidth; ++i) to[i] = i % 2 == 0 ? even[i / 2] : odd[i / 2];
  }
  static Vec load(const Bf16* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), widened(v)};
  }
  // The bf16 in the high half: round to nearest even, as in scalar_types.h.
  static __m256i rounded(__m256 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  static __m256 widened(__m256i v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Vec round(Vec v) { return {widened(rounded(v.even)), widened(rounded(v.odd))}; }
  static __m256i narrowed(Vec v) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(v.even), 16), rounded(v.odd), 0xaa);
  }
  static void store(Bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
  static void stream(Bf16* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
};

template <>
struct Avx2::Lanes<Half> : Float8 {
  static __m128i narrowed(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec round(Vec v) { return _mm256_cvtph_ps(narrowed(v)); }
  static Vec load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(Half* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(v)); }
  static void stream(Half* p, Vec v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrowed(v)); }
};

template <>
struct Avx2::Lanes<float> : Float8 {
  static Vec round(Vec v) { return v; }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
};

template <>
struct Avx2::Lanes<double> {
  using Acc = double;
  using Vec = __m256d;
  static constexpr int kWidth = 4;
  static Vec set(double v) { return _mm256_set1_pd(v); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_pd(a, b); }
  static Vec add(Vec a, Vec b) { return _mm256_add_pd(a, b); }
  static Vec round(Vec v) { return v; }
  static void spread(double* to, Vec v) { _mm256_storeu_pd(to, v); }
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
  static void stream(double* p, Vec v) { _mm256_stream_pd(p, v); }
};

}  // namespace

extern const VectorOps kAvx2Ops = make_vector_ops<Avx2>("avx2");

}  // namespace commlib

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
