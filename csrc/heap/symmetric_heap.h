// The symmetric heap: one region on each rank, of the same size and layout, which every rank maps.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace commlib {

// A mapping of one rank's region. Memory is reserved, and taken page by page as it is first written.
class Region {
 public:
  // A new region of zeros that this process owns.
  static std::shared_ptr<Region> create(size_t bytes);
  // The region that process `owner` of this host knows as `fd`; one of this very process is shared, not
  // mapped twice. Throws std::runtime_error with what to check.
  static std::shared_ptr<Region> open(pid_t owner, int fd, size_t bytes);

  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1: another process's region, whose mapping is enough
  // Bytes in memory now; at most bytes().
  size_t touched_bytes() const;

 private:
  // Takes the descriptor over; without `keep` it is closed, and the mapping stays.
  Region(int fd, size_t bytes, bool keep);
  int fd_;
  size_t bytes_;
  std::byte* data_;
};

}  // namespace commlib
