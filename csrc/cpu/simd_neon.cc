// NEON (every AArch64 processor has it).
#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "base/scalar_types.h"
#include "cpu/vector_kernels.h"
#include "cpu/vector_ops.h"
#include "protocol/quantize.h"

namespace commlib {
namespace {

struct Neon {
  struct Bytes {
    using Vec = uint8x16_t;
    static constexpr int kBytes = 16;
    static Vec load(const std::byte* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
    static void stream(std::byte* p, Vec v) { vst1q_u8(reinterpret_cast<uint8_t*>(p), v); }
  };

  struct Float4 {
    using Acc = float;
    using Vec = float32x4_t;
    static constexpr int kWidth = 4;
    static Vec set(float v) { return vdupq_n_f32(v); }
    static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
    static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
    static void spread(float* to, Vec v) { vst1q_f32(to, v); }
  };

  template <class T>
  struct Lanes;

  static void flush() {}  // plain stores: the release store that follows orders them
};

template <>
struct Neon::Lanes<Bf16> : Float4 {
  static Vec load(const Bf16* p) { return widened(vld1_u16(&p->bits)); }
  static uint16x4_t narrowed(Vec v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
  static Vec widened(uint16x4_t v) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }
  static Vec round(Vec v) { return widened(narrowed(v)); }
  static void store(Bf16* p, Vec v) { vst1_u16(&p->bits, narrowed(v)); }
  static void stream(Bf16* p, Vec v) { store(p, v); }
};

template <>
struct Neon::Lanes<Half> : Float4 {
  static Vec round(Vec v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
  static Vec load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static void store(Half* p, Vec v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static void stream(Half* p, Vec v) { store(p, v); }
};

template <>
struct Neon::Lanes<float> : Float4 {
  static Vec round(Vec v) { return v; }
  static Vec load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vec v) { vst1q_f32(p, v); }
  static void stream(float* p, Vec v) { store(p, v); }
};

template <>
struct Neon::Lanes<double> {
  using Acc = double;
  using Vec = float64x2_t;
  static constexpr int kWidth = 2;
  static Vec set(double v) { return vdupq_n_f64(v); }
  static Vec mul(Vec a, Vec b) { return vmulq_f64(a, b); }
  static Vec add(Vec a, Vec b) { return vaddq_f64(a, b); }
  static Vec round(Vec v) { return v; }
  static void spread(double* to, Vec v) { vst1q_f64(to, v); }
  static Vec load(const double* p) { return vld1q_f64(p); }
  static void store(double* p, Vec v) { vst1q_f64(p, v); }
  static void stream(double* p, Vec v) { store(p, v); }
};

}  // namespace

extern const VectorOps kNeonOps = make_vector_ops<Neon>("neon");

}  // namespace commlib

#endif
