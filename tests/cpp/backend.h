// What the tests need to know of a backend; cpu/backend.cc, ../simt/runtime/backend.cc
// and gpu/backend.cc define it and what memory.h declares, and one of them is linked.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/communicator.h"

namespace commlib::testing {

// What the ranks of one world run on.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual std::unique_ptr<Communicator> communicator(const Config& config) = 0;  // from any thread
  // A rank has done its part; others may not have. Its communicator goes now, or with the machine.
  virtual void retire(std::shared_ptr<Communicator>) {}
  virtual std::string error() { return ""; }  // what went wrong that no rank can know
};
std::unique_ptr<Machine> make_machine();

// Returns when the host may touch what the operations issued so far work on, synchronous ones included: on a
// GPU they all only queue.
void settle(Communicator& comm);

// Waits for one expert's rows of a dispatch in waves, as the host of either backend can; throws its failure.
void wait_expert(Communicator& comm, const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert);
// Whether the operation, the last of those issued, is done.
bool is_done(Communicator& comm, const Ticket& ticket);

// Values of Config::vector_ops; all must give the same bits.
std::vector<std::string> vector_paths();

// How many to take of many rounds that differ by chance only.
int rounds(int many);

}  // namespace commlib::testing
