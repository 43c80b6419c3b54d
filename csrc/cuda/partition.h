// A GPU's SMs in two disjoint parts (green contexts): kernels on a stream of one part never run on the
// other's.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "cuda/driver.h"

namespace commlib::cuda {

class Partition {
 public:
  // At least `comm` SMs for communication, as few as the hardware's granularity allows; compute has the rest.
  Partition(int device, int comm);
  ~Partition();
  Partition(const Partition&) = delete;
  Partition& operator=(const Partition&) = delete;

  int comm_sms() const { return comm_.sms; }
  int compute_sms() const { return compute_.sms; }
  // Streams live as long as the partition. Communication streams have the highest priority.
  uintptr_t new_comm_stream();
  uintptr_t new_compute_stream();

 private:
  struct Part {
    CUgreenCtx context = nullptr;
    int sms = 0;
  };
  static Part make_part(int device, CUdevResource& sms);
  uintptr_t new_stream(const Part& part, int priority);

  const int device_;
  Part comm_, compute_;
  std::mutex mutex_;  // guards streams_
  std::vector<CUstream> streams_;
};

}  // namespace commlib::cuda
