// Rows as tensors, without copies.
#pragma once

#include <cstdint>
#include <memory>

#include "bindings/dlpack.h"
#include "cpu/communicator.h"

namespace commlib::python {

// Rows that keep their owner (a slot lease, a pooled buffer) alive; torch.from_dlpack takes them.
struct Memory {
  std::shared_ptr<void> owner;
  void* data;
  int64_t rows;
  int64_t columns;
  dlpack::DataType type;
  dlpack::Device device;
};

// Rows in a slot, or their scales; those that are not the communicator's own as bytes.
Memory view_of(const Communicator& comm, std::shared_ptr<SlotLease> lease, int64_t rows,
               const RowFormat& format, bool scales);

Memory new_rows(CpuCommunicator& comm, int64_t rows);

}  // namespace commlib::python
