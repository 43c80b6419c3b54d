// A GPU's SMs in two disjoint parts (green contexts): kernels on a stream of one part never run on the
// other's.
#pragma once

#include "cuda/driver.h"
#include "cuda/pool.h"

namespace commlib::cuda {

// All partitions of the same size share contexts. Neither contexts nor streams are ever destroyed: what they
// have run may still be in use.
class Partition {
 public:
  // At least `comm` SMs for communication, as few as the hardware's granularity allows; compute has the rest.
  Partition(int device, int comm);

  int comm_sms() const { return parts_->comm.sms; }
  int compute_sms() const { return parts_->compute.sms; }
  Stream comm_stream() const;  // of the highest priority
  Stream compute_stream() const;

 private:
  struct Part {
    CUgreenCtx context = nullptr;
    int sms = 0;
  };
  struct Parts {
    Part comm, compute;
  };
  static Parts split(int device, int comm);
  static Part make_part(int device, CUdevResource& sms);
  Stream stream_on(const Part& part, int priority) const;

  const int device_;
  const Parts* parts_;  // of the process
};

}  // namespace commlib::cuda
