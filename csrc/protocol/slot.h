// A slot: the part of a rank's symmetric heap that receives the rows of one dispatch, or holds the rows
// of one combine while their sources pull them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "protocol/operation.h"

namespace commlib {

constexpr int64_t kRowAlign = 64;    // streaming stores want whole cache lines
constexpr int64_t kFrameAlign = 16;  // of what goes between nodes: bulk copies want it

COMMLIB_HD constexpr int64_t align_up(int64_t n, int64_t a) { return (n + a - 1) / a * a; }

// One of the arrays of a slot that hold rows.
struct RowArray {
  int64_t at;     // from the slot's first byte
  int64_t bytes;  // of each row's part
};

// What the plan of a fresh dispatch leaves for its rows.
struct PlanRecord {
  Lent lent;
  int64_t source_rows[kMaxRanks];  // of the unique rows, how many come from each source
  // Of a bounded dispatch:
  int64_t limit;  // of each expert's rows: those past it are dropped
  bool recounts;  // rows were dropped, and nobody has said of which experts
};

struct SlotLayout {
  int64_t capacity;     // rows
  int64_t room_bytes;   // for each row and its scales
  int64_t row_bytes;    // of the rows of this operation
  int64_t scale_bytes;  // of the scales of each; 0: none
  int64_t topk;
  int64_t weight_bytes;  // of one weight: the accumulator's size
  int64_t max_tokens;    // of one rank
  int64_t group_counts;  // ranks, times the most experts that one of them has
  int64_t grouped_rows;  // for as many rows grouped by expert there is room; 0: such rows lie in no slot

  // Rows of either kind.
  COMMLIB_HD int64_t room() const { return grouped_rows > capacity ? grouped_rows : capacity; }
  COMMLIB_HD RowArray rows() const { return {0, row_bytes}; }
  COMMLIB_HD RowArray scales() const { return {align_up(room() * row_bytes, kRowAlign), scale_bytes}; }
  // What goes along the way of a row: array 0 is the rows, array 1 their scales.
  COMMLIB_HD int arrays() const { return scale_bytes ? 2 : 1; }
  COMMLIB_HD RowArray array(int i) const { return i == 0 ? rows() : scales(); }
  COMMLIB_HD int64_t moved_bytes() const { return row_bytes + scale_bytes; }  // of a row, from rank to rank
  // A slot, and a frame between nodes, have room besides for where scales begin.
  COMMLIB_HD bool has_room_for(const RowFormat& format) const {
    return format.bytes + format.scale_bytes <= room_bytes;
  }
  COMMLIB_HD SlotLayout with(const RowFormat& format) const {
    SlotLayout layout = *this;
    if (format.is_own()) return layout;
    layout.row_bytes = format.bytes;
    layout.scale_bytes = format.scale_bytes;
    return layout;
  }

  COMMLIB_HD int64_t tokens_at() const { return align_up(room() * room_bytes, kRowAlign) + kRowAlign; }
  COMMLIB_HD int64_t experts_at() const { return tokens_at() + align_up(capacity * 4, kRowAlign); }
  COMMLIB_HD int64_t ordinals_at() const { return experts_at() + align_up(capacity * topk * 4, kRowAlign); }
  COMMLIB_HD int64_t weights_at() const { return ordinals_at() + align_up(capacity * topk * 4, kRowAlign); }
  COMMLIB_HD int64_t sent_ordinals_at() const {
    return weights_at() + align_up(capacity * topk * weight_bytes, kRowAlign);
  }
  COMMLIB_HD int64_t group_firsts_at() const {
    return sent_ordinals_at() + align_up(max_tokens * topk * 4, kRowAlign);
  }
  COMMLIB_HD int64_t grouped_weights_at() const {
    return group_firsts_at() + align_up(group_counts * 8, kRowAlign);
  }
  COMMLIB_HD int64_t record_at() const {
    return grouped_weights_at() + align_up(grouped_rows * weight_bytes, kRowAlign);
  }
  COMMLIB_HD int64_t bytes() const {
    return align_up(record_at() + static_cast<int64_t>(sizeof(PlanRecord)), 4096);
  }
};

// Parallel arrays, one entry for each row; and what the rows of a fresh dispatch need from its plan, which
// only the slot's own rank writes and reads. Rows grouped by expert lie where they go in the groups; the
// other arrays have one entry for each unique row all the same.
struct Slot {
  std::byte* rows;         // [room][row_bytes], then [room][scale_bytes]
  int32_t* tokens;         // [capacity]: the row's token at its source
  int32_t* experts;        // [capacity][topk]: expert local to the receiver, -1 where another rank owns it
  int32_t* ordinals;       // [capacity][topk]: which of its source's rows for that expert it is
  std::byte* weights;      // [capacity][topk] fp32 (fp64 for fp64 rows)
  int32_t* sent_ordinals;  // [tokens][topk]: as number_rows_of_experts writes them
  int64_t* group_firsts;   // [sources][own experts]: in each group, the rows of the sources below
  std::byte* grouped_weights;  // [grouped rows]: of rows that lie grouped, in a combine
  PlanRecord* record;

  COMMLIB_HD static Slot at(const SlotLayout& layout, std::byte* slots, int index) {
    std::byte* base = slots + index * layout.bytes();
    return {base,
            reinterpret_cast<int32_t*>(base + layout.tokens_at()),
            reinterpret_cast<int32_t*>(base + layout.experts_at()),
            reinterpret_cast<int32_t*>(base + layout.ordinals_at()),
            base + layout.weights_at(),
            reinterpret_cast<int32_t*>(base + layout.sent_ordinals_at()),
            reinterpret_cast<int64_t*>(base + layout.group_firsts_at()),
            base + layout.grouped_weights_at(),
            reinterpret_cast<PlanRecord*>(base + layout.record_at())};
  }
};

}  // namespace commlib
