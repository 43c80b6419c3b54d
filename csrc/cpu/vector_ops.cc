#include "cpu/vector_ops.h"

#include <stdexcept>

namespace commlib {

extern const VectorOps kPlainOps;
#if defined(__x86_64__)
extern const VectorOps kAvx2Ops;
extern const VectorOps kAvx512Ops;
#elif defined(__aarch64__)
extern const VectorOps kNeonOps;
#endif

namespace {

std::vector<const VectorOps*> runnable() {  // widest first
  std::vector<const VectorOps*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Ops);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found.push_back(&kAvx2Ops);
#elif defined(__aarch64__)
  found.push_back(&kNeonOps);
#endif
  found.push_back(&kPlainOps);
  return found;
}

}  // namespace

const VectorOps& vector_ops(const std::string& name) {
  std::string known;
  for (const VectorOps* ops : runnable()) {
    if (name.empty() || name == ops->name) return *ops;
    known += known.empty() ? ops->name : std::string(", ") + ops->name;
  }
  throw std::invalid_argument("no vector path '" + name + "' on this processor; it has: " + known);
}

std::vector<std::string> available_vector_ops() {
  std::vector<std::string> names;
  for (const VectorOps* ops : runnable()) names.push_back(ops->name);
  return names;
}

}  // namespace commlib
