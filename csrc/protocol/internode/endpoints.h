// Ranks on other nodes. Memory is not mapped across nodes, so rows and words go there through a network.
//
// A source sends a row to the gateway of each node that needs it, once, with the list of ranks there that
// want it; the gateway, a rank of that node, passes it on through mapped memory. With direct routing every
// rank on another node is a gateway of its own, which serves itself only: the protocol is the same.
//
// Rows travel in chunks, through channels. A channel goes one way, from one rank to another, and has two
// equal rings of chunks, one at each end. A sender fills chunk n in its ring and posts it; the network puts
// it at the same position of the receiver's ring and then says so in a word. The receiver says how many
// chunks it has taken, and the sender is never more than a ring ahead of that: memory is bounded, and a slow
// rank holds back the ranks that send to it, and no others.
#pragma once

#include "protocol/control_block.h"
#include "protocol/internode/post.h"

namespace commlib {

// Sizes of chunks, rings and queues, the same on all ranks.
struct ChannelShape {
  int64_t chunk_bytes;
  int32_t chunks;  // of a ring: a power of two
  int32_t queues;  // each has rings of its own: worker i of the sender fills those that worker i empties

  // The position of a queue's chunk in the rings of a channel's end, and of its word.
  COMMLIB_HD int64_t position(int queue, uint64_t chunk) const {
    return int64_t{queue} * chunks + static_cast<int64_t>(chunk & static_cast<uint64_t>(chunks - 1));
  }
};

// How far a queue's worker has come. Only this worker touches it.
struct QueueState {
  uint64_t chunks;    // sent or taken, in all operations
  int64_t cursor;     // sending: the next token; receiving: the next frame of the chunk
  uint64_t finished;  // the last operation (its epoch) that it has finished; 0: none
};

struct ChannelEnd {
  int32_t peer;
  std::byte* ring;  // [queues][chunks][chunk_bytes]
  // Receiving: [queues][chunks], 1 + the number of the chunk that lies there. Sending: [queues][chunks], of
  // which the first says how many chunks the receiver has taken. Written by the network's thread (release),
  // read by the queue's worker (acquire).
  uint64_t* words;
  QueueState* queues;
};

struct Gateway {
  int32_t rank;
  uint64_t serves;  // the ranks that it passes rows on to, as a mask
};

// One rank's ends of all channels.
struct Internode {
  ChannelShape shape;
  Outbox outbox;
  // Grows with everything that the network's thread brings (release), after it is in place. A worker reads it
  // before it looks for something to do, and, if there is nothing, sleeps until it changes.
  uint64_t* progress;
  EventCount* event;  // notified with it
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
  // [sources]: queues that have passed on all rows of a source in the dispatch under way. This rank's workers
  // add to it (acquire and release); the last of them sets it back to 0.
  uint64_t* passed_on;
};

// The rank that brings rows of rank p here. A gateway that itself waits for p says so: see blame.h.
COMMLIB_HD int brought_by(const PeerTable& peers, int p) {
  const int by = peers.is_near(p) ? p : peers.internode->brought_by[p];
  return by == peers.rank ? p : by;
}

}  // namespace commlib
