#include "world.h"

#include <chrono>
#include <exception>
#include <thread>

namespace commlib::testing {

void Meeting::meet() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t round = round_;
  if (++here_ == size_) {
    here_ = 0;
    ++round_;
    changed_.notify_all();
  }
  changed_.wait(lock, [&] { return round_ != round || given_up_; });
  if (round_ == round) throw Failed("another rank has failed");
}

void Meeting::give_up() {
  std::lock_guard<std::mutex> lock(mutex_);
  given_up_ = true;
  changed_.notify_all();
}

void Rank::nap_sometimes() {
  if (random.one_in(3)) std::this_thread::sleep_for(std::chrono::microseconds(random.below(400)));
}

Key test_key(int from, int to) {
  Key key;
  for (size_t i = 0; i < key.size(); ++i)
    key[i] = static_cast<std::byte>(31 * from + 7 * to + 3 * static_cast<int>(i));
  return key;
}

void in_ranks(const std::vector<Config>& configs, const std::function<void(Rank&)>& body) {
  const int size = static_cast<int>(configs.size());
  static uint64_t worlds = 0;  // so that ranks act differently each time
  const uint64_t world = ++worlds << 32;
  Meeting meeting(size);
  SlowNetwork net(size, world);
  const std::unique_ptr<Machine> machine = make_machine();
  std::vector<PeerAddress> addresses(size);
  std::mutex mutex;  // guards `first`
  std::exception_ptr first;
  const auto run = [&](int rank) {
    Rank self{rank, nullptr, meeting, Random(world + static_cast<uint64_t>(rank)), &net, nullptr};
    std::vector<std::shared_ptr<Communicator>> others;
    const auto connected = [&](Config config) {
      config.rank = rank;
      config.size = size;
      for (int p = 0; p < size; ++p) config.net.keys.push_back({test_key(rank, p), test_key(p, rank)});
      config.net.make_transport = [&net, rank] { return net.transport(rank); };
      std::shared_ptr<Communicator> comm = machine->communicator(config);
      addresses[rank] = comm->address();
      self.meet();
      comm->connect(addresses);
      self.meet();
      return comm;
    };
    self.another = [&](const Config& config) { return others.emplace_back(connected(config)); };
    try {
      self.comm = connected(configs[rank]);
      body(self);
    } catch (...) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (!first) first = std::current_exception();
      }
      meeting.give_up();
    }
    for (auto& comm : others) machine->retire(std::move(comm));
    machine->retire(std::move(self.comm));
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back(run, rank);
  for (std::thread& t : threads) t.join();
  if (!machine->error().empty()) throw Failed(machine->error());
  if (first) std::rethrow_exception(first);
}

void in_ranks(const Config& config, int ranks, const std::function<void(Rank&)>& body) {
  in_ranks(std::vector<Config>(ranks, config), body);
}

Config small_config(int ranks) {
  Config config;
  config.size = ranks;
  config.experts = 2 * ranks;
  config.hidden = 32;
  config.topk = 2;
  config.max_tokens = 12;
  config.capacity = ranks * config.max_tokens;
  config.timeout = 3600;  // of a simulated GPU, whose time leaps; one that hangs is killed, see main.cc
  return config;
}

int64_t random_room(Random& random) {
  switch (random.below(3)) {
    case 0:
      return 0;
    case 1:
      return 1 + random.below(40);
    default:
      return 1000;
  }
}

Config random_grouping(Random& random) {
  const int ranks = 1 + static_cast<int>(random.below(5));
  Config config = small_config(ranks);
  config.num_sms = 1 + static_cast<int>(random.below(3));
  config.experts = 1 + random.below(4 * ranks);
  config.topk = 1 + static_cast<int>(random.below(5));
  config.hidden = random.one_in(2) ? 32 : 1 + random.below(70);
  config.slots = 4;
  config.grouped_rows = random_room(random);
  return config;
}

}  // namespace commlib::testing
