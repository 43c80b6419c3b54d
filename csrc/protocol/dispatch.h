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
  const std::byte* x;  // [tokens] rows, x_stride bytes apart
  int64_t x_stride;
  const int64_t* routes;     // [tokens][width]
  const int64_t* topk_idx;   // [tokens][topk]
  const std::byte* weights;  // [tokens][topk] or null
  bool with_experts;         // false where the receiver knows the routing already
  Placement placement;
  SlotLayout layout;
  uint8_t slots[kMaxRanks];  // the slot that each rank lends to this dispatch
};

COMMLIB_HD Slot slot_of(const SendPlan& plan, const PeerTable& peers, int p) {
  return Slot::at(plan.layout, peers.peer[p].slots, plan.slots[p]);
}

template <class Worker>
COMMLIB_HD void send_rows(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    std::byte* to[kMaxTopk];
    const int64_t* route = plan.routes + t * plan.width;
    int n = 0;
    for (; n < plan.width && route[n] != kNoRoute; ++n) {
      to[n] = slot_of(plan, peers, rank_of(route[n])).rows + row_of(route[n]) * plan.layout.row_bytes;
    }
    w.multicast(to, n, plan.x + t * plan.x_stride, plan.layout.row_bytes);
  }
}

// The token, experts and weights of the row that token t has at rank p.
template <class Weight, class Worker>
COMMLIB_HD void send_row_metadata(Worker& w, const SendPlan& plan, const Slot& slot, int p, int64_t t,
                                  int64_t row) {
  const int64_t* ids = plan.topk_idx + t * plan.topk;
  const auto first = static_cast<uint64_t>(plan.placement.first_expert(p));
  const auto count = static_cast<uint64_t>(plan.placement.count(p));
  if (plan.with_experts && w.lane() == 0) slot.tokens[row] = static_cast<int32_t>(t);
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    const uint64_t expert = static_cast<uint64_t>(ids[k]) - first;  // -1 and other ranks' wrap around
    const int64_t to = row * plan.topk + k;
    if (plan.with_experts) slot.experts[to] = expert < count ? static_cast<int32_t>(expert) : -1;
    if (plan.weights) {
      const Weight given = reinterpret_cast<const Weight*>(plan.weights)[t * plan.topk + k];
      reinterpret_cast<Weight*>(slot.weights)[to] = expert < count ? given : Weight{0};
    }
  }
}

// Metadata goes rank by rank, apart from the rows: one sequential stream of small stores at a time. Between
// rows, each of its cache lines would wait for its owner.
template <class Worker>
COMMLIB_HD void send_metadata(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  if (!plan.with_experts && !plan.weights) return;
  for (int i = w.index(); i < peers.size; i += w.count()) {
    const int p = (peers.rank + i) % peers.size;
    const Slot slot = slot_of(plan, peers, p);
    for (int64_t t = 0; t < plan.tokens; ++t) {
      const int64_t* route = plan.routes + t * plan.width;
      for (int j = 0; j < plan.width && route[j] != kNoRoute && rank_of(route[j]) <= p; ++j) {
        if (rank_of(route[j]) != p) continue;
        if (plan.layout.weight_bytes == 8) {
          send_row_metadata<double>(w, plan, slot, p, t, row_of(route[j]));
        } else {
          send_row_metadata<float>(w, plan, slot, p, t, row_of(route[j]));
        }
      }
    }
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
  int64_t rows;  // unique rows received
  int topk;
  const int64_t* places;  // [rows][topk]; null: layout="rank", one copy of each row in the order received
  std::byte* out;         // [grouped rows] or [rows]
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
