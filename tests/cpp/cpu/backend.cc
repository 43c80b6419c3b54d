#include "../backend.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "../memory.h"
#include "cpu/communicator.h"
#include "cpu/vector_ops.h"

namespace commlib::testing {
namespace {

class Cpu : public Machine {
  std::unique_ptr<Communicator> communicator(const Config& config) override {
    return std::make_unique<CpuCommunicator>(config);
  }
};

}  // namespace

std::unique_ptr<Machine> make_machine() { return std::make_unique<Cpu>(); }

void settle(Communicator&) {}

void wait_expert(Communicator& comm, const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert) {
  comm.wait_expert(dispatch, ticket, expert, 0);
}

bool is_done(Communicator&, const Ticket& ticket) { return ticket->done; }

std::vector<std::string> vector_paths() { return available_vector_ops(); }

int rounds(int many) { return many; }

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

void copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // neither pointer may be null, even for no bytes
}

}  // namespace commlib::testing
