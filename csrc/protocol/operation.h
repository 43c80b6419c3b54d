// Operations, and what ranks say about their calls.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/rank_mask.h"

namespace commlib {

constexpr int kMaxTopk = 32;

enum class OpKind : uint8_t { none = 0, dispatch = 1, redispatch = 2, combine = 3 };
enum class Phase : uint8_t { counts = 0, arrival = 1, slot_reuse = 2, call = 3, network = 4 };

constexpr const char* name_of(OpKind op) {
  constexpr const char* names[] = {"nothing", "dispatch", "dispatch with a handle", "combine"};
  return op <= OpKind::combine ? names[static_cast<int>(op)] : "what is no operation";  // as a word may say
}

constexpr const char* name_of(Phase phase) {
  constexpr const char* names[] = {"counts", "arrival", "slot reuse", "call", "network"};
  return names[static_cast<int>(phase)];
}

// What a rank says about one of its calls: the operation, the slot that the rank lends to it, and what must
// agree on all ranks. Fits in the value of a tagged word.
struct Call {
  OpKind op = OpKind::none;
  uint8_t slot = 0;
  uint8_t flags = 0;
  // Which of those that share the communicator, layers of a model say, from 1; 0: not said.
  uint8_t caller = 0;

  COMMLIB_HD uint32_t bits() const {
    return static_cast<uint32_t>(op) << 24 | static_cast<uint32_t>(slot) << 16 |
           static_cast<uint32_t>(flags) << 8 | caller;
  }
  COMMLIB_HD static Call from_bits(uint32_t v) {
    return {static_cast<OpKind>(v >> 24), static_cast<uint8_t>(v >> 16), static_cast<uint8_t>(v >> 8),
            static_cast<uint8_t>(v)};
  }
  COMMLIB_HD bool has(uint8_t flag) const { return (flags & flag) != 0; }
  COMMLIB_HD bool same_caller(const Call& other) const {
    return caller == other.caller || caller == 0 || other.caller == 0;
  }
  COMMLIB_HD bool agrees_with(const Call& other) const;
};

constexpr uint8_t kCallHasWeights = 1;  // weights (dispatch) or their gradients (combine) ride along
constexpr uint8_t kCallDrops = 2;       // overflow="drop"
constexpr uint8_t kCallInWaves = 4;     // rows come in the order of protocol/waves.h
constexpr uint8_t kCallSaysFormat = 8;  // rows are not the communicator's own: a RowFormat goes with it
constexpr uint8_t kCallGroups = 16;     // a fresh dispatch counts what every rank needs to know of all groups
// Each rank says it of its own slot: it takes rows, or holds them, grouped by expert.
constexpr uint8_t kCallSlotIsGrouped = 32;
constexpr uint8_t kCallBounded = 64;  // a fresh dispatch that no host waits for: see protocol/bounded.h

COMMLIB_HD bool Call::agrees_with(const Call& other) const {
  return op == other.op && ((flags ^ other.flags) & ~kCallSlotIsGrouped) == 0 && same_caller(other);
}

// What ranks lend to an operation: a slot each, and which of these take rows, or hold them, grouped by
// expert, as a mask.
struct Lent {
  uint8_t slots[kMaxRanks];
  uint64_t grouped;
};

// The rows of one operation, and the scales beside each: bytes, whatever they mean.
struct RowFormat {
  // The elements' type, and above it that of scales, as base/type_names.h has them; 0: the communicator's own
  // rows.
  uint16_t type = 0;
  int64_t bytes = 0;
  int64_t scale_bytes = 0;

  static constexpr int kBytesBits = 28, kScaleBits = 20;
  COMMLIB_HD bool is_own() const { return type == 0; }
  COMMLIB_HD uint64_t word() const {
    return static_cast<uint64_t>(type) << (kBytesBits + kScaleBits) |
           static_cast<uint64_t>(scale_bytes) << kBytesBits | static_cast<uint64_t>(bytes);
  }
  static RowFormat from_word(uint64_t v) {
    return {static_cast<uint16_t>(v >> (kBytesBits + kScaleBits)),
            static_cast<int64_t>(v & ((uint64_t{1} << kBytesBits) - 1)),
            static_cast<int64_t>(v >> kBytesBits & ((uint64_t{1} << kScaleBits) - 1))};
  }
};

// Which operation: its number in the one order that all ranks keep, and what this rank calls there.
struct OpId {
  Call call;
  uint64_t epoch;
  uint64_t format = 0;  // RowFormat::word; 0: the communicator's own rows

  // What a tagged word carries of the epoch.
  COMMLIB_HD uint32_t tag() const { return static_cast<uint32_t>(epoch); }
};

}  // namespace commlib
