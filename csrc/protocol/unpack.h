// After arrival: from the receive slot to what the caller asked for. Local to a rank. Rows that have come
// grouped by expert are in place, and need only their padding.
#pragma once

#include "protocol/dispatch.h"

namespace commlib {

// Rows of the gradient of sums whose terms had weights, along the routing of the rows that were summed:
// instead of itself, a row brings each term its weight times the row, the gradient of the term's row y, and
// <row, y>, that of its weight. Done while rows are copied, so that each is read once and written once.
struct Weighing {
  const std::byte* y = nullptr;  // as out_rows, y_stride bytes apart; null: rows are copied as they come
  int64_t y_stride = 0;
  const std::byte* weights = nullptr;  // one for each row of y
  std::byte* dots = nullptr;           // the same; 0 in padding
  DType dtype{};                       // of the rows
};

struct UnpackPlan {
  int topk;
  Slot slot;
  SlotLayout layout;
  bool fresh;             // the slot's record is of this dispatch; else it goes along a known routing
  int64_t rows;           // unique rows received, or of a bounded dispatch room for them,
  const int64_t* totals;  // of which [0] is how many there are; null: it was exact
  // Bounded: how many rows the results have. Those behind the last are to say that they are none, and, if so
  // wished, to be zero, as are those behind the last of a group of fixed room.
  int64_t results;
  bool zero_rest;
  bool fixed_groups;
  // layout="expert" only:
  int64_t* expand_to;        // [rows][topk]: grouped rows, to be filled in unless known; null: layout="rank"
  const int64_t* offsets;    // [experts + 1], of the groups
  int64_t* rows_per_expert;  // [experts]
  int64_t experts;
  // Results; null: not wanted.
  std::byte* out_rows;     // [grouped rows] or [rows]; null: they stay in the slot, and so do scales
  std::byte* out_scales;   // the same, where the layout has any
  std::byte* out_weights;  // [grouped rows] or [rows][topk]
  int64_t* out_topk_idx;   // [rows][topk] local ids; layout="rank"
  int64_t* out_source;     // [grouped rows][2] or [rows][2]
  Weighing weighing;       // along a known routing only, and with out_rows

