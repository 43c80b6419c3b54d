// The types of rows and scales that ranks tell each other by number, from 1: append only. As PyTorch calls
// them; to the core they are bytes.
#pragma once

#include <cstddef>

namespace commlib {

constexpr const char* kTypeNames[] = {"bfloat16",
                                      "float16",
                                      "float32",
                                      "float64",
                                      "int8",
                                      "uint8",
                                      "int16",
                                      "int32",
                                      "int64",
                                      "bool",
                                      "uint16",
                                      "uint32",
                                      "uint64",
                                      "float8_e4m3fn",
                                      "float8_e5m2",
                                      "float8_e4m3fnuz",
                                      "float8_e5m2fnuz",
                                      "float8_e8m0fnu",
                                      "float4_e2m1fn_x2",
                                      "complex64",
                                      "complex128"};

constexpr const char* type_name(size_t number) {
  const bool known = number >= 1 && number <= sizeof kTypeNames / sizeof *kTypeNames;
  return known ? kTypeNames[number - 1] : "an unknown type";
}

}  // namespace commlib
