// What commlib asks of a network: messages between ranks, each a Header and the bytes that it announces. The
// one there is uses UCX (ucx_transport.h); tests have another that is slow, late and cut at will.
//
// All calls after connect() come from one thread, the network's.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "protocol/internode/endpoints.h"

namespace commlib {

// Each message proves by a key which rank it comes from and which it is for: there is one for each ordered
// pair of ranks, new for each communicator. Who does not read the wire cannot know it. See docs/security.md.
using Key = std::array<std::byte, 16>;

struct PeerKeys {
  Key shown;     // by this rank's messages to a peer
  Key expected;  // of those from it
};

struct Header {
  Post post;  // peer: the rank it comes from
  Key key;
};

// What a transport reports arrivals to, from within progress().
class Receiver {
 public:
  virtual ~Receiver() = default;
  // Called first for each message, with its header as it came and the number of bytes behind it: whether it
  // is to be acted on. If not, it is dropped. Fills in *post, whose `peer` is then proven.
  virtual bool accepts(const void* header, size_t header_bytes, uint64_t bytes, Post* post) = 0;
  // Where the bytes of a chunk go.
  virtual std::byte* place_for(const Post& post) = 0;
  // A message is there, and a chunk's bytes are in place. `words`: those of PostKind::words.
  virtual void arrived(const Post& post, const std::byte* words) = 0;
  // Nothing comes from this rank any more.
  virtual void lost(int peer, const std::string& why) = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  // What the others need to connect to this rank.
  virtual std::string address() = 0;
  // By rank; empty: not to be connected to.
  virtual void connect(const std::vector<std::string>& addresses, Receiver& receiver) = 0;
  // Whether it can send from a GPU's memory, and receive into it.
  virtual bool reaches_gpu_memory() const { return true; }
  // Memory that chunks are sent from and arrive in.
  virtual void use_memory(std::byte* data, size_t bytes) = 0;

  // Sends header.post.bytes bytes from `data`, which do not change until the receiver has answered in some
  // way. Messages may overtake each other, also those of one kind to one rank.
  virtual void send(int peer, const Header& header, const std::byte* data) = 0;
  // Moves what can be moved; returns whether anything was.
  virtual bool progress() = 0;
  // Sleeps until there is something to move, `wake` can be read, or the time is over.
  virtual void sleep(int wake, int milliseconds) = 0;
  // Sends what is under way, for at most this long, and disconnects. Not to ranks that have departed, as far
  // as `has_departed` knows by now: they need nothing more, and may have disconnected before all has arrived.
  virtual void close(double seconds, const std::function<bool(int peer)>& has_departed) = 0;
};

using TransportFactory = std::function<std::unique_ptr<Transport>()>;

}  // namespace commlib
