// What the tests need of a test framework: named tests, checks that throw, and random numbers from one seed.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace commlib::testing {

struct Test {
  const char* name;  // what it promises
  void (*run)();
};

class Failed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(bool ok, const char* promise) {
  if (!ok) throw Failed(promise);
}

template <class A, class B>
void check_equal(const A& got, const B& wanted, const char* what) {
  if (got == wanted) return;
  std::ostringstream text;
  text << what << ": got " << got << ", wanted " << wanted;
  throw Failed(text.str());
}

inline void check_contains(const std::string& text, const std::string& part, const char* what) {
  if (text.find(part) == std::string::npos)
    throw Failed(std::string(what) + ": no '" + part + "' in: " + text);
}

// Runs `body`, which must throw an E, and returns that.
template <class E>
E check_throws(const std::function<void()>& body, const char* what) {
  try {
    body();
  } catch (const E& e) {
    return e;
  }
  throw Failed(std::string(what) + ": nothing was thrown");
}

uint64_t seed();  // of this run: printed at its start, given with --seed

// splitmix64: small, fast, and the same everywhere.
class Random {
 public:
  explicit Random(uint64_t stream) : state_(seed() * 0x9e3779b97f4a7c15 + stream) { next(); }

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  float between_minus_one_and_one() {
    return static_cast<float>(static_cast<int32_t>(next() >> 32)) * 0x1p-31f;
  }

 private:
  uint64_t state_;
};

}  // namespace commlib::testing
