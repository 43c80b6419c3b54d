#include "net/network.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <new>
#include <stdexcept>

#include "base/words.h"

namespace commlib {
namespace {

// Large enough for a message's fixed cost, and with its header no more than UCX receives at once over TCP (64
// KiB): UCX puts larger ones together from fragments, which is one more copy.
constexpr int64_t kChunkBytes = 60 << 10;
constexpr int64_t kRingsBytes = 64 << 20;  // of all rings of a rank, unless chunks must be larger
constexpr int32_t kLeastChunks = 2, kMostChunks = 32;
constexpr uint64_t kOutboxSize = 4096;
constexpr int kNapMs = 100;  // nothing needs to be noticed sooner: posts wake the thread
constexpr long kGpuNapNs = 20'000;

class HostMemory final : public NetworkMemory {
 public:
  explicit HostMemory(std::byte* control) : control_(control) {}
  ~HostMemory() override {
    for (const auto& [data, bytes] : mapped_) munmap(data, bytes);
  }

  std::byte* own(size_t bytes) override { return words(bytes); }
  std::byte* words(size_t bytes) override {
    void* p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mapped_.push_back({p, bytes});
    return static_cast<std::byte*>(p);
  }
  void write_control(uint64_t offset, const std::byte* words, uint64_t bytes) override {
    auto* to = reinterpret_cast<uint64_t*>(control_ + offset);
    for (uint64_t i = 0; i < bytes / 8; ++i) {
      uint64_t word;
      std::memcpy(&word, words + i * 8, 8);
      store_word(&to[i], word);
    }
  }

