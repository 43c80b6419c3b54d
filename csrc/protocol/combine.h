// Combine: each owner puts its rows into a slot, one for each (token, rank); each source pulls its rows and
// sums them in ascending order of rank, in fp32, with one rounding at the end: bitwise reproducible. Rows
// that an owner already has in a slot, grouped by expert, stay as they are: sources pull all of a token's,
// and sum and round those of one rank as that rank would have.
#pragma once

#include "protocol/dispatch.h"

namespace commlib {

// The owner's half: rows of y, weighted and summed over the experts that share a token.
struct LocalSumPlan {
  DType dtype;
  int64_t hidden;
  int topk;
  int64_t rows;           // unique rows, or of a bounded dispatch room for them,
  const int64_t* totals;  // of which [0] is how many there are; null: it was exact
  const std::byte* y;     // null: the rows are in the slot already
  int64_t y_stride;
  const int64_t* expand_to;  // [rows][topk] rows of y, -1: none; null: row n of y is row n
  const std::byte* weights;  // one for each row of y, or null
  const std::byte*
      weight_grads;      // rides back: [rows][topk], or with expand_to one for each row of y; or null
  int64_t grouped_rows;  // in the slot already: their weights are put beside them; 0: there are none
  SlotLayout layout;
  Slot slot;

  COMMLIB_HD int64_t unique_rows() const { return totals ? totals[0] : rows; }
};

// The source's half.
struct PullPlan {
  DType dtype;
  int64_t hidden;
  int64_t tokens;
  int topk;
  int width;
  const int64_t* routes;    // [tokens][width]
  const int64_t* places;    // [tokens][topk] or null: see TokenRows
  const int64_t* topk_idx;  // [tokens][topk]; read only with out_weights
  std::byte* out;           // [tokens][hidden]
  const std::byte* bias;    // [tokens] rows, bias_stride bytes apart, added last; or null
  int64_t bias_stride;
  std::byte* out_weights;  // [tokens][topk] or null
  // This rank's rows for its own tokens, read from where the user has them: y, with their weights; null: they
  // are in the slot as well.
  const std::byte* own_y;
  int64_t own_stride;
  const std::byte* own_weights;  // or null
  Placement placement;
  SlotLayout layout;
  const Lent* lent;      // where each rank's rows lie
  uint64_t own_grouped;  // this rank, as a mask, where own_y is grouped by expert

  COMMLIB_HD TokenRows rows_of(int64_t t) const {
    return TokenRows::of(routes, width, places, topk, lent->grouped | own_grouped, t);
  }
};

template <class Worker>
COMMLIB_HD void sum_local_row(Worker& w, const LocalSumPlan& plan, int64_t n) {
  const int64_t wb = plan.layout.weight_bytes;
  const auto rows = w.template list<Term>(plan.expand_to ? plan.topk : 1, [&](int k) -> Term {
    const int64_t i = plan.expand_to ? plan.expand_to[n * plan.topk + k] : n;
    if (i < 0) return {nullptr, nullptr};
    return {plan.y + i * plan.y_stride, plan.weights ? plan.weights + i * wb : nullptr};
  });
  w.reduce(plan.dtype, plan.slot.rows + n * plan.layout.row_bytes, rows, plan.hidden);
}

// The row that token t has at its own rank, or `none`.
COMMLIB_HD int64_t own_row(const PullPlan& plan, int64_t t, int rank, int64_t none) {
  const int64_t* route = plan.routes + t * plan.width;
  const int j = route_to(route, plan.width, bit_of(rank));
  return j < plan.width ? row_of(route[j]) : none;
}

// This rank's rows for its own tokens, which no other rank pulls, where they are read from y. They lie side
// by side, because rows are in order of their source: from the row of the first such token to that of the
// last.
template <class Worker>
COMMLIB_HD Span rows_pulled_from_y(Worker& w, const PullPlan& plan, int rank) {
  if (!plan.own_y) return {0, 0};
  int64_t first = INT64_MAX, last = INT64_MAX;
  for (int64_t at = 0; at < plan.tokens && first == INT64_MAX; at += w.lanes()) {
    const int64_t t = at + w.lane();
    first = w.lowest(t < plan.tokens ? own_row(plan, t, rank, INT64_MAX) : INT64_MAX);
  }
  if (first == INT64_MAX) return {0, 0};
  for (int64_t at = plan.tokens - 1; last == INT64_MAX; at -= w.lanes()) {
    const int64_t t = at - w.lane();
    last = w.lowest(t >= 0 ? -own_row(plan, t, rank, -INT64_MAX) : INT64_MAX);  // the greatest row
  }
  return {first, 1 - last};
}

// Weights of rows that stay where they are.
template <class Worker>
COMMLIB_HD void lay_weights(Worker& w, const LocalSumPlan& plan) {
  const Span part = w.share(plan.grouped_rows);
  for (int64_t i = part.begin + w.lane(); i < part.end; i += w.lanes()) {
    if (plan.layout.weight_bytes == 8) {
      const auto* from = reinterpret_cast<const double*>(plan.weights);
      reinterpret_cast<double*>(plan.slot.grouped_weights)[i] = from ? from[i] : 1.0;
    } else {
      const auto* from = reinterpret_cast<const float*>(plan.weights);
      reinterpret_cast<float*>(plan.slot.grouped_weights)[i] = from ? from[i] : 1.0f;
    }
  }
}

// `skip`: rows that no rank pulls from the slot.
template <class Worker>
COMMLIB_HD void sum_local_rows(Worker& w, const LocalSumPlan& plan, Span skip) {
  const int64_t wb = plan.layout.weight_bytes;
  lay_weights(w, plan);
  if (!plan.y && !plan.weight_grads) return;
  for (int64_t n = w.index(); n < plan.unique_rows(); n += w.count()) {
    if (plan.y && (n < skip.begin || n >= skip.end)) sum_local_row(w, plan, n);
    if (!plan.weight_grads) continue;
    for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
      const int64_t i = n * plan.topk + k;
      const int64_t from = plan.expand_to ? plan.expand_to[i] : i;
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
      if (!peers.is_near(p)) continue;
      if (e < plan.placement.first_expert(p) || e >= plan.placement.first_expert(p + 1)) continue;
      const Slot slot = slot_of(plan, peers, p);
      from = slot.weights + (row_of(route[j]) * plan.topk + k) * wb;
    }
    w.copy_scalar(plan.out_weights + (t * plan.topk + k) * wb, from, wb);
  }
}

