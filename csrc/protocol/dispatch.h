// Dispatch: rows go straight from the source's tensor to the receivers' slots. There each has one place, in
// the order received; or, in a slot that takes rows grouped by expert, one in the group of each of its
// experts (see protocol/token_rows.h).
#pragma once

#include "protocol/arrival.h"
#include "protocol/plan.h"
#include "protocol/slot.h"
#include "protocol/throttle.h"
#include "protocol/token_rows.h"

namespace commlib {

struct SendPlan {
  int64_t tokens;
  int topk;
  int width;
  const std::byte* x;  // [tokens] rows, x_stride bytes apart
  int64_t x_stride;
  const std::byte* scales;  // [tokens], scales_stride bytes apart, where the layout has any
  int64_t scales_stride;
  Conversion conversion;     // of each row, as it is sent; then there are no scales to read
  const int64_t* routes;     // [tokens][width]
  const int64_t* places;     // [tokens][topk] or null: see TokenRows
  const int64_t* topk_idx;   // [tokens][topk]
  const int32_t* ordinals;   // [tokens][topk]: see Slot; null along a known routing
  const std::byte* weights;  // [tokens][topk] or null
  Placement placement;
  SlotLayout layout;
  const Lent* lent;

  COMMLIB_HD TokenRows rows_of(int64_t t) const {
    return TokenRows::of(routes, width, places, topk, lent->grouped, t);
  }
  // If not, receivers know the routing already, and rows bring nothing but weights.
  COMMLIB_HD bool is_fresh() const { return ordinals != nullptr; }
};

// The slot of rank p in a plan's operation.
template <class Plan>
COMMLIB_HD Slot slot_of(const Plan& plan, const PeerTable& peers, int p) {
  return Slot::at(plan.layout, peers.peer[p].slots, plan.lent->slots[p]);
}

// A row and its scales, from where they lie to the same array of each target: place(i, array), of `most`
// targets, null where it is none. Returns how many there are.
template <class Worker, class Place>
COMMLIB_HD int copy_row(Worker& w, const SlotLayout& layout, const std::byte* row, const std::byte* scales,
                        int most, Place place) {
  int targets = 0;
#pragma unroll 1
  for (int i = 0; i < layout.arrays(); ++i) {
    const RowArray array = layout.array(i);
    const auto to = w.template list<Target>(most, [&](int j) -> Target { return place(j, array); });
    w.multicast(to, i == 0 ? row : scales, array.bytes);
    targets = to.count;
  }
  return targets;
}

// A token's row and its scales, as the plan says.
template <class Worker, class Place>
COMMLIB_HD int copy_token(Worker& w, const SendPlan& plan, int64_t t, int most, Place place) {
  const std::byte* row = plan.x + t * plan.x_stride;
  if constexpr (Worker::kConverts) {
    if (plan.conversion.any()) {
      const RowArray rows = plan.layout.rows(), scales = plan.layout.scales();
      const auto to = w.template list<ConvertedTarget>(most, [&](int j) -> ConvertedTarget {
        const Target target = place(j, rows);
        return {target, target ? place(j, scales) : nullptr};
      });
      w.convert(to, plan.conversion, row);
      return to.count;
    }
  }
  return copy_row(w, plan.layout, row, plan.scales + t * plan.scales_stride, most, place);
}

// The same array of row `row` in the slot that rank p lends.
template <class Plan>
COMMLIB_HD Target place_in_slot(const Plan& plan, const PeerTable& peers, int p, int64_t row,
                                const RowArray& array) {
  return slot_of(plan, peers, p).rows + array.at + row * array.bytes;
}

// Token t's row, to those ranks of which goes(rank) holds. Returns how many places it has there.
template <class Worker, class Goes>
COMMLIB_HD int send_row(Worker& w, const SendPlan& plan, const PeerTable& peers, int64_t t, Goes goes) {
  const TokenRows rows = plan.rows_of(t);
  return copy_token(w, plan, t, rows.most, [&](int j, const RowArray& array) -> Target {
    const int64_t row = rows.at(j);
    if (row == kNoRoute || !goes(rank_of(row))) return nullptr;
    return place_in_slot(plan, peers, rank_of(row), row_of(row), array);
  });
}

// What goes with a token's rows, to all ranks alike; each takes what concerns its own experts.
template <class Id>
struct TokenMetadata {
  int64_t token;
  const Id* ids;             // [topk] experts
  const int32_t* ordinals;   // [topk]; of a fresh dispatch
  const std::byte* weights;  // [topk] or null
};

template <class Weight, class Id, class Worker>
COMMLIB_HD void write_row_metadata(Worker& w, const SendPlan& plan, const Slot& slot, int p, int64_t row,
                                   const TokenMetadata<Id>& of) {
  const auto first = static_cast<uint64_t>(plan.placement.first_expert(p));
  const auto count = static_cast<uint64_t>(plan.placement.count(p));
  if (plan.is_fresh() && w.lane() == 0) slot.tokens[row] = static_cast<int32_t>(of.token);
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    const uint64_t expert = static_cast<uint64_t>(of.ids[k]) - first;  // -1 and other ranks' wrap around
    const bool here = expert < count;
    const int64_t to = row * plan.topk + k;
    if (plan.is_fresh()) {
      slot.experts[to] = here ? static_cast<int32_t>(expert) : -1;
      slot.ordinals[to] = of.ordinals[k];
    }
    if (of.weights) {
      const auto* weights = reinterpret_cast<const Weight*>(of.weights);
      reinterpret_cast<Weight*>(slot.weights)[to] = here ? weights[k] : Weight{0};
    }
  }
}

