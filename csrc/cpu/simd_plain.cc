// Plain C++: any processor, and the reference for the vector paths.
#include <algorithm>
#include <cstring>

#include "base/scalar_types.h"
#include "cpu/vector_kernels.h"
#include "cpu/vector_ops.h"
#include "protocol/quantize.h"

namespace commlib {
namespace {

struct Plain {
  struct Bytes {
    struct Vec {
      uint64_t word[2];
    };
    static constexpr int kBytes = sizeof(Vec);
    static Vec load(const std::byte* p) {
      Vec v;
      std::memcpy(&v, p, sizeof v);
      return v;
    }
    static void stream(std::byte* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  };

  template <class T>
  struct Lanes {
    using Acc = decltype(widen(T{}));
    using Vec = Acc;
    static constexpr int kWidth = 1;
    static Vec load(const T* p) { return widen(*p); }
    static void store(T* p, Vec v) { narrow(v, p); }
    static void stream(T* p, Vec v) { narrow(v, p); }
    static Vec round(Vec v) {
      T kept;
      narrow(v, &kept);
      return widen(kept);
    }
    static Vec set(Acc v) { return v; }
    static Vec mul(Vec a, Vec b) { return a * b; }
    static Vec add(Vec a, Vec b) { return a + b; }
    static void spread(Acc* to, Vec v) { *to = v; }
  };

  static void flush() {}
};

}  // namespace

extern const VectorOps kPlainOps = make_vector_ops<Plain>("plain");

}  // namespace commlib