  COMMLIB_HD int64_t unique_rows() const { return totals ? totals[0] : rows; }
  COMMLIB_HD int64_t limit() const { return totals ? slot.record->limit : kNoLimit; }
};

constexpr int64_t kMisplaced = -2;  // what the source wrote about a row does not fit its counts

// The grouped row of entry i of [rows][topk], from `source`: groups hold rows in the order of sources, and
// each source has numbered its own, so it does not depend on other entries. -1: another rank's expert, or
// past the limit. Checks that it lies in its group, because the numbers are another rank's, and memory of
// this one depends on them.
COMMLIB_HD int64_t expanded_row_of(const UnpackPlan& plan, int64_t i, int64_t source) {
  if (!plan.fresh) return plan.expand_to[i];
  const int64_t e = plan.slot.experts[i];
  if (e < 0) return -1;
  if (e >= plan.experts) return kMisplaced;
  const int64_t first = plan.offsets[e];
  const int64_t to = first + plan.slot.group_firsts[source * plan.experts + e] + plan.slot.ordinals[i];
  if (to - first >= plan.limit()) return -1;
  return to >= first && to < plan.offsets[e + 1] ? to : kMisplaced;
}

COMMLIB_HD void write_source(int64_t* out_source, int64_t row, int64_t source, int64_t token) {
  out_source[row * 2] = source;
  out_source[row * 2 + 1] = token;
}

// Of unique row n.
template <class Worker>
COMMLIB_HD void expand_row_metadata(Worker& w, const UnpackPlan& plan, int64_t n, int64_t source) {
  const int64_t wb = plan.layout.weight_bytes;
  for (int k = 0; k < plan.topk; ++k) {
    const int64_t i = n * plan.topk + k;
    int64_t to = expanded_row_of(plan, i, source);
    if (to == kMisplaced) {
      w.malformed(static_cast<int>(source), Phase::arrival);
      to = -1;
    }
    if (plan.fresh) plan.expand_to[i] = to;
    if (to < 0) continue;
    if (plan.out_weights) w.copy_scalar(plan.out_weights + to * wb, plan.slot.weights + i * wb, wb);
    if (plan.out_source) write_source(plan.out_source, to, source, plan.slot.tokens[n]);
  }
}

template <class Weight, class Worker>
COMMLIB_HD void copy_row_metadata(Worker& w, const UnpackPlan& plan, Span part) {
  const auto* weights = reinterpret_cast<const Weight*>(plan.slot.weights);
  for (int64_t i = part.begin * plan.topk + w.lane(); i < part.end * plan.topk; i += w.lanes()) {
    if (plan.out_weights) reinterpret_cast<Weight*>(plan.out_weights)[i] = weights[i];
    if (plan.out_topk_idx) plan.out_topk_idx[i] = plan.slot.experts[i];
  }
}

// Metadata of this worker's unique rows as it lies in the slot -> what the caller asked for.
template <class Worker>
COMMLIB_HD void unpack_metadata(Worker& w, const UnpackPlan& plan) {
  if (!plan.fresh && !plan.out_weights) return;  // a known routing has all of it but weights
  const int64_t rows = plan.unique_rows();
  const Span part = w.share(rows);
  int64_t source = -1, source_end = plan.fresh ? 0 : rows;
  for (int64_t n = part.begin + w.lane(); n < part.end; n += w.lanes()) {
    while (n >= source_end) source_end += plan.slot.record->source_rows[++source];
    if (plan.expand_to) {
      expand_row_metadata(w, plan, n, source);
    } else if (plan.out_source) {
      write_source(plan.out_source, n, source, plan.slot.tokens[n]);
    }
  }
  if (plan.expand_to) return;
  if (plan.layout.weight_bytes == 8) {
    copy_row_metadata<double>(w, plan, part);
  } else {
    copy_row_metadata<float>(w, plan, part);
  }
}

// Unique row n goes to each of its grouped rows, or, in layout="rank", to one row, in the order received.
template <class Worker>
COMMLIB_HD void unpack_row(Worker& w, const UnpackPlan& plan, int64_t n) {
  const RowArray rows = plan.layout.rows(), scales = plan.layout.scales();
  copy_row(w, plan.layout, plan.slot.rows + n * rows.bytes, plan.slot.rows + scales.at + n * scales.bytes,
           plan.expand_to ? plan.topk : 1, [&](int k, const RowArray& array) -> Target {
             const int64_t to = plan.expand_to ? plan.expand_to[n * plan.topk + k] : n;
             if (to < 0) return nullptr;
             return (array.at == 0 ? plan.out_rows : plan.out_scales) + to * array.bytes;
           });
}

// In place of that copy: see Weighing.
template <class Worker>
COMMLIB_HD void weigh_row(Worker& w, const UnpackPlan& plan, int64_t n) {
  const Weighing& of = plan.weighing;
  const int64_t bytes = plan.layout.row_bytes, wb = plan.layout.weight_bytes;
  const std::byte* row = plan.slot.rows + n * bytes;
  const int places = plan.expand_to ? plan.topk : 1;
  for (int k = 0; k < places; ++k) {
    const int64_t to = plan.expand_to ? plan.expand_to[n * places + k] : n;
    if (to < 0) continue;
    w.weigh(of.dtype, plan.out_rows + to * bytes, Term{row, of.weights + to * wb}, of.y + to * of.y_stride,
            bytes / size_of(of.dtype), of.dots + to * wb);
  }
}

template <class Worker>
COMMLIB_HD void fill(Worker& w, int64_t* array, Span part, int64_t value) {
  if (!array) return;
  for (int64_t i = part.begin + w.lane(); i < part.end; i += w.lanes()) array[i] = value;
}

// That these rows of the results are none.
template <class Worker>
COMMLIB_HD void pad_metadata(Worker& w, const UnpackPlan& plan, Span rows) {
  const int64_t wb = plan.layout.weight_bytes, each = plan.expand_to ? 1 : plan.topk;
  const int64_t count = rows.end - rows.begin;
  if (plan.out_weights) w.zero(plan.out_weights + rows.begin * each * wb, count * each * wb);
  if (plan.weighing.y) w.zero(plan.weighing.dots + rows.begin * wb, count * wb);
  fill(w, plan.out_topk_idx, {rows.begin * each, rows.end * each}, -1);
  fill(w, plan.out_source, {rows.begin * 2, rows.end * 2}, -1);
}

template <class Worker>
COMMLIB_HD void zero_rows(Worker& w, const UnpackPlan& plan, Span rows) {
  for (int i = 0; i < plan.layout.arrays(); ++i) {
    const RowArray array = plan.layout.array(i);
    std::byte* out = i == 0 ? plan.out_rows : plan.out_scales;
    if (!plan.out_rows) out = plan.slot.rows + array.at;
    w.zero(out + rows.begin * array.bytes, (rows.end - rows.begin) * array.bytes);
  }
}

// Where there are more workers than experts, several share the padding of one group.
template <class Worker>
COMMLIB_HD void zero_padding(Worker& w, const UnpackPlan& plan) {
  const int experts = static_cast<int>(plan.experts);
  if (experts == 0) return;
  const int sharing = w.count() > experts ? w.count() / experts : 1;
  for (int i = w.index(); i < experts * sharing; i += w.count()) {
    const int e = i % experts;
    const int64_t begin = plan.offsets[e] + plan.rows_per_expert[e];
    const Span part = share_of(plan.offsets[e + 1] - begin, i / experts, sharing);
    const Span rows{begin + part.begin, begin + part.end};
    pad_metadata(w, plan, rows);
    if (!plan.fixed_groups || plan.zero_rest) zero_rows(w, plan, rows);
  }
}

// The rows of the results behind the last that there is.
template <class Worker>
COMMLIB_HD void pad_rest(Worker& w, const UnpackPlan& plan) {
  const int64_t begin = plan.expand_to ? plan.offsets[plan.experts] : plan.unique_rows();
  const Span part = w.share(plan.results > begin ? plan.results - begin : 0);
  const Span rows{begin + part.begin, begin + part.end};
  pad_metadata(w, plan, rows);
  if (plan.zero_rest) zero_rows(w, plan, rows);
}

// Rows of a bounded dispatch were dropped, and nobody has said for which experts they were: counts those of
// the rows that have come.
template <class Worker>
COMMLIB_HD void recount_experts(Worker& w, const UnpackPlan& plan) {
  const int64_t step = static_cast<int64_t>(w.count()) * w.lanes(), entries = plan.unique_rows() * plan.topk;
  for (int64_t e = w.index() * w.lanes() + w.lane(); e < plan.experts; e += step) {
    int64_t count = 0;
    for (int64_t i = 0; i < entries; ++i) count += plan.slot.experts[i] == e;
    plan.rows_per_expert[e] = count;
  }
}

// Everything but the rows, once the metadata of all rows is there. Each worker handles the same unique rows
// here as where it copies them, so workers need not wait for each other.
template <class Worker>
COMMLIB_HD void prepare_unpacking(Worker& w, const UnpackPlan& plan) {
  unpack_metadata(w, plan);
  if (plan.expand_to) zero_padding(w, plan);
  if (plan.totals) pad_rest(w, plan);
  if (plan.fresh && plan.totals && plan.slot.record->recounts) recount_experts(w, plan);
  w.all(true);  // its lanes see each other's grouped rows
}

template <class Worker>
COMMLIB_HD void unpack(Worker& w, const UnpackPlan& plan) {
  prepare_unpacking(w, plan);
  if (!plan.out_rows) return;
  const Span part = w.share(plan.unique_rows());
  for (int64_t n = part.begin; n < part.end; ++n) {
    plan.weighing.y ? weigh_row(w, plan, n) : unpack_row(w, plan, n);
  }
}

}  // namespace commlib
