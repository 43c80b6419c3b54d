// Rows of few bits: how a sender converts its rows on the way. The rule is here, once, for every device;
// commlib/quantization.py says it in PyTorch, and tests compare the two bit for bit.
//
// A row is cut into blocks. Each is multiplied by a factor that takes its greatest magnitude to the greatest
// number of the new type, and each product is rounded to nearest, ties to even. The scale that travels beside
// the block undoes the factor. Multiply and add stay apart (compilers are told so), so all devices round
// alike. A block of tiny numbers, or of zeros, is taken for one of kLeastMagnitude. Where a block has a NaN
// or an infinity, its scale is no number or infinite, so all of it is NaN again.
#pragma once

#include "base/dtype.h"
#include "base/scalar_types.h"

namespace commlib {

// What Python says as well, by number: append only.
enum class Quantization : uint8_t { none = 0, fp8_e4m3 = 1, fp8_e4m3_ue8m0 = 2, mxfp8 = 3, int8 = 4 };

// Of each row of an operation.
struct Conversion {
  Quantization to = Quantization::none;
  DType from = DType::bf16;  // not fp64
  int64_t elements = 0;      // of a row, each of which becomes a byte: a multiple of block()

  COMMLIB_HD bool any() const { return to != Quantization::none; }
  COMMLIB_HD bool to_integers() const { return to == Quantization::int8; }
  // Scales that are powers of two are one byte, the exponent as in fp32 (E8M0); others are fp32.
  COMMLIB_HD bool scales_are_powers() const {
    return to == Quantization::fp8_e4m3_ue8m0 || to == Quantization::mxfp8;
  }
  COMMLIB_HD int64_t block() const { return to_integers() ? elements : to == Quantization::mxfp8 ? 32 : 128; }
  COMMLIB_HD int64_t row_bytes() const { return elements; }
  COMMLIB_HD int64_t scale_bytes() const { return elements / block() * (scales_are_powers() ? 1 : 4); }
};

constexpr uint32_t kInfinityBits = 0x7f800000, kNanBits = 0x7fc00000;
constexpr float kLeastMagnitude = 1e-4f;

// As bits, magnitudes are ordered like numbers, and a NaN is the greatest: so no order of comparisons loses
// one.
COMMLIB_HD uint32_t magnitude_of(float v) { return bits_of(v) & 0x7fffffff; }

// What becomes of a block.
struct BlockScale {
  float factor;
  uint32_t stored;  // the scale: a byte, or the bits of an fp32
};

// The least power of two that is not less than `scale`: its exponent as E8M0 stores it, where 255 is NaN.
COMMLIB_HD BlockScale power_scale(float scale) {
  const uint32_t up = (bits_of(scale) + 0x7fffff) >> 23;  // infinity stays 255, a NaN becomes 256
  if (up >= 255) return {float_of(kNanBits), 255};
  return {float_of((254 - up) << 23), up};  // a normal number: scales lie between 2^-23 and 2^120
}

// `magnitude`: the greatest of a block; `most`: the greatest number of the new type.
COMMLIB_HD BlockScale scale_of(uint32_t magnitude, float most, bool powers) {
  const uint32_t least = bits_of(kLeastMagnitude);
  const float greatest = float_of(magnitude > least ? magnitude : least);
  if (powers) return power_scale(greatest / most);
  if (magnitude > kInfinityBits) return {float_of(kNanBits), kNanBits};
  return {most / greatest, bits_of(greatest / most)};
}

// The bits of a where the mask has them, else those of b.
COMMLIB_HD uint32_t merged(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

// Encodings of a product, which is at most `kMost` in magnitude (a rounding past it does not matter), or NaN.

struct ToE4m3 {
  static constexpr float kMost = 448;

  // Normal numbers lose 20 bits of mantissa and 120 of the exponent's bias. Below 2^-6, adding 2^14 leaves
  // the multiple of 2^-9, rounded, at the bottom of the float's mantissa.
  COMMLIB_HD static uint8_t of(float v) {
    const uint32_t magnitude = magnitude_of(v), sign = bits_of(v) >> 24 & 0x80;
    const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
    const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - 0x46800000;
    const uint32_t rounded = merged(mask_below(magnitude, 0x3c800000), small, normal) | sign;
    return static_cast<uint8_t>(merged(mask_below(kInfinityBits, magnitude), 0x7f, rounded));
  }
};

struct ToInt8 {
  static constexpr float kMost = 127;

  // Adding 1.5 * 2^23 leaves the integer, rounded, at the bottom of the mantissa. NaN: 0, the scale says it.
  COMMLIB_HD static uint8_t of(float v) {
    const uint32_t rounded = bits_of(v + 0x1.8p23f);
    return static_cast<uint8_t>(~mask_below(kInfinityBits, magnitude_of(v)) & rounded);
  }
};

}  // namespace commlib