// What token t gets from this node by row j of its `rows`; after them, the bias.
COMMLIB_HD Term near_term(const PullPlan& plan, const PeerTable& peers, const TokenRows& rows, int64_t t,
                          int j) {
  if (j == rows.most) return {plan.bias ? plan.bias + t * plan.bias_stride : nullptr, nullptr};
  const int64_t route = rows.at(j);
  if (route == kNoRoute) return {nullptr, nullptr};
  const int p = rank_of(route);
  const int64_t row = row_of(route), wb = plan.layout.weight_bytes;
  if (plan.own_y && p == peers.rank) {
    return {plan.own_y + row * plan.own_stride, plan.own_weights ? plan.own_weights + row * wb : nullptr,
            rows.kind_of(j)};
  }
  const Slot slot = slot_of(plan, peers, p);
  const TermKind kind = rows.kind_of(j);
  return {slot.rows + row * plan.layout.row_bytes,
          kind == TermKind::whole ? nullptr : slot.grouped_weights + row * wb, kind};
}

template <class Worker>
COMMLIB_HD bool pulls_all_rows(const Worker&, const PullPlan& plan, const PeerTable& peers, int64_t t) {
  if (!Worker::kInternode) return true;
  return route_to(plan.routes + t * plan.width, plan.width, ~peers.near) == plan.width;
}

// Announces the rows of a token. One's own are next to each other unless they are grouped by expert: then
// the row after one of token t's is seldom one of the next token's.
template <class Worker>
COMMLIB_HD void expect_rows(Worker& w, const PullPlan& plan, const PeerTable& peers, int64_t t) {
  if (!plan.places || t >= plan.tokens || !pulls_all_rows(w, plan, peers, t)) return;
  const TokenRows rows = plan.rows_of(t);
  w.will_read(rows.most + 1, [&](int j) { return near_term(plan, peers, rows, t, j).row; });
}

// Tokens whose rows all lie on this node.
template <class Worker>
COMMLIB_HD void pull_rows(Worker& w, const PullPlan& plan, const PeerTable& peers) {
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    if (!pulls_all_rows(w, plan, peers, t)) continue;
    const TokenRows rows = plan.rows_of(t);
    const auto terms =
        w.template list<Term>(rows.most + 1, [&](int j) { return near_term(plan, peers, rows, t, j); });
    expect_rows(w, plan, peers, t + w.count());
    pass_throttle(w, rows, peers.rank, plan.layout.row_bytes);
    w.reduce(plan.dtype, plan.out + t * plan.layout.row_bytes, terms, plan.hidden);
    if (plan.out_weights) pull_weights(w, plan, peers, t);
  }
}

// This worker has pulled all its rows of the operation or, if not `ok`, failed. The last worker tells the
// rows' owners that they may write there again, and gets true. All workers call it together.
template <class Worker>
COMMLIB_HD bool finish_pull(Worker& w, const PeerTable& peers, uint64_t epoch, bool ok) {
  const int workers = w.gather();
  if (!workers || !ok || w.spoken_for_failed()) return false;
  if (!is_last(w, w.counter(kPulledCounter), workers, w.count())) return false;
  publish_epoch(w, peers, peers.near, peers.rank, epoch, [](Signals& s) -> uint64_t& { return s.pulled; });
  return true;
}

// Waits until no rank of this node pulls any more: in an operation of this rank's, or from the slot that this
// rank lends to its operation.
template <class Worker>
COMMLIB_HD bool await_pulled(Worker& w, const PeerTable& peers, uint64_t epoch) {
  return await_ranks(w, peers, peers.near, Phase::slot_reuse,
                     [&](int p) { return w.read(&peers.signals_from(p).pulled) >= epoch; });
}
template <class Worker>
COMMLIB_HD bool await_slot(Worker& w, const PeerTable& peers) {
  return await_ranks(w, peers, peers.near, Phase::slot_reuse,
                     [&](int p) { return w.read(&peers.signals_from(p).pulled) >= w.last_pull(); });
}

}  // namespace commlib
