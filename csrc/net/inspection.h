// Which messages of other nodes are acted on. What a message says (kind, sizes, positions) is checked before
// any of it is used, so that no message writes where it should not, whatever it says.
#pragma once

#include <vector>

#include "net/net_config.h"

namespace commlib {

// A rank's channels, as far as checks need to know them. Used by the network's thread alone.
class Inspection {
 public:
  // keys: by rank. far: the ranks on other nodes, as a mask. Throws std::invalid_argument unless there is a
  // key for each rank.
  Inspection(const NetShape& shape, std::vector<PeerKeys> keys, uint64_t far);
  // internode: stays where it is. Only addresses are compared, so they may be those of a GPU's memory.
  void know(const Internode& internode, const QueueState* first_state, int64_t states);

  Header header_for(const Post& post) const;
  // Whether a header comes from the rank that it names.
  bool is_proven(const void* header, size_t header_bytes, Post* post) const;
  // The fault of a message from a rank that has proven itself; null: none.
  const char* fault_of(const Post& post, uint64_t bytes) const;
  // This rank has sent a chunk, or said how many it has taken.
  void note_sent(const Post& post);

  // The end of the channel that a post is about; null: there is none.
  const ChannelEnd* find(const Post& post, bool sending) const;

 private:
  const char* fault_of_words(const Post& post) const;
  const char* fault_of_chunk(const Post& post) const;
  const char* fault_of_taken(const Post& post) const;
  size_t queue_index(const ChannelEnd& end, int queue) const;

  const int rank_, size_;
  const uint64_t far_;
  const int64_t count_words_;  // of one source
  const std::vector<PeerKeys> keys_;
  const Internode* internode_ = nullptr;
  const QueueState* first_state_ = nullptr;
  std::vector<uint64_t>
      passed_;  // by queue of each end: chunks sent, or those that the sender knows to be taken
};

}  // namespace commlib
