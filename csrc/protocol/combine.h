// Combine: each owner puts its rows into a slot, one for each (token, rank); each source pulls its rows and
// sums them in ascending order of rank, in fp32, with one rounding at the end: bitwise reproducible.
#pragma once

#include "protocol/dispatch.h"

namespace commlib {

// The owner's half: rows of y, weighted and summed over the experts that share a token.
struct StagePlan {
  DType dtype;
  int64_t hidden;
  int topk;
  int64_t rows;        // unique rows
  const std::byte* y;  // null: the rows are in the slot already
  int64_t y_stride;
  const int64_t* places;          // [rows][topk] rows of y, -1: none; null: row n of y is row n
  const std::byte* weights;       // one for each row of y, or null
  const std::byte* weight_grads;  // rides back: [rows][topk], or with places one for each row of y; or null
  SlotLayout layout;
  Slot slot;
};

// The source's half.
struct PullPlan {
  DType dtype;
  int64_t hidden;
  int64_t tokens;
  int topk;
  int width;
  const int64_t* routes;    // [tokens][width]
  const int64_t* topk_idx;  // [tokens][topk]; read only with out_weights
  std::byte* out;           // [tokens][hidden]
  const std::byte* bias;    // [tokens] rows, bias_stride bytes apart, added last; or null
  int64_t bias_stride;
  std::byte* out_weights;  // [tokens][topk] or null
  Placement placement;
  SlotLayout layout;
  uint8_t slots[kMaxRanks];
};

template <class Worker>
COMMLIB_HD void stage_row(Worker& w, const StagePlan& plan, int64_t n) {
  const int64_t wb = plan.layout.weight_bytes;
  const std::byte* rows[kMaxTopk];
  const std::byte* weights[kMaxTopk];
  int count = 0;
  auto take = [&](int64_t i) {
    rows[count] = plan.y + i * plan.y_stride;
    weights[count++] = plan.weights ? plan.weights + i * wb : nullptr;
  };
  if (plan.places) {
    for (int k = 0; k < plan.topk; ++k) {
      const int64_t place = plan.places[n * plan.topk + k];
      if (place >= 0) take(place);
    }
  } else {
    take(n);
  }
  w.reduce(plan.dtype, plan.slot.rows + n * plan.layout.row_bytes, rows, plan.weights ? weights : nullptr,
           count, plan.hidden);
}

template <class Worker>
COMMLIB_HD void stage_rows(Worker& w, const StagePlan& plan) {
  const int64_t wb = plan.layout.weight_bytes;
  for (int64_t n = w.index(); n < plan.rows; n += w.count()) {
    if (plan.y) stage_row(w, plan, n);
    if (!plan.weight_grads) continue;
    for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
      const int64_t i = n * plan.topk + k;
      const int64_t from = plan.places ? plan.places[i] : i;
      w.copy_scalar(plan.slot.weights + i * wb, from < 0 ? nullptr : plan.weight_grads + from * wb, wb);
    }
  }
}

// The gradient of topk_weights[t][k] lies with the row of t at the rank that owns the expert.
template <class Worker>
COMMLIB_HD void pull_weights(Worker& w, const PullPlan& plan, const PeerTable& peers, int64_t t) {
  const int64_t wb = plan.layout.weight_bytes;
  const int64_t* route = plan.routes + t * plan.width;
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    const int64_t e = plan.topk_idx[t * plan.topk + k];
    const std::byte* from = nullptr;
    for (int j = 0; e >= 0 && j < plan.width && route[j] != kNoRoute; ++j) {
      const int p = rank_of(route[j]);
      if (e < plan.placement.first_expert(p) || e >= plan.placement.first_expert(p + 1)) continue;
      const Slot slot = Slot::at(plan.layout, peers.peer[p].slots, plan.slots[p]);
      from = slot.weights + (row_of(route[j]) * plan.topk + k) * wb;
    }
    w.copy_scalar(plan.out_weights + (t * plan.topk + k) * wb, from, wb);
  }
}

template <class Worker>
COMMLIB_HD void pull_rows(Worker& w, const PullPlan& plan, const PeerTable& peers) {
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    const std::byte* rows[kMaxTopk + 1];
    const int64_t* route = plan.routes + t * plan.width;
    int count = 0;
    for (; count < plan.width && route[count] != kNoRoute; ++count) {
      const int p = rank_of(route[count]);
      const Slot slot = Slot::at(plan.layout, peers.peer[p].slots, plan.slots[p]);
      rows[count] = slot.rows + row_of(route[count]) * plan.layout.row_bytes;
    }
    if (plan.bias) rows[count++] = plan.bias + t * plan.bias_stride;
    w.reduce(plan.dtype, plan.out + t * plan.layout.row_bytes, rows, nullptr, count, plan.hidden);
    if (plan.out_weights) pull_weights(w, plan, peers, t);
  }
}

// Says that this rank has pulled all its rows of the operation: their owners may write there again.
template <class Worker>
COMMLIB_HD void publish_pulled(Worker& w, const PeerTable& peers, uint32_t epoch) {
  for (int p = 0; p < peers.size; ++p) {
    w.publish(&peers.mail_to(p).pulled, tagged(epoch, 0));
    w.wake(p);
  }
}

template <class Worker>
COMMLIB_HD bool await_pulled(Worker& w, const PeerTable& peers, uint32_t epoch) {
  for (int p = 0; p < peers.size; ++p) {
    if (!w.await_reached(&peers.mail_from(p).pulled, epoch, p, Phase::slot_reuse)) return false;
  }
  return true;
}

}  // namespace commlib
