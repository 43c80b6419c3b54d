// Dispatch: rows go straight from the source's tensor to their final place in the receivers' slots.
#pragma once

#include "protocol/plan.h"
#include "protocol/slot.h"
#include "protocol/words.h"

namespace commlib {

struct SendPlan {
  int64_t tokens;
  int topk;
  int width;
  const std::byte* x;         // [tokens] rows, x_stride bytes apart
  int64_t x_stride;
  const int64_t* routes;      // [tokens][width]
  const int64_t* topk_idx;    // [tokens][topk]
  const std::byte* weights;   // [tokens][topk] or null
  bool with_experts;          // false where the receiver knows the routing already
  Placement placement;
  SlotLayout layout;
  uint8_t slots[kMaxRanks];   // the slot that each rank lends to this dispatch
};

struct RowTargets {
  int count = 0;
  int rank[kMaxTopk];
  int64_t row[kMaxTopk];
  std::byte* address[kMaxTopk];
};

COMMLIB_HD RowTargets targets_of(const SendPlan& plan, const PeerTable& peers, int64_t t) {
  RowTargets to;
  const int64_t* route = plan.routes + t * plan.width;
  for (; to.count < plan.width && route[to.count] != kNoRoute; ++to.count) {
    const int p = to.rank[to.count] = rank_of(route[to.count]);
    const int64_t row = to.row[to.count] = row_of(route[to.count]);
    const Slot slot = Slot::at(plan.layout, peers.peer[p].slots, plan.slots[p]);
    to.address[to.count] = slot.rows + row * plan.layout.row_bytes;
  }
  return to;
}

// A row's token, experts and weights go beside it.
template <class Worker>
COMMLIB_HD void send_metadata(Worker& w, const SendPlan& plan, const PeerTable& peers, int64_t t,
                              const RowTargets& to) {
  const int64_t* ids = plan.topk_idx + t * plan.topk;
  const int64_t wb = plan.layout.weight_bytes;
  for (int j = 0; j < to.count; ++j) {
    const int p = to.rank[j];
    const Slot slot = Slot::at(plan.layout, peers.peer[p].slots, plan.slots[p]);
    const int64_t first = plan.placement.first_expert(p);
    const int64_t end = plan.placement.first_expert(p + 1);
    if (plan.with_experts && w.lane() == 0) slot.tokens[to.row[j]] = static_cast<int32_t>(t);
    for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
      const bool here = first <= ids[k] && ids[k] < end;
      const int64_t at = to.row[j] * plan.topk + k;
      if (plan.with_experts) slot.experts[at] = here ? static_cast<int32_t>(ids[k] - first) : -1;
      if (plan.weights) {
        w.copy_scalar(slot.weights + at * wb, here ? plan.weights + (t * plan.topk + k) * wb : nullptr, wb);
      }
    }
  }
}

template <class Worker>
COMMLIB_HD void send_rows(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  const bool metadata = plan.with_experts || plan.weights;
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    const RowTargets to = targets_of(plan, peers, t);
    w.multicast(to.address, to.count, plan.x + t * plan.x_stride, plan.layout.row_bytes);
    if (metadata) send_metadata(w, plan, peers, t, to);
  }
}

// Says to every rank that this worker's part of the operation is in place.
template <class Worker>
COMMLIB_HD void arrive(Worker& w, const PeerTable& peers) {
  w.flush();
  for (int i = 0; i < peers.size; ++i) {
    const int p = (peers.rank + i) % peers.size;
    w.add(&peers.mail_to(p).arrived);
    w.wake(p);
  }
}

// Waits until every source's part is in place; `expected` [ranks] counts the arrivals of all operations
// so far.
template <class Worker>
COMMLIB_HD bool await_arrivals(Worker& w, const PeerTable& peers, const uint64_t* expected) {
  for (int s = 0; s < peers.size; ++s) {
    if (!w.await_count(&peers.mail_from(s).arrived, expected[s], s, Phase::arrival)) return false;
  }
  return true;
}

// After arrival, layout="expert": each unique row is copied to its places in the groups.
struct ReplicatePlan {
  Slot slot;
  SlotLayout layout;
  int64_t rows;             // unique rows received
  int topk;
  const int64_t* places;    // [rows][topk]; null: layout="rank", one copy of each row in the order received
  std::byte* out;           // [grouped rows] or [rows]
};

template <class Worker>
COMMLIB_HD void replicate_rows(Worker& w, const ReplicatePlan& plan) {
  const int64_t bytes = plan.layout.row_bytes;
  for (int64_t n = w.index(); n < plan.rows; n += w.count()) {
    std::byte* to[kMaxTopk];
    int count = 0;
    if (plan.places) {
      for (int k = 0; k < plan.topk; ++k) {
        const int64_t place = plan.places[n * plan.topk + k];
        if (place >= 0) to[count++] = plan.out + place * bytes;
      }
    } else {
      to[count++] = plan.out + n * bytes;
    }
    w.multicast(to, count, plan.slot.rows + n * bytes, bytes);
  }
}

}  // namespace commlib
