// Ranks on other nodes. Memory is not mapped across nodes, so rows and words go there through a network.
//
// A source sends a row to the gateway of each node that needs it, once, with the list of ranks there that
// want it; the gateway, which is a rank of that node, passes it on through mapped memory. For direct routing
// every rank on another node is a gateway of its own, that serves itself only: the protocol is the same.
//
// Rows travel in chunks, through channels. A channel goes one way, from one rank to one other, and has two
// equal rings of chunks, one at each end. A sender fills chunk n in its ring and posts it; the network puts
// it at the same place in the receiver's ring and then says so in a word. The receiver says how many chunks
// it has taken, and the sender is never more than a ring ahead of that: memory is bounded, and a slow rank
// holds back those who send to it, and nobody else.
#pragma once

#include "protocol/words.h"

namespace commlib {

// What goes through the network, and what the header of each message says. Where it arrives nothing of it is
// taken on trust: see net/inspection.h and, for what chunks hold, channel.h.
enum class PostKind : uint8_t {
  chunk,  // rows; number: of the chunk, counted from 0
  taken,  // number: chunks of the channel's lane that its receiver has taken
  words,  // of a control block; number: the offset of the first in bytes
};

// Of the channels between a source and its gateway, in which direction.
enum class Stream : uint8_t { outward, homeward };

struct Post {
  PostKind kind;
  Stream stream;
  uint16_t lane;
  int32_t peer;  // where it goes; where it arrives, the rank it comes from
  uint64_t number;
  uint64_t bytes;  // of what follows
};

// Posts of a GPU's workers, in mapped memory of the host, for the thread that works its network. Entry i
// holds posts i, i + size, ... Workers of a CPU call that thread's host instead.
struct OutboxEntry {
  // n: free for post n; n + 1: holds post n. The worker that took ticket n waits for n, writes the post and
  // then n + 1 (release); the network's thread reads that (acquire), takes the post and writes n + size
  // (release).
  uint64_t turn;
  Post post;
};

struct Outbox {
  OutboxEntry* entries;  // null: workers are on a CPU
  uint64_t size;
  uint64_t* tickets;  // taken by workers; in their memory
};

// Frames, chunks, lanes: sizes that are the same on all ranks.
struct ChannelShape {
  int64_t chunk_bytes;
  int32_t chunks;  // of a ring: a power of two
  int32_t lanes;   // each has rings of its own: worker i of the sender fills those that worker i empties

  // Of a chunk of a lane in the rings of a channel's end, and its word.
  COMMLIB_HD int64_t place(int lane, uint64_t chunk) const {
    return int64_t{lane} * chunks + static_cast<int64_t>(chunk & static_cast<uint64_t>(chunks - 1));
  }
};

// Where a lane's worker is in its channel. Only this worker touches it.
struct LaneState {
  uint64_t chunks;    // sent or taken, in all operations
  int64_t cursor;     // sending: the next token; receiving: the next frame of the chunk
  uint64_t finished;  // the last operation (its epoch) for which it has come to the end
};

struct ChannelEnd {
  int32_t peer;
  std::byte* ring;  // [lanes][chunks][chunk_bytes]
  // Receiving: [lanes][chunks], 1 + the number of the chunk that lies there. Sending: [lanes][chunks], of
  // which the first says how many chunks the receiver has taken. Written by the network's thread (release),
  // read by the lane's worker (acquire).
  uint64_t* words;
  LaneState* lanes;
};

struct Gateway {
  int32_t rank;
  uint64_t serves;  // the ranks that it passes rows on to, as a mask
};

struct Hops {
  ChannelShape shape;
  Outbox outbox;
  // Grows with everything that the network's thread brings (release), after it is in place. A worker reads it
  // before it looks for something to do, and, if there is nothing, sleeps until it changes.
  uint64_t* news;
  Bell* bell;  // rung with it
  int32_t gateways, sources;
  int32_t served_most;                 // by any gateway
  uint64_t served;                     // the ranks that this one passes rows on to
  uint8_t gateway_of[kMaxRanks];       // for ranks on other nodes: an index into `gateway`
  uint8_t brought_by[kMaxRanks];       // for ranks on other nodes: their gateway to this rank
  Gateway gateway[kMaxRanks];          // those that this rank sends to, by the lowest rank they serve
  ChannelEnd to_gateway[kMaxRanks];    // [gateways], outward
  ChannelEnd from_gateway[kMaxRanks];  // [gateways], homeward
  ChannelEnd from_source[kMaxRanks];   // [sources], outward: those whose gateway this rank is
  ChannelEnd to_source[kMaxRanks];     // [sources], homeward
};

// Whose doing it is that rows of rank p get here. A gateway that waits for p itself says so: see blame.h.
COMMLIB_HD int brought_by(const PeerTable& peers, int p) {
  const int by = peers.is_near(p) ? p : peers.hops->brought_by[p];
  return by == peers.rank ? p : by;
}

// Waits until ready(p) holds of every rank of `ranks`. Each lane waits for ranks of its own; all() passes on
// what they have seen.
template <class Worker, class Ready>
COMMLIB_HD bool await_ranks(Worker& w, const PeerTable& peers, uint64_t ranks, Phase phase, Ready ready) {
  const auto late = [&] {
    uint64_t by = 0;
    for (uint64_t left = ranks; left; left &= left - 1) {
      const int p = lowest_bit(left);
      if (!ready(p)) by |= bit_of(brought_by(peers, p));
    }
    return by;
  };
  bool ok = true;
  for (int p = w.lane(); ok && p < peers.size; p += w.lanes()) {
    if (has(ranks, p)) ok = w.await([&] { return ready(p); }, p, late, phase);
  }
  return w.all(ok);
}

}  // namespace commlib