 private:
  std::byte* control_;
  std::vector<std::pair<void*, size_t>> mapped_;
};

FrameLayout largest_frame(const NetShape& shape, const Topology& topology) {
  return FrameLayout::of(topology.served_most, shape.topk, shape.topk, shape.topk * shape.weight_bytes,
                         shape.row_bytes, kFrameAlign);  // which scales may need besides
}

int64_t or_else(int64_t asked, int64_t otherwise) { return asked ? asked : otherwise; }

}  // namespace

std::unique_ptr<NetworkMemory> host_network_memory(std::byte* control) {
  return std::make_unique<HostMemory>(control);
}

Network::Network(const NetShape& shape, const NetConfig& config, std::unique_ptr<NetworkMemory> memory)
    : topology_(Topology::of(shape.rank, shape.size, config)),
      size_(shape.size),
      control_bytes_(shape.control_bytes),
      spin_(shape.spin),
      memory_(std::move(memory)),
      transport_(config.make_transport()),
      largest_(largest_frame(shape, topology_)),
      asked_chunk_bytes_(config.chunk_bytes),
      asked_chunks_(config.chunks),
      inspection_(shape, config.keys, ~topology_.near),
      shadows_(shape.size, nullptr),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      why_(shape.size) {
  if (wake_ < 0) throw std::runtime_error("eventfd: too many open files? (ulimit -n)");
}

Network::~Network() {
  close(0);
  ::close(wake_);
}

void Network::connect(const std::vector<std::string>& addresses, int queues, Signals* signals) {
  signals_ = signals;
  make_rings(queues);
  std::vector<std::string> far(size_);
  for (int p = 0; p < size_; ++p) {
    if (has(topology_.near, p)) continue;
    far[p] = addresses[p];
    shadows_[p] = memory_->words(static_cast<size_t>(control_bytes_));
  }
  transport_->connect(far, *this);
  thread_ = std::thread([this] { run(); });
}

// Every channel has as many chunks as fit into the memory for all rings on the rank that has the most rings:
// the same number on all ranks.
ChannelShape Network::shape_for(int queues) const {
  const auto one_frame = static_cast<int64_t>(sizeof(ChunkHeader)) + largest_.bytes;
  const int64_t chunk = align_up(std::max(or_else(asked_chunk_bytes_, kChunkBytes), one_frame), kRowAlign);
  const int64_t rings = int64_t{2} * topology_.channels_most * queues;
  const int64_t fit = kRingsBytes / std::max<int64_t>(1, rings * chunk);
  auto chunks = static_cast<int32_t>(or_else(asked_chunks_, kLeastChunks));
  while (!asked_chunks_ && chunks < kMostChunks && int64_t{2} * chunks <= fit) chunks *= 2;
  return {chunk, chunks, queues};
}

void Network::make_rings(int queues) {
  internode_.shape = shape_for(queues);
  const auto& [chunk, chunks, _] = internode_.shape;
  const int64_t ends = 2 * static_cast<int64_t>(topology_.gateways.size() + topology_.sources.size());
  const int64_t ring_bytes = ends * queues * chunks * chunk;
  const int64_t states = ends * queues * static_cast<int64_t>(sizeof(QueueState));
  // A UCX built without CUDA would take a GPU's memory for the host's.
  const auto size = static_cast<size_t>(ring_bytes + 8);  // not nothing where there are no channels
  std::byte* ring = transport_->reaches_gpu_memory() ? memory_->own(size) : memory_->words(size);
  const auto counters = static_cast<int64_t>(topology_.sources.size() * sizeof(uint64_t));
  auto* state = reinterpret_cast<QueueState*>(memory_->own(static_cast<size_t>(states + counters + 8)));
  const int64_t words = 1 + ends * queues * chunks;
  auto* word = reinterpret_cast<uint64_t*>(memory_->words(static_cast<size_t>(8 * words)));
  transport_->use_memory(ring, static_cast<size_t>(ring_bytes));
  bytes_ = ring_bytes + states + counters + 8 * words;
  internode_.passed_on = reinterpret_cast<uint64_t*>(state + ends * queues);
  if (memory_->on_gpu()) make_outbox(internode_.passed_on + topology_.sources.size());
  internode_.progress = word++;
  internode_.event = &event_;

  make_ends(ring, word, state);
  inspection_.know(internode_, state, ends * queues);
}

void Network::make_ends(std::byte* ring, uint64_t* word, QueueState* state) {
  const int64_t rings = int64_t{internode_.shape.queues} * internode_.shape.chunks;
  const auto new_end = [&](int peer) {
    const ChannelEnd end{peer, ring, word, state};
    ring += rings * internode_.shape.chunk_bytes;
    word += rings;
    state += internode_.shape.queues;
    return end;
  };
  internode_.served = topology_.served;
  internode_.served_most = topology_.served_most;
  for (const Topology::Peer& g : topology_.gateways) {
    const int i = internode_.gateways++;
    internode_.gateway[i] = {g.rank, g.serves};
    internode_.to_gateway[i] = new_end(g.rank);
    internode_.from_gateway[i] = new_end(g.rank);
  }
  for (int s : topology_.sources) {
    const int i = internode_.sources++;
    internode_.from_source[i] = new_end(s);
    internode_.to_source[i] = new_end(s);
  }
  for (int p = 0; p < size_; ++p) {
    internode_.gateway_of[p] = static_cast<uint8_t>(topology_.gateway_of[p]);
    internode_.brought_by[p] = static_cast<uint8_t>(topology_.brought_by[p]);
  }
}

void Network::make_outbox(uint64_t* tickets) {
  std::byte* entries = memory_->words(kOutboxSize * sizeof(OutboxEntry));
  internode_.outbox = {reinterpret_cast<OutboxEntry*>(entries), kOutboxSize, tickets};
  for (uint64_t i = 0; i < kOutboxSize; ++i) internode_.outbox.entries[i].turn = i;
  bytes_ += static_cast<int64_t>(kOutboxSize * sizeof(OutboxEntry));
}

// -- posts

void Network::post(const Post& post) {
  std::lock_guard<std::mutex> lock(mutex_);
  posts_.push_back(post);
  ++posted_;
  if (asleep_) wake();
}

void Network::hand_over(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  handed_over_changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                                [this, all = posted_] { return handed_over_ >= all; });
}

void Network::wake() {
  const uint64_t one = 1;
  if (write(wake_, &one, sizeof one) < 0) return;  // it is full: the thread will wake
}

bool Network::take_posts() {
  std::vector<Post> posts;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    posts.swap(posts_);
  }
  for (const Post& post : posts) send(post);
  if (!posts.empty()) {
    std::lock_guard<std::mutex> lock(mutex_);
    handed_over_ += posts.size();
    handed_over_changed_.notify_all();
  }
  return take_from_outbox() || !posts.empty();
}

bool Network::take_from_outbox() {
  const Outbox& box = internode_.outbox;
  bool any = false;
  for (; box.entries; any = true) {
    OutboxEntry& entry = box.entries[taken_ % box.size];
    if (load_word(&entry.turn) != taken_ + 1) break;
    const Post post = entry.post;
    store_word(&entry.turn, taken_ + box.size);
    ++taken_;
    send(post);
  }
  return any;
}

