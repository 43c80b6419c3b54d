// Words with which ranks speak to each other: all of them lie in the control block of the rank that
// reads them, and each is written by one source only.
#pragma once

#include "protocol/types.h"

namespace commlib {

// A tagged word carries its own flag: the tag (which operation) in the high half, the value in the low
// half. One atomic 8-byte store publishes both, so no fence, no reset and no second trip is needed.
COMMLIB_HD constexpr uint64_t tagged(uint32_t tag, uint32_t value) {
  return static_cast<uint64_t>(tag) << 32 | value;
}
COMMLIB_HD constexpr uint32_t tag_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
COMMLIB_HD constexpr uint32_t value_of(uint64_t word) { return static_cast<uint32_t>(word); }

// A set of ranks in the values of two tagged words, each of which is whole by itself.
COMMLIB_HD constexpr uint64_t tagged_half(uint32_t tag, uint64_t ranks, int half) {
  return tagged(tag, static_cast<uint32_t>(ranks >> 32 * half));
}
COMMLIB_HD constexpr uint64_t ranks_of_half(uint64_t word, int half) {
  return static_cast<uint64_t>(value_of(word)) << 32 * half;
}

COMMLIB_HD constexpr uint64_t bit_of(int rank) { return uint64_t{1} << rank; }
COMMLIB_HD constexpr bool has(uint64_t mask, int rank) { return mask >> rank & 1; }
COMMLIB_HD int lowest_bit(uint64_t mask) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(mask)) - 1;
#else
  return __builtin_ctzll(mask);
#endif
}

// Tags count modulo 2^32; right as long as two ranks are less than 2^31 operations apart.
COMMLIB_HD constexpr bool reached(uint32_t tag, uint32_t wanted) {
  return static_cast<int32_t>(tag - wanted) >= 0;
}

// What a rank says of one of its calls: the operation, the slot it lends to it, and what must agree on
// all ranks. Fits in the value of a tagged word.
struct Call {
  OpKind op = OpKind::none;
  uint8_t slot = 0;
  uint16_t flags = 0;

  COMMLIB_HD uint32_t pack() const {
    return static_cast<uint32_t>(op) << 24 | static_cast<uint32_t>(slot) << 16 | flags;
  }
  COMMLIB_HD static Call unpack(uint32_t v) {
    return {static_cast<OpKind>(v >> 24), static_cast<uint8_t>(v >> 16), static_cast<uint16_t>(v)};
  }
  COMMLIB_HD bool agrees_with(const Call& other) const { return op == other.op && flags == other.flags; }
};

constexpr uint16_t kCallHasWeights = 1;  // weights (dispatch) or their gradients (combine) ride along
constexpr uint16_t kCallDrops = 2;       // overflow="drop"
constexpr uint16_t kCallInWaves = 4;     // rows come in the order of protocol/waves.h

constexpr int kWaves = 4;

// Calls a source may be ahead of a reader who still wants to know about an older one. Each call in flight
// holds a slot, so kMaxSlots bounds the distance and a word is never overwritten unread.
constexpr int kCallRing = 64;
constexpr int kMaxSlots = 32;

constexpr uint32_t kClosed = 1;
constexpr uint32_t kGaveUp = 2;

// How a CPU thread sleeps until a word changes; see cpu/bell.h. Unused on a GPU.
struct Bell {
  uint32_t rings = 0;
  uint32_t sleepers = 0;
};

// What one source says to one rank, in that rank's control block.
struct alignas(64) Mailbox {
  // Grows by workers(src) with each operation that moves rows, when src's rows for it are in place: at the
  // receiver (dispatch) or in src's own slot, ready to be pulled (combine). Added by the workers of src,
  // or by one for several, after their stores are flushed (release); read by the owner of the block
  // (acquire). Where src is on another node, it grows by lanes with each dispatch, added by src's gateway
  // here. Operations run one after another on each rank, and the counter is never reset, so a late reader
  // cannot miss it.
  uint64_t arrived;
  // Tag: the last operation that src has finished, rows pulled and all. Written by src's worker 0 (release)
  // after a barrier of its workers; the owner reads it (acquire) before it writes again into a slot from
  // which that operation pulled. Ranks on other nodes pull from no slot; their gateways do, as part of the
  // same operation.
  uint64_t pulled;
  // Rung by src after it has changed any of its words for this rank; the owner sleeps on it while it waits
  // for src, so nobody is woken for words that he does not wait for.
  Bell bell;
  // early[i] grows by workers(src) with each dispatch in waves, when src's rows of wave i are in place at the
  // receiver; the last wave counts in `arrived`, as whole operations do. Added and read like `arrived`, and
  // never reset: src's workers begin an operation only after all of them have ended the one before, so no
  // count is of a later one. One counter for each wave, for a sum over waves would let a worker that is ahead
  // stand in for one that is behind.
  uint64_t early[kWaves - 1];
  // 1: src has closed and none of its kernels runs, so that it touches this rank's memory no more. Where src
  // is another process on a GPU. Written by src, last of all; read by the owner before it uses the memory
  // again.
  uint64_t gone;
  // calls[epoch % kCallRing], tag = epoch: the call src made at this epoch (release / acquire).
  uint64_t calls[kCallRing];
  // Tags: kClosed once src closed its communicator, kGaveUp once it failed; the values are the ranks
  // that it blames, there when both tags are. Written by src (release), read by waiting owners at their
  // naps (acquire), who say so at once.
  uint64_t left[2];
  // The ranks that src waits for, and has for long; each half says its own. Tag: the newest call of src when
  // it said so; it is past once src has made another, or says that it waits for nobody. See protocol/blame.h.
  uint64_t awaits[2];
};

// Addresses of one rank's memory, as mapped here. Of a rank on another node only what this rank says to it,
// as a copy here that the network takes there: its own mailbox and counts.
struct PeerBlock {
  Mailbox* mail;     // [ranks], by source
  uint64_t* counts;  // [2][ranks][count_words], by parity of the dispatch, then source
  std::byte* slots;  // [slots][slot_bytes]
};

struct Hops;

struct PeerTable {
  int rank;
  int size;
  int64_t count_words;
  uint64_t near;     // the ranks whose memory is mapped here, as a mask
  const Hops* hops;  // to the others; null: there are none
  PeerBlock peer[kMaxRanks];

  COMMLIB_HD bool is_near(int p) const { return near >> p & 1; }
  COMMLIB_HD uint64_t all() const { return ~uint64_t{0} >> (kMaxRanks - size); }
  COMMLIB_HD const PeerBlock& self() const { return peer[rank]; }
  COMMLIB_HD Mailbox& mail_to(int p) const { return peer[p].mail[rank]; }
  COMMLIB_HD Mailbox& mail_from(int p) const { return peer[rank].mail[p]; }
  // Counts of two dispatches alternate between two places. A source writes the place of dispatch d again
  // at d + 2; it has then read everyone's words of d + 1, which each rank published after it had read
  // all words of d.
  COMMLIB_HD uint64_t* counts(int owner, int source, uint32_t dispatch) const {
    return peer[owner].counts + ((dispatch & 1) * size + source) * count_words;
  }
};

}  // namespace commlib
