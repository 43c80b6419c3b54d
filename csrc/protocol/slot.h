// A slot: the part of a rank's symmetric heap that receives the rows of one dispatch, or holds the rows
// of one combine while their sources pull them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"

namespace commlib {

constexpr int64_t kRowAlign = 64;  // streaming stores want whole cache lines

COMMLIB_HD constexpr int64_t align_up(int64_t n, int64_t a) { return (n + a - 1) / a * a; }

struct SlotLayout {
  int64_t capacity;  // rows
  int64_t row_bytes;
  int64_t topk;
  int64_t weight_bytes;  // of one weight: the accumulator's size
  int64_t max_tokens;    // of one rank
  int64_t group_counts;  // ranks, times the most experts that one of them has

  COMMLIB_HD int64_t tokens_at() const { return align_up(capacity * row_bytes, kRowAlign); }
  COMMLIB_HD int64_t experts_at() const { return tokens_at() + align_up(capacity * 4, kRowAlign); }
  COMMLIB_HD int64_t ordinals_at() const { return experts_at() + align_up(capacity * topk * 4, kRowAlign); }
  COMMLIB_HD int64_t weights_at() const { return ordinals_at() + align_up(capacity * topk * 4, kRowAlign); }
  COMMLIB_HD int64_t sent_ordinals_at() const {
    return weights_at() + align_up(capacity * topk * weight_bytes, kRowAlign);
  }
  COMMLIB_HD int64_t group_firsts_at() const {
    return sent_ordinals_at() + align_up(max_tokens * topk * 4, kRowAlign);
  }
  COMMLIB_HD int64_t bytes() const { return align_up(group_firsts_at() + group_counts * 8, 4096); }
};

// Parallel arrays, one entry for each row; and what the rows of a fresh dispatch need from its plan, which
// only the slot's own rank writes and reads.
struct Slot {
  std::byte* rows;         // [capacity][row_bytes]
  int32_t* tokens;         // [capacity]: the row's token at its source
  int32_t* experts;        // [capacity][topk]: expert local to the receiver, -1 where another rank owns it
  int32_t* ordinals;       // [capacity][topk]: which of its source's rows for that expert it is
  std::byte* weights;      // [capacity][topk] fp32 (fp64 for fp64 rows)
  int32_t* sent_ordinals;  // [tokens][topk]: as number_rows_of_experts writes them
  int64_t* group_firsts;   // [sources][own experts]: in each group, the rows of the sources below

  COMMLIB_HD static Slot at(const SlotLayout& layout, std::byte* slots, int index) {
    std::byte* base = slots + index * layout.bytes();
    return {base,
            reinterpret_cast<int32_t*>(base + layout.tokens_at()),
            reinterpret_cast<int32_t*>(base + layout.experts_at()),
            reinterpret_cast<int32_t*>(base + layout.ordinals_at()),
            base + layout.weights_at(),
            reinterpret_cast<int32_t*>(base + layout.sent_ordinals_at()),
            reinterpret_cast<int64_t*>(base + layout.group_firsts_at())};
  }
};

}  // namespace commlib