void Network::send(const Post& post) {
  const ChannelShape& shape = internode_.shape;
  const std::byte* data = nullptr;
  if (post.kind == PostKind::words) {
    data = shadows_[post.peer] + post.number;
  } else if (post.kind == PostKind::chunk) {
    data = inspection_.find(post, true)->ring + shape.position(post.queue, post.number) * shape.chunk_bytes;
  }
  inspection_.note_sent(post);
  messages_.fetch_add(1, std::memory_order_relaxed);
  sent_.fetch_add(sizeof(Header) + post.bytes, std::memory_order_relaxed);
  transport_->send(post.peer, inspection_.header_for(post), data);
}

// -- what comes

bool Network::accepts(const void* header, size_t header_bytes, uint64_t bytes, Post* post) {
  if (!inspection_.is_proven(header, header_bytes, post)) {
    refused_.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  const char* fault = inspection_.fault_of(*post, bytes);
  if (fault) lost(post->peer, std::string("it sent ") + fault);
  return !fault;
}

std::byte* Network::place_for(const Post& post) {
  const ChannelShape& shape = internode_.shape;
  return inspection_.find(post, false)->ring + shape.position(post.queue, post.number) * shape.chunk_bytes;
}

// First the word, then the progress: a thread that has read the progress finds the word.
void Network::publish(uint64_t* word, uint64_t value) {
  store_word(word, value);
  __atomic_fetch_add(internode_.progress, 1, __ATOMIC_RELEASE);
  notify(event_);
}

void Network::arrived(const Post& post, const std::byte* words) {
  if (post.kind == PostKind::words) {
    try {
      memory_->write_control(post.number, words, post.bytes);
    } catch (const std::exception& e) {  // not through a transport's C code
      return lost(post.peer, std::string("its words could not be written: ") + e.what());
    }
    if (post.number == post.peer * sizeof(Signals) + offsetof(Signals, departed))
      departed_ |= bit_of(post.peer);
    if (signals_) notify(signals_[post.peer].event);
    return;
  }
  const ChannelEnd* end = inspection_.find(post, post.kind == PostKind::taken);
  if (post.kind == PostKind::taken) {
    uint64_t* word = end->words + internode_.shape.position(post.queue, 0);
    // Messages may overtake each other.
    if (post.number > __atomic_load_n(word, __ATOMIC_RELAXED)) publish(word, post.number);
  } else {
    publish(end->words + internode_.shape.position(post.queue, post.number), post.number + 1);
  }
}

void Network::lost(int peer, const std::string& why) {
  {
    std::lock_guard<std::mutex> lock(why_mutex_);
    if (why_[peer].empty()) why_[peer] = why;
  }
  lost_.fetch_or(uint64_t{1} << peer, std::memory_order_acq_rel);
  __atomic_fetch_add(internode_.progress, 1, __ATOMIC_RELEASE);
  notify(event_);
  if (signals_) notify(signals_[peer].event);
}

std::string Network::why_lost(int peer) const {
  std::lock_guard<std::mutex> lock(why_mutex_);
  return why_[peer];
}

// -- the thread

void Network::run() {
  try {
    work();
  } catch (const std::exception& e) {  // of UCX, or of a GPU that is lost
    for (int p = 0; p < size_; ++p) {
      if (!(has(topology_.near, p))) lost(p, std::string("the network's thread failed: ") + e.what());
    }
  }
}

void Network::work() {
  int idle = 0;
  while (!stopping_.load(std::memory_order_acquire)) {
    const bool posted = take_posts();
    if (transport_->progress() || posted) {
      idle = 0;
    } else if (++idle < spin_.pauses + spin_.yields) {
      idle < spin_.pauses ? cpu_pause() : static_cast<void>(sched_yield());
    } else {
      sleep();
      idle = 0;
    }
  }
  take_posts();
  transport_->close(closing_seconds_, [this](int peer) { return has(departed_, peer); });
}

void Network::sleep() {
  if (memory_->on_gpu()) {  // nothing would wake it
    const timespec nap{0, kGpuNapNs};
    nanosleep(&nap, nullptr);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!posts_.empty() || stopping_.load(std::memory_order_relaxed)) return;
    asleep_ = true;
  }
  transport_->sleep(wake_, kNapMs);
  std::lock_guard<std::mutex> lock(mutex_);
  asleep_ = false;
  uint64_t wakes;
  if (read(wake_, &wakes, sizeof wakes) < 0) return;  // nothing woke it
}

void Network::close(double seconds) {
  if (!thread_.joinable()) return;
  closing_seconds_ = seconds;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true, std::memory_order_release);
  }
  wake();
  thread_.join();
}

}  // namespace commlib
