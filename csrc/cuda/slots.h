// Slots with tensors that streams of the user's may still read when their lease ends.
#pragma once

#include <vector>

#include "backend/slots.h"
#include "cuda/stream_uses.h"

namespace commlib::cuda {

class CudaSlotPool final : public SlotPool {
 public:
  CudaSlotPool(int device, std::shared_ptr<void> heap, std::byte* slots, SlotLayout layout, int count);
  ~CudaSlotPool() override;

  // What is queued on `stream` from now on comes after all uses of the slot by leases that have ended.
  void wait_for_uses(int index, cudaStream_t stream) const { uses_[index]->wait_on(stream); }
  // What is captured on `stream` from now on comes after all that has been captured on such streams.
  void wait_for_captured_uses(int index, cudaStream_t stream) const { uses_[index]->join(stream); }

 private:
  void note_uses(int index, const std::vector<uintptr_t>& streams) override;

  const int device_;
  const std::shared_ptr<void> heap_;
  std::vector<std::shared_ptr<StreamUses>> uses_;  // by slot
};

}  // namespace commlib::cuda
