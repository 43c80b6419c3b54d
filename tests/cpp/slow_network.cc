#include "slow_network.h"

#include <poll.h>

#include <algorithm>
#include <cstring>

namespace commlib::testing {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

// Chunks may lie where only copies reach.
void SlowNetwork::Message::read_now() {
  if (!data || !read.empty()) return;
  read.resize(header.post.bytes);
  copy_bytes(read.data(), data, header.post.bytes);
}

class SlowTransport final : public Transport {
 public:
  SlowTransport(SlowNetwork& net, int rank) : net_(net), rank_(rank) {}

  std::string address() override { return "rank " + std::to_string(rank_); }
  void connect(const std::vector<std::string>& addresses, Receiver& receiver) override {
    for (size_t p = 0; p < addresses.size(); ++p) {
      const bool right = addresses[p].empty() || addresses[p] == "rank " + std::to_string(p);
      check(right, "addresses come to the ranks they are for");
    }
    receiver_ = &receiver;
  }
  void use_memory(std::byte*, size_t) override {}
  void send(int to, const Header& header, const std::byte* data) override {
    net_.put(rank_, to, header, data);
  }
  bool progress() override {
    int dead;
    if (net_.take_death(rank_, &dead)) receiver_->lost(dead, "it was killed");
    SlowNetwork::Message m;
    if (!net_.take(rank_, &m)) return false;
    Post post;
    const SlowNetwork::Tamper tamper = net_.tamper();
    if (tamper && m.from >= 0) tamper(rank_, m.header, m.read);
    if (!receiver_->accepts(&m.header, m.header_bytes, m.read.size(), &post)) {
      check(m.from < 0, "what a rank sends is accepted");
      return true;
    }
    if (post.kind == PostKind::chunk) copy_bytes(receiver_->place_for(post), m.read.data(), m.read.size());
    receiver_->arrived(post, m.read.data());
    return true;
  }
  void sleep(int wake, int milliseconds) override {
    pollfd p{wake, POLLIN, 0};
    if (poll(&p, 1, 0) == 0) net_.wait(rank_, milliseconds < 1 ? milliseconds : 1);
  }
  void close(double, const std::function<bool(int)>&) override { net_.let_go(rank_); }

 private:
  SlowNetwork& net_;
  const int rank_;
  Receiver* receiver_ = nullptr;
};

SlowNetwork::SlowNetwork(int ranks, uint64_t seed)
    : under_way_(ranks), deaths_(ranks), cut_(ranks, 0), hold_ms_(ranks, 0), random_(seed) {}

std::unique_ptr<Transport> SlowNetwork::transport(int rank) {
  return std::make_unique<SlowTransport>(*this, rank);
}

void SlowNetwork::tamper_with(Tamper tamper) {
  std::lock_guard<std::mutex> lock(mutex_);
  tamper_ = std::move(tamper);
}

SlowNetwork::Tamper SlowNetwork::tamper() {
  std::lock_guard<std::mutex> lock(mutex_);
  return tamper_;
}

void SlowNetwork::set_cut(int rank, bool cut) {
  std::lock_guard<std::mutex> lock(mutex_);
  cut_[rank] = cut;
  changed_.notify_all();
}

void SlowNetwork::withhold_chunks(int from, int to, bool withheld) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (withheld) {
    withheld_.insert({from, to});
  } else {
    withheld_.erase({from, to});
  }
  changed_.notify_all();
}

bool SlowNetwork::has_under_way(int from) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto is_its = [from](const Message& m) { return m.from == from; };
  return std::any_of(under_way_.begin(), under_way_.end(), [&](const std::vector<Message>& queue) {
    return std::any_of(queue.begin(), queue.end(), is_its);
  });
}

void SlowNetwork::hold(int rank, int milliseconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  hold_ms_[rank] = milliseconds;
}

void SlowNetwork::kill(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t p = 0; p < deaths_.size(); ++p) {
    if (static_cast<int>(p) != rank) deaths_[p].push_back(rank);
  }
  changed_.notify_all();
}

void SlowNetwork::put(int from, int to, const Header& header, const std::byte* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  Message m{from, header, sizeof header, data, {}, Clock::now()};
  if (random_.one_in(2)) m.read_now();
  if (hold_ms_[from] > 0 && random_.one_in(2)) {
    const int most = hold_ms_[from] * (header.post.kind == PostKind::words ? 4 : 1);
    m.due += std::chrono::microseconds(random_.below(1000 * most));
  }
  auto& queue = under_way_[to];
  queue.push_back(std::move(m));
  size_t bytes = 0;
  for (const Message& other : queue)
    bytes += other.header.post.kind == PostKind::chunk ? other.header.post.bytes : 0;
  if (bytes > most_under_way_.load()) most_under_way_.store(bytes);
  changed_.notify_all();
}

void SlowNetwork::forge(int to, const void* header, size_t header_bytes, Bytes data) {
  std::lock_guard<std::mutex> lock(mutex_);
  Message m{-1, {}, header_bytes, nullptr, std::move(data), Clock::now()};
  std::memcpy(&m.header, header, std::min(header_bytes, sizeof m.header));
  under_way_[to].push_back(std::move(m));
  changed_.notify_all();
}

// Any message that is due, and none now and then. Read before its sender may let go.
bool SlowNetwork::take(int rank, Message* message) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto& queue = under_way_[rank];
  if (queue.empty() || cut_[rank] || random_.one_in(4)) return false;
  const size_t i = random_.below(queue.size());
  if ((queue[i].from >= 0 && cut_[queue[i].from]) || queue[i].due > Clock::now()) return false;
  if (queue[i].header.post.kind == PostKind::chunk && withheld_.count({queue[i].from, rank})) return false;
  const auto chosen = queue.begin() + static_cast<std::ptrdiff_t>(i);
  const auto are_words = [from = chosen->from](const Message& m) {
    return m.from == from && m.header.post.kind == PostKind::words;
  };
  if (are_words(*chosen) && std::any_of(queue.begin(), chosen, are_words)) overtakings_.fetch_add(1);
  *message = std::move(*chosen);
  queue.erase(chosen);
  message->read_now();
  return true;
}

// The sender's memory goes: its messages under way are read now.
void SlowNetwork::let_go(int from) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& queue : under_way_) {
    for (Message& m : queue) {
      if (m.from == from) m.read_now();
    }
  }
}

bool SlowNetwork::take_death(int rank, int* dead) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (deaths_[rank].empty()) return false;
  *dead = deaths_[rank].back();
  const auto is_its = [dead = *dead](const Message& m) { return m.from == dead; };
  if (std::any_of(under_way_[rank].begin(), under_way_[rank].end(), is_its)) return false;
  deaths_[rank].pop_back();
  return true;
}

void SlowNetwork::wait(int rank, int milliseconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_due = [now = Clock::now()](const Message& m) { return m.due <= now; };
  changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                    [&] { return std::any_of(under_way_[rank].begin(), under_way_[rank].end(), is_due); });
}

}  // namespace commlib::testing
