// bfloat16 and half as bits, and their conversions: the same bits on every processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/host_device.h"

namespace commlib {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

COMMLIB_HD uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
COMMLIB_HD float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

COMMLIB_HD uint64_t bits_of(double d) {
  uint64_t u;
  std::memcpy(&u, &d, sizeof u);
  return u;
}
COMMLIB_HD double double_of(uint64_t u) {
  double d;
  std::memcpy(&d, &u, sizeof d);
  return d;
}

// All bits where a < b, else none; both less than 2^31. A comparison would do, but a compiler that makes a
// branch of it finds no vectors.
COMMLIB_HD uint32_t mask_below(uint32_t a, uint32_t b) { return 0u - ((a - b) >> 31); }

COMMLIB_HD float widen(Bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

// IEEE half to float. A subnormal is an integer times 2^-24: as the bits of a float it would be one of those,
// which a thread may have told its processor to take for 0.
COMMLIB_HD float widen(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t rest = v.bits & 0x7fff;
  const uint32_t all_ones = mask_below(0x7bff, rest) & 0x7f800000;
  const uint32_t quiet = mask_below(0x7c00, rest) & 1u << 22;
  const uint32_t normal = ((rest << 13) + (112u << 23)) | all_ones | quiet;
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t is_small = mask_below(rest, 0x400);
  return float_of(sign | (small & is_small) | (normal & ~is_small));
}
COMMLIB_HD float widen(float v) { return v; }
COMMLIB_HD double widen(double v) { return v; }

// Round to nearest, ties to even.
COMMLIB_HD void narrow(float f, Bf16* out) {
  const uint32_t u = bits_of(f);
  if (f != f) {
    out->bits = static_cast<uint16_t>(u >> 16 | 0x40);  // stays a NaN, made quiet
  } else {
    out->bits = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
}

COMMLIB_HD void narrow(float f, Half* out) {
  const uint32_t u = bits_of(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the half's bits at the bottom of the float's mantissa, rounded.
    out->bits = static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  } else {
    magnitude += 0xfff + (magnitude >> 13 & 1);
    out->bits = static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13);
  }
}
COMMLIB_HD void narrow(float f, float* out) { *out = f; }
COMMLIB_HD void narrow(double f, double* out) { *out = f; }

}  // namespace commlib