// To a row of rank p.
template <class Id, class Worker>
COMMLIB_HD void write_row_metadata(Worker& w, const SendPlan& plan, const PeerTable& peers, int p,
                                   int64_t row, const TokenMetadata<Id>& of) {
  const Slot slot = slot_of(plan, peers, p);
  if (plan.layout.weight_bytes == 8) {
    write_row_metadata<double>(w, plan, slot, p, row, of);
  } else {
    write_row_metadata<float>(w, plan, slot, p, row, of);
  }
}

template <class Worker>
COMMLIB_HD void send_row_metadata(Worker& w, const SendPlan& plan, const PeerTable& peers, int64_t t,
                                  int64_t route) {
  const int64_t at = t * plan.topk;
  const TokenMetadata<int64_t> of{t, plan.topk_idx + at, plan.is_fresh() ? plan.ordinals + at : nullptr,
                                  plan.weights ? plan.weights + at * plan.layout.weight_bytes : nullptr};
  write_row_metadata(w, plan, peers, rank_of(route), row_of(route), of);
}

// Where small stores between rows would wait for the owners of their cache lines, metadata goes rank by rank,
// apart from the rows, in one sequential stream of stores at a time. A GPU's stores do not wait, and go with
// the rows.
template <class Worker>
COMMLIB_HD void send_metadata(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  if (!plan.is_fresh() && !plan.weights) return;
  for (int i = w.index(); i < peers.size; i += w.count()) {
    const int p = (peers.rank + i) % peers.size;
    if (!peers.is_near(p)) continue;
    for (int64_t t = 0; t < plan.tokens; ++t) {
      const int64_t* route = plan.routes + t * plan.width;
      for (int j = 0; j < plan.width && route[j] != kNoRoute && rank_of(route[j]) <= p; ++j) {
        if (rank_of(route[j]) == p) send_row_metadata(w, plan, peers, t, route[j]);
      }
    }
  }
}

// Rows to ranks of this node.
template <class Worker>
COMMLIB_HD void send_rows(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  const bool metadata = plan.is_fresh() || plan.weights;
  if (!Worker::kMetadataWithRows) send_metadata(w, plan, peers);
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    const int64_t* route = plan.routes + t * plan.width;
    pass_throttle(w, plan.rows_of(t), peers.rank, plan.layout.moved_bytes());
    send_row(w, plan, peers, t, [&](int p) { return peers.is_near(p); });
    for (int j = 0; Worker::kMetadataWithRows && metadata && j < plan.width && route[j] != kNoRoute; ++j) {
      if (peers.is_near(rank_of(route[j]))) send_row_metadata(w, plan, peers, t, route[j]);
    }
  }
}

}  // namespace commlib
