// A rank's ends of the channels to other nodes, and the thread that works them.
//
// Why a thread, and not the workers themselves: TCP moves only while a thread moves it, on both sides, also
// while this rank's workers compute or sleep; a GPU's workers cannot call UCX at all; and UCX's worker, which
// only one thread uses, needs no locks. See docs/decisions/nodes.md.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/event_count.h"
#include "net/inspection.h"
#include "net/net_config.h"
#include "net/topology.h"
#include "net/transport.h"
#include "protocol/internode/channel.h"

namespace commlib {

// Where rings and words lie, and how words get into this rank's control block. The CPU's is plain memory.
class NetworkMemory {
 public:
  virtual ~NetworkMemory() = default;
  // Workers cannot call, so they post into an outbox, and the network's thread never sleeps.
  virtual bool on_gpu() const { return false; }
  // Zeros. own: memory of the workers; words: memory that workers and the host alike read and write.
  virtual std::byte* own(size_t bytes) = 0;
  virtual std::byte* words(size_t bytes) = 0;
  // Each word is stored whole, as a release of its own.
  virtual void write_control(uint64_t offset, const std::byte* words, uint64_t bytes) = 0;
};

std::unique_ptr<NetworkMemory> host_network_memory(std::byte* control);

class Network final : Receiver {
 public:
  Network(const NetShape& shape, const NetConfig& config, std::unique_ptr<NetworkMemory> memory);
  ~Network() override;

  std::string address() { return transport_->address(); }
  // addresses: by rank, as address() gave them there. queues: of every channel, the same on all ranks.
  // `signals`: this rank's, which are notified of words.
  void connect(const std::vector<std::string>& addresses, int queues, Signals* signals);

  const Topology& topology() const { return topology_; }
  const Internode& internode() const { return internode_; }  // once connected
  // What this rank writes for a rank on another node: like that rank's control block.
  std::byte* control_for(int peer) const { return shadows_[peer]; }
  // From any thread of the host.
  void post(const Post& post);
  // Waits, for at most this long, until the transport has all that was posted: a process that then ends takes
  // none of it along.
  void hand_over(double seconds);
  // Nothing comes from these ranks any more: a mask.
  uint64_t lost_ranks() const { return lost_.load(std::memory_order_acquire); }
  bool has_lost(int peer) const { return has(lost_ranks(), peer); }
  std::string why_lost(int peer) const;
  // Sends what has been posted, for at most this long, and ends the thread. May be called twice.
  void close(double seconds);
  int64_t bytes() const { return bytes_; }  // of rings and words
  // Messages sent, and their bytes, without what a transport adds.
  uint64_t messages_sent() const { return messages_.load(std::memory_order_relaxed); }
  uint64_t bytes_sent() const { return sent_.load(std::memory_order_relaxed); }
  // Messages that were dropped because they did not prove which rank they came from.
  uint64_t messages_refused() const { return refused_.load(std::memory_order_relaxed); }

 private:
  bool accepts(const void* header, size_t header_bytes, uint64_t bytes, Post* post) override;
  std::byte* place_for(const Post& post) override;
  void arrived(const Post& post, const std::byte* words) override;
  void lost(int peer, const std::string& why) override;

  ChannelShape shape_for(int queues) const;
  void make_rings(int queues);
  void make_ends(std::byte* ring, uint64_t* word, QueueState* state);
  void make_outbox(uint64_t* tickets);
  void publish(uint64_t* word, uint64_t value);
  void run();
  void work();
  bool take_posts();
  bool take_from_outbox();
  void send(const Post& post);
  void wake();
  void sleep();

  const Topology topology_;
  const int size_;
  const int64_t control_bytes_;
  const SpinPolicy spin_;
  const std::unique_ptr<NetworkMemory> memory_;
  const std::unique_ptr<Transport> transport_;
  const FrameLayout largest_;  // of frames
  const int64_t asked_chunk_bytes_, asked_chunks_;
  Inspection inspection_;
  Internode internode_{};
  EventCount event_{};
  std::vector<std::byte*> shadows_;  // by rank
  Signals* signals_ = nullptr;
  int64_t bytes_ = 0;

  uint64_t taken_ = 0;  // from the outbox; the thread's own
  // Ranks on other nodes that have said so, known by the place that their word goes to: on a GPU the words
  // themselves are not for this thread to read. The thread's own.
  uint64_t departed_ = 0;
  int wake_;          // an eventfd
  std::mutex mutex_;  // guards the members below it
  std::vector<Post> posts_;
  uint64_t posted_ = 0, handed_over_ = 0;  // posts, in all
  std::condition_variable handed_over_changed_;
  bool asleep_ = false;  // a post must wake the thread, which looks for posts once more before it sleeps
  std::atomic<bool> stopping_{false};                         // set once (release)
  double closing_seconds_ = 0;                                // written before `stopping_`
  std::atomic<uint64_t> messages_{0}, sent_{0}, refused_{0};  // counted by the thread; order nothing
  std::atomic<uint64_t> lost_{0};  // set by the thread (release), read by waiting workers (acquire)
  mutable std::mutex why_mutex_;   // guards why_
  std::vector<std::string> why_;   // by rank
  std::thread thread_;
};

}  // namespace commlib
