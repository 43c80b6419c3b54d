// After arrival: from the receive slot to what the caller asked for. Local to a rank.
#pragma once

#include "protocol/slot.h"
#include "protocol/worker.h"

namespace commlib {

struct DeliverPlan {
  int topk;
  Slot slot;
  SlotLayout layout;
  int64_t rows;                // unique rows received
  const int64_t* source_rows;  // [sources]: how many of them came from each; null: the routing is known
  const int64_t* places;       // [rows][topk], layout="expert"; null: layout="rank"
  // layout="expert" only: groups, for their padding.
  const int64_t* offsets;          // [experts + 1]
  const int64_t* rows_per_expert;  // [experts]
  int64_t experts;
  // Results; null: not wanted.
  std::byte* out_rows;     // [grouped rows] or [rows]; null: they stay in the slot
  std::byte* out_weights;  // [grouped rows] or [rows][topk]
  int64_t* out_topk_idx;   // [rows][topk] local ids; layout="rank"
  int64_t* out_source;     // [grouped rows][2] or [rows][2]
};

// Unique row n is copied to its places in the groups, or, in layout="rank", once in the order received.
template <class Worker>
COMMLIB_HD void replicate_row(Worker& w, const DeliverPlan& plan, int64_t n) {
  const int64_t bytes = plan.layout.row_bytes;
  const auto to = w.template list<Target>(plan.places ? plan.topk : 1, [&](int k) -> Target {
    const int64_t place = plan.places ? plan.places[n * plan.topk + k] : n;
    return place < 0 ? nullptr : plan.out_rows + place * bytes;
  });
  w.multicast(to, plan.slot.rows + n * bytes, bytes);
}

template <class Worker>
COMMLIB_HD void replicate_rows(Worker& w, const DeliverPlan& plan) {
  for (int64_t n = w.index(); n < plan.rows; n += w.count()) replicate_row(w, plan, n);
}

template <class Worker>
COMMLIB_HD void zero_padding_row(Worker& w, const DeliverPlan& plan, int64_t row) {
  const int64_t wb = plan.layout.weight_bytes;
  w.zero(plan.out_rows + row * plan.layout.row_bytes, plan.layout.row_bytes);
  if (w.lane() != 0) return;
  if (plan.out_weights) w.copy_scalar(plan.out_weights + row * wb, nullptr, wb);
  if (plan.out_source) plan.out_source[row * 2] = plan.out_source[row * 2 + 1] = -1;
}

// Where there are more workers than experts, several share the padding of one group.
template <class Worker>
COMMLIB_HD void zero_padding(Worker& w, const DeliverPlan& plan) {
  const int experts = static_cast<int>(plan.experts);
  if (experts == 0) return;
  const int sharing = w.count() > experts ? w.count() / experts : 1;
  for (int i = w.index(); i < experts * sharing; i += w.count()) {
    const int e = i % experts;
    const int64_t end = plan.offsets[e + 1];
    for (int64_t row = plan.offsets[e] + plan.rows_per_expert[e] + i / experts; row < end; row += sharing) {
      zero_padding_row(w, plan, row);
    }
  }
}

COMMLIB_HD void write_source(int64_t* out_source, int64_t row, int64_t source, int64_t token) {
  out_source[row * 2] = source;
  out_source[row * 2 + 1] = token;
}

// What grouped row each place of unique row n became.
template <class Worker>
COMMLIB_HD void deliver_grouped(Worker& w, const DeliverPlan& plan, int64_t n, int64_t source,
                                int64_t token) {
  const int64_t wb = plan.layout.weight_bytes;
  for (int k = 0; k < plan.topk; ++k) {
    const int64_t i = n * plan.topk + k;
    const int64_t to = plan.places[i];
    if (to < 0) continue;
    if (plan.out_weights) w.copy_scalar(plan.out_weights + to * wb, plan.slot.weights + i * wb, wb);
    if (plan.out_source) write_source(plan.out_source, to, source, token);
  }
}

template <class Weight, class Worker>
COMMLIB_HD void deliver_ranked(Worker& w, const DeliverPlan& plan, Span part) {
  const auto* weights = reinterpret_cast<const Weight*>(plan.slot.weights);
  for (int64_t i = part.begin * plan.topk + w.lane(); i < part.end * plan.topk; i += w.lanes()) {
    if (plan.out_weights) reinterpret_cast<Weight*>(plan.out_weights)[i] = weights[i];
    if (plan.out_topk_idx) plan.out_topk_idx[i] = plan.slot.experts[i];
  }
}

// Metadata of unique rows as it lies in the slot -> what the caller asked for.
template <class Worker>
COMMLIB_HD void deliver_metadata(Worker& w, const DeliverPlan& plan) {
  const Span part = w.share(plan.rows);
  int64_t source = -1, source_end = plan.source_rows ? 0 : plan.rows;
  for (int64_t n = part.begin + w.lane(); n < part.end; n += w.lanes()) {
    while (n >= source_end) source_end += plan.source_rows[++source];
    const int64_t token = plan.slot.tokens[n];
    if (plan.places) {
      deliver_grouped(w, plan, n, source, token);
    } else if (plan.out_source) {
      write_source(plan.out_source, n, source, token);
    }
  }
  if (plan.places) return;
  if (plan.layout.weight_bytes == 8) {
    deliver_ranked<double>(w, plan, part);
  } else {
    deliver_ranked<float>(w, plan, part);
  }
}

}  // namespace commlib
