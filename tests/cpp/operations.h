// The operations of a scenario on one rank, started and checked.
#pragma once

#include <functional>
#include <memory>

#include "scenario.h"
#include "world.h"

namespace commlib::testing {

enum class RowsOf { tensor, receive_slot, lent_slot };

// How a rank asks: may differ by rank, and must not change the results.
struct Manner {
  bool async = false;
  bool zero_copy = false;           // where rows can lie in a slot as they are wanted
  RowsOf combine = RowsOf::tensor;  // what the combine takes y from, where y may lie in a slot as it is
  Held held = nullptr;              // until the operation is done
  std::function<void()> between;    // called between the halves of a dispatch, if set
  uint8_t caller = 0;               // the same on all ranks, or 0
  // The scenario's rows, which need not be of the communicator's type and width, as rows that say what they
  // are; with scales of so many bytes, but in a combine. The same on all ranks.
  bool says_format = false;
  int64_t scale_bytes = 0;
};
Manner random_manner(Random& random);

// An operation that uses its owner's memory, and so is finished before that memory goes.
class UnderWay {
 public:
  UnderWay() = default;
  UnderWay(const Rank& self, Ticket ticket) : comm_(self.comm), ticket_(std::move(ticket)) {}
  UnderWay(UnderWay&&) = default;
  UnderWay& operator=(UnderWay&&) = default;
  ~UnderWay();

  // Results are there only when it has returned: a GPU's operations are all asynchronous. Throws if the
  // operation has failed.
  void wait() const;
  const Ticket& ticket() const { return ticket_; }

 private:
  mutable std::weak_ptr<Communicator> comm_;  // empty once there is nothing to wait for
  Ticket ticket_;
};

// A routing for a plan to fill in, and its memory.
struct RoutingRoom {
  Int64s routes, places, rows_per_expert, offsets;
  RoutePlan view;

  RoutingRoom() = default;
  // topk_idx must stay where it is.
  RoutingRoom(const Config& config, int ranks, int rank, const Int64s& topk_idx);
  RoutingRoom(const Scenario& s, int rank);  // grouped where the scenario is
};

struct Dispatched {
  const Scenario* scenario = nullptr;
  int rank = 0;
  RoutingRoom room;
  Int64s expand_to, ids, source;
  Int64s totals;  // bounded
  Buffer rows, weights, sent_scales, scales;
  int64_t scale_bytes = 0;
  std::shared_ptr<SlotLease> lease;  // zero-copy only: holds the rows
  std::unique_ptr<PendingDispatch> pending;
  RoutePlan routing;
  int64_t dropped = 0;

  const std::byte* scales_data(const Communicator& comm) const;
  const RankCase& mine() const { return scenario->ranks[rank]; }
  const std::byte* data() const { return lease ? lease->slot().rows : rows.data(); }

  UnderWay under_way;  // last, so that it goes first
};
using DispatchedPtr = std::unique_ptr<Dispatched>;  // it stays where it is: jobs hold addresses

struct Combined {
  Buffer out, out_weights;
  UnderWay under_way;
};
using CombinedPtr = std::unique_ptr<Combined>;

DispatchedPtr start_dispatch(Rank& self, const Scenario& scenario, const Manner& manner);
// A slot that may be written.
std::shared_ptr<SlotLease> lend_slot(Rank& self);
// The x and weights of another scenario along the routing of `known`.
DispatchedPtr start_redispatch(Rank& self, const Dispatched& known, const Scenario& values,
                               const Manner& manner);
// The same where x is the gradient of the combine of y, with y's weights whether or not it is weighted.
struct Weighed {
  Buffer dots;
  DispatchedPtr rows;  // last, so that it goes first
};
Weighed start_weighing(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner);
// The y of `values` back along the routing of `known`, which must be finished.
CombinedPtr start_combine(Rank& self, const Dispatched& known, const Scenario& values, const Manner& manner);

// One of these, and waits for it.
void run_operation(Rank& self, OpKind op, const Dispatched& known, const Scenario& values,
                   const Manner& manner);

// `got` may lie in a slot of the heap, which only copies need reach.
void check_bytes(const void* got, const Buffer& wanted, const char* what);
// OpId, and compare bit by bit.
void check_dispatch(const Dispatched& d);
// Each received row's scales are those that its source sent beside it.
void check_scales(const Rank& self, const Dispatched& d, const Int64s& source);
void check_redispatch(const Dispatched& d);
void check_weighing(const Weighed& weighed);
void check_combine(const Rank& self, const Combined& c, const Scenario& values);

// In waves: wait for one expert's rows, and compare them bit by bit.
void check_expert(Rank& self, const Dispatched& d, int64_t expert);

// Dispatch, redispatch, combine and its gradient, one after another.
void check_round_trip(Rank& self, const Scenario& first, const Scenario& second, const Manner& manner);

}  // namespace commlib::testing
