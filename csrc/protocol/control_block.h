// The control block of a rank: all words that other ranks write for it. Each word has one writer.
#pragma once

#include <cstddef>

#include "base/event_count.h"
#include "base/rank_mask.h"
#include "protocol/operation.h"
#include "protocol/tagged_word.h"

namespace commlib {

// The waves of a dispatch in waves; rows of any other operation arrive all at once, as the last wave does.
constexpr int kWaves = 4;
constexpr int kLastWave = kWaves - 1;

// How many calls a source may be ahead of a reader that still needs an older one. Plans run ahead of queued
// operations by less (see Communicator::keep_near), so no word is overwritten unread.
constexpr int kCallRing = 64;
constexpr int kMaxSlots = 255;  // a call names its slot in 8 bits

// How a rank has departed: it has closed its communicator, or failed.
constexpr uint32_t kClosed = 1;
constexpr uint32_t kGaveUp = 2;

// What a rank tells every other when it departs: how, and the ranks that it blames. See Signals::departed.
struct Departure {
  uint64_t words[2];

  static constexpr Departure of(uint32_t how, uint64_t blamed) {
    return {{tagged_half(how, blamed, 0), tagged_half(how, blamed, 1)}};
  }
  // 0: it has not departed, or one of the words is not there yet.
  COMMLIB_HD constexpr uint32_t how() const {
    return tag_of(words[0]) == tag_of(words[1]) ? tag_of(words[0]) : 0;
  }
  COMMLIB_HD constexpr uint64_t blamed() const {
    return ranks_of_half(words[0], 0) | ranks_of_half(words[1], 1);
  }
};

// What a source says of one call. `format` (RowFormat::word) goes with calls that say so: written before
// `word`, in the order of memory also where both go to another node, and read after it.
struct SaidCall {
  uint64_t format;
  uint64_t word;  // tag: the epoch (release / acquire)
};

// What one source says to one rank, in that rank's control block.
struct alignas(64) Signals {
  // Epochs: the last operation whose rows from src are in place, at the receiver (dispatch) or in src's own
  // slot, ready to be pulled (combine). arrived[i] is of wave i of a dispatch in waves; the last is of whole
  // operations as well. Written (release) by the last of src's workers to flush its part, which has acquired
  // what the others wrote before they counted (see protocol/arrival.h); read by the owner of the block
  // (acquire). Where src is on another node, src's gateway on this node writes it, and only for dispatches.
  // Epochs never go back, so a late reader cannot miss one: src's workers begin an operation only after all
  // of them have ended the one before it, and operations move rows in the order of their epochs.
  uint64_t arrived[kWaves];
  // Epoch: the last operation of which src has pulled all its rows. Written by the last of src's workers
  // (release), like `arrived`; the owner reads it (acquire) before it writes again into a slot from which
  // that operation pulled. Ranks on other nodes pull from no slot; their gateways do, as part of the same
  // operation.
  uint64_t pulled;
  // Notified by src after it has changed any of its words for this rank. The owner sleeps on it while it
  // waits for src, so no word wakes a thread that waits for another source.
  EventCount event;
  // 1: src has closed and none of its kernels runs, so it no longer touches this rank's memory. Only where
  // src is another process on a GPU. Written by src, last of all; read by the owner before it uses the memory
  // again.
  uint64_t detached;
  // calls[epoch % kCallRing]: the call that src made at this epoch.
  SaidCall calls[kCallRing];
  // Tags: kClosed once src has closed its communicator, kGaveUp once it has failed; the values are the ranks
  // that it blames, complete once both tags are there. Written by src (release); read by waiting owners at
  // their naps (acquire), which then fail at once.
  uint64_t departed[2];
  // The ranks that src waits for, and has long waited for; each half is valid by itself. Tag: the newest call
  // of src when it wrote the word, which is out of date once src has made another call, or writes that it
  // waits for no rank. See protocol/blame.h.
  uint64_t awaits[2];
};

// Addresses of one rank's memory, as mapped here. For a rank on another node, only a copy here of what this
// rank writes for it, its own signals and counts, which the network takes there.
struct PeerBlock {
  Signals* signals;  // [ranks], by source
  uint64_t* counts;  // [2][ranks][count_words], by parity of the dispatch, then source
  std::byte* slots;  // [slots][slot_bytes]
};

struct Internode;

struct PeerTable {
  int rank;
  int size;
  int64_t count_words;
  uint64_t near;               // the ranks whose memory is mapped here, as a mask
  const Internode* internode;  // to the others; null: there are none
  PeerBlock peer[kMaxRanks];

  COMMLIB_HD bool is_near(int p) const { return has(near, p); }
  COMMLIB_HD uint64_t all() const { return first_ranks(size); }
  COMMLIB_HD const PeerBlock& self() const { return peer[rank]; }
  COMMLIB_HD Signals& signals_to(int p) const { return peer[p].signals[rank]; }
  COMMLIB_HD Signals& signals_from(int p) const { return peer[rank].signals[p]; }
  // Counts of two dispatches alternate between two areas. A source writes the area of dispatch d again
  // at d + 2; it has then read every rank's words of d + 1, which each rank published after it had read
  // all words of d.
  COMMLIB_HD uint64_t* counts(int owner, int source, uint32_t dispatch) const {
    return peer[owner].counts + ((dispatch & 1) * size + source) * count_words;
  }
};

}  // namespace commlib
