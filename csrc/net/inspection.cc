#include "net/inspection.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "protocol/internode/channel.h"

namespace commlib {
namespace {

// Takes equally long wherever they differ.
bool same(const Key& a, const Key& b) {
  std::byte difference{0};
  for (size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == std::byte{0};
}

// Whether [offset, offset + bytes) lies in [begin, begin + size): no sum here can overflow.
bool lies_in(uint64_t offset, uint64_t bytes, uint64_t begin, uint64_t size) {
  return offset >= begin && bytes <= size && offset - begin <= size - bytes;
}

}  // namespace

Inspection::Inspection(const NetShape& shape, std::vector<PeerKeys> keys, uint64_t far)
    : rank_(shape.rank),
      size_(shape.size),
      far_(far),
      count_words_(shape.count_words),
      keys_(std::move(keys)) {
  if (keys_.size() != static_cast<size_t>(size_))
    throw std::invalid_argument("several nodes: a key for each rank is wanted, got " +
                                std::to_string(keys_.size()) + " for " + std::to_string(size_) + " ranks");
}

void Inspection::know(const Internode& internode, const QueueState* first_state, int64_t states) {
  internode_ = &internode;
  first_state_ = first_state;
  passed_.assign(static_cast<size_t>(states), 0);
}

Header Inspection::header_for(const Post& post) const {
  Header header{post, keys_[post.peer].shown};
  header.post.peer = rank_;
  return header;
}

bool Inspection::is_proven(const void* header, size_t header_bytes, Post* post) const {
  Header h;
  if (header_bytes != sizeof h) return false;
  std::memcpy(&h, header, sizeof h);
  *post = h.post;
  if (post->peer < 0 || post->peer >= size_ || !has(far_, post->peer)) return false;
  return same(h.key, keys_[post->peer].expected);
}

const char* Inspection::fault_of(const Post& post, uint64_t bytes) const {
  if (post.bytes != bytes) return "a message that is not as long as it says";
  switch (post.kind) {
    case PostKind::words:
      return fault_of_words(post);
    case PostKind::chunk:
      return fault_of_chunk(post);
    case PostKind::taken:
      return fault_of_taken(post);
  }
  return "a message of no known kind";
}

// A rank writes its own words only, and of these only those that ranks of other nodes write.
const char* Inspection::fault_of_words(const Post& post) const {
  if (post.bytes == 0 || post.bytes % 8 || post.number % 8) return "words that are not whole";
  const auto from = static_cast<uint64_t>(post.peer), size = static_cast<uint64_t>(size_);
  constexpr uint64_t first = offsetof(Signals, calls);
  if (lies_in(post.number, post.bytes, from * sizeof(Signals) + first, sizeof(Signals) - first))
    return nullptr;
  const uint64_t counts_bytes = static_cast<uint64_t>(count_words_) * 8;
  for (uint64_t parity = 0; parity < 2; ++parity) {
    const uint64_t counts = size * sizeof(Signals) + (parity * size + from) * counts_bytes;
    if (lies_in(post.number, post.bytes, counts, counts_bytes)) return nullptr;
  }
  return "words that are not its own";
}

const char* Inspection::fault_of_chunk(const Post& post) const {
  const ChannelEnd* end = find(post, false);
  const ChannelShape& shape = internode_->shape;
  if (!end || post.queue >= shape.queues) return "rows through a channel that there is not";
  if (post.bytes < sizeof(ChunkHeader) || post.bytes > static_cast<uint64_t>(shape.chunk_bytes))
    return "a chunk of a size that there is not";
  // A chunk may lie in the ring only once the one that lay there has been taken.
  const uint64_t taken = passed_[queue_index(*end, post.queue)];
  if (post.number < taken || post.number - taken >= static_cast<uint64_t>(shape.chunks))
    return "a chunk where there is no room for it";
  const uint64_t* word = end->words + shape.position(post.queue, post.number);
  if (__atomic_load_n(word, __ATOMIC_RELAXED) == post.number + 1) return "a chunk for the second time";
  return nullptr;
}

const char* Inspection::fault_of_taken(const Post& post) const {
  const ChannelEnd* end = find(post, true);
  if (!end || post.queue >= internode_->shape.queues || post.bytes != 0)
    return "an answer through no channel";
  if (post.number > passed_[queue_index(*end, post.queue)]) return "an answer to chunks that it was not sent";
  return nullptr;
}

void Inspection::note_sent(const Post& post) {
  if (post.kind == PostKind::words) return;
  const bool chunk = post.kind == PostKind::chunk;
  passed_[queue_index(*find(post, chunk), post.queue)] = post.number + (chunk ? 1 : 0);
}

const ChannelEnd* Inspection::find(const Post& post, bool sending) const {
  const bool outward = post.direction == Direction::outward;
  if (!outward && post.direction != Direction::homeward) return nullptr;
  const ChannelEnd* ends = sending ? (outward ? internode_->to_gateway : internode_->to_source)
                                   : (outward ? internode_->from_source : internode_->from_gateway);
  const int count =
      outward == sending ? internode_->gateways : internode_->sources;  // gateways receive what goes outward
  for (int i = 0; i < count; ++i) {
    if (ends[i].peer == post.peer) return &ends[i];
  }
  return nullptr;
}

size_t Inspection::queue_index(const ChannelEnd& end, int queue) const {
  return static_cast<size_t>(end.queues - first_state_ + queue);
}

}  // namespace commlib
