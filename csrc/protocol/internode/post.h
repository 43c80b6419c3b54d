// What a rank hands to its network.
#pragma once

#include <cstdint>

namespace commlib {

// What goes through the network, and what the header of each message says. None of it is trusted where it
// arrives: see net/inspection.h and, for what chunks hold, channel.h.
enum class PostKind : uint8_t {
  chunk,  // rows; number: of the chunk, counted from 0
  taken,  // number: chunks of the channel's queue that its receiver has taken
  words,  // of a control block; number: the offset of the first in bytes
};

// Of the channels between a source and its gateway: towards the gateway, or back to the source.
enum class Direction : uint8_t { outward, homeward };

struct Post {
  PostKind kind;
  Direction direction;
  uint16_t queue;
  int32_t peer;  // where it goes; where it arrives, the rank it comes from
  uint64_t number;
  uint64_t bytes;  // of what follows
};

// Posts of a GPU's workers, in mapped memory of the host, for the network's thread. Entry i holds posts i,
// i + size, ... CPU workers call that thread's object instead.
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

}  // namespace commlib
