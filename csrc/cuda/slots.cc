#include "cuda/slots.h"

#include <stdexcept>

namespace commlib::cuda {

CudaSlotPool::CudaSlotPool(int device, std::shared_ptr<void> heap, std::byte* slots, SlotLayout layout,
                           int count)
    : SlotPool(heap, slots, layout, count, Choice::longest_free), device_(device), heap_(std::move(heap)) {
  for (int i = 0; i < count; ++i) uses_.push_back(std::make_shared<StreamUses>());
}

CudaSlotPool::~CudaSlotPool() {
  for (const auto& uses : uses_) {
    try {
      if (!uses->done()) keep_until(heap_, [uses] { return uses->done(); });
    } catch (const std::exception&) {  // as below
    }
  }
}

// Called by destructors. An error here is the device's, which is lost.
void CudaSlotPool::note_uses(int index, const std::vector<uintptr_t>& streams) {
  try {
    for (uintptr_t s : streams) uses_[index]->note(device_, reinterpret_cast<cudaStream_t>(s));
  } catch (const std::exception&) {
  }
}

}  // namespace commlib::cuda
