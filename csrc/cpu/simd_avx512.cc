// AVX-512 (F, BW, VL).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "base/scalar_types.h"
#include "cpu/vector_ops.h"
#include "protocol/quantize.h"

// From here on, after all other headers: see vector_kernels.h.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says these of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

#include "cpu/vector_kernels.h"

namespace commlib {
namespace {

struct Avx512 {
  struct Bytes {
    using Vec = __m512i;
    static constexpr int kBytes = 64;
    static Vec load(const std::byte* p) { return _mm512_loadu_si512(p); }
    static void stream(std::byte* p, Vec v) { _mm512_stream_si512(reinterpret_cast<Vec*>(p), v); }
  };

  struct Float16 {
    using Acc = float;
    using Vec = __m512;
    static constexpr int kWidth = 16;
    static Vec set(float v) { return _mm512_set1_ps(v); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static void spread(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  };

  template <class T>
  struct Lanes;

  static void flush() { _mm_sfence(); }
};

// Even and odd elements in vectors of their own: a bf16 widens by one shift or one mask where it lies, and a
// whole cache line is stored at once. Converting 16 neighbours instead takes twice the instructions.
template <>
struct Avx512::Lanes<Bf16> {
  using Acc = float;
  struct Vec {
    __m512 even, odd;
  };
  static constexpr int kWidth = 32;
  static Vec set(float v) { return {_mm512_set1_ps(v), _mm512_set1_ps(v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.even, b.even), _mm512_mul_ps(a.odd, b.odd)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)}; }
  static void spread(float* to, Vec v) {
    float even[kWidth / 2], odd[kWidth / 2];
    _mm512_storeu_ps(even, v.even);
    _mm512_storeu_ps(odd, v.odd);
    for (int i = 0; i < kWidth; ++i) to[i] = i % 2 == 0 ? even[i / 2] : odd[i / 2];
  }
  static Vec load(const Bf16* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), widened(v)};
  }
  // The bf16 in the high half: round to nearest even, as in scalar_types.h. (VCVTNE2PS2BF16 would flush
  // subnormals.)
  static __m512i rounded(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  }
  static __m512 widened(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Vec round(Vec v) { return {widened(rounded(v.even)), widened(rounded(v.odd))}; }
  static __m512i narrowed(Vec v) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(v.even), 16), rounded(v.odd));
  }
  static void store(Bf16* p, Vec v) { _mm512_storeu_si512(p, narrowed(v)); }
  static void stream(Bf16* p, Vec v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrowed(v)); }
};

template <>
struct Avx512::Lanes<Half> : Float16 {
  static __m256i narrowed(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec round(Vec v) { return _mm512_cvtph_ps(narrowed(v)); }
  static Vec load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(Half* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
  static void stream(Half* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
};

template <>
struct Avx512::Lanes<float> : Float16 {
  static Vec round(Vec v) { return v; }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
};

template <>
struct Avx512::Lanes<double> {
  using Acc = double;
  using Vec = __m512d;
  static constexpr int kWidth = 8;
  static Vec set(double v) { return _mm512_set1_pd(v); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_pd(a, b); }
  static Vec add(Vec a, Vec b) { return _mm512_add_pd(a, b); }
  static Vec round(Vec v) { return v; }
  static void spread(double* to, Vec v) { _mm512_storeu_pd(to, v); }
  static Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Vec v) { _mm512_storeu_pd(p, v); }
  static void stream(double* p, Vec v) { _mm512_stream_pd(p, v); }
};

}  // namespace

extern const VectorOps kAvx512Ops = make_vector_ops<Avx512>("avx512");

}  // namespace commlib

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
