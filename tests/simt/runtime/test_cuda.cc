// What only the CUDA backend has: words between host and kernels, ways to share memory, room for all blocks.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "cpp/operations.h"
#include "cpp/suite.h"
#include "cuda/communicator.h"

namespace commlib::testing {
namespace {

std::atomic<bool> interrupted{false};

void a_user_who_interrupts_ends_the_wait() {
  Random random(200);
  const Config config = small_config(2);
  std::vector<Config> configs(2, config);
  configs[0].interrupted = [] { return interrupted.load(); };
  interrupted = false;
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(configs, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    d->under_way.wait();
    self.meet();
    if (self.rank == 0) {
      interrupted = true;
      const auto error = check_throws<CommFailure>([&] { start_combine(self, *d, s, {})->under_way.wait(); },
                                                   "a combine without rank 1");
      check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::interrupted),
                  "cause");
    }
    self.meet();
  });
}

// A child that only waits to be killed.
class Child {
 public:
  Child() : pid_(fork()) {
    while (pid_ == 0) pause();
  }
  ~Child() { end(); }
  void end() {
    if (pid_ < 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_;
};

Config config_of(int rank, int size) {
  Config config = small_config(size);
  config.rank = rank;
  return config;
}

void a_rank_whose_process_has_gone_is_named_at_once() {
  Child child;
  const auto machine = make_machine();
  const auto me = machine->communicator(config_of(0, 2)), other = machine->communicator(config_of(1, 2));
  std::vector<PeerAddress> addresses{me->address(), other->address()};
  addresses[1].pid = child.pid();
  me->connect(addresses);
  child.end();
  const std::vector<int64_t> ids{0, 1, 2, 3};
  std::vector<int64_t> routes(4);
  RoutingView routing;
  routing.topk_idx = ids.data();
  routing.routes = routes.data();
  routing.tokens = 2;
  const auto error = check_throws<CommFailure>([&] { me->begin_dispatch(routing, false, false, false); },
                                               "a dispatch without the other process");
  check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::exited), "the cause");
  check(error.failure.peers() == std::vector<int>{1}, "it is named");
}

void virtual_memory_may_be_shared_by_file_descriptor() {
  Random random(201);
  Config config = small_config(3);
  config.share = "fd";
  const Scenario s = random_scenario(config, 3, {}, random);
  in_ranks(config, 3, [&](Rank& self) { check_round_trip(self, s, s, {}); });
}

// As another process would: with a descriptor of its own for the same memory.
void a_region_of_another_process_is_the_same_memory() {
  const auto machine = make_machine();
  for (const auto share : {cuda::Share::fd, cuda::Share::ipc}) {
    const auto mine = cuda::DeviceRegion::create(0, 100'000, share);
    const int fd = share == cuda::Share::fd ? dup(mine->fd()) : -1;
    const auto theirs = cuda::DeviceRegion::open(0, getpid() + 1, fd, mine->handle(), mine->bytes());
    if (fd >= 0) check_equal(close(fd), 0, "the descriptor was left to its owner");
    std::memset(mine->data(), 7, mine->bytes());
    check_equal(static_cast<int>(theirs->data()[99'999]), 7, "the last byte");
    check(cuda::DeviceRegion::open(0, getpid(), -1, mine->handle(), mine->bytes()) == mine,
          "within a process it is shared");
  }
  const std::string handle = cuda::DeviceRegion::create(0, 100, cuda::Share::fd)->handle();
  check_throws<std::runtime_error>([&] { cuda::DeviceRegion::open(0, getpid(), -1, handle, 100); },
                                   "a region that has gone");
}

void more_blocks_than_multiprocessors_are_refused() {
  const auto machine = make_machine();
  Config config = config_of(0, 1);
  config.num_sms = cuda::facts_of(0).sms;
  machine->communicator(config);
  ++config.num_sms;
  const auto error =
      check_throws<std::runtime_error>([&] { machine->communicator(config); }, "one block too many");
  check_contains(error.what(), "all blocks must run at once", "the text");
}

const Suite suite({
    {"a_user_who_interrupts_ends_the_wait", a_user_who_interrupts_ends_the_wait},
    {"a_rank_whose_process_has_gone_is_named_at_once", a_rank_whose_process_has_gone_is_named_at_once},
    {"virtual_memory_may_be_shared_by_file_descriptor", virtual_memory_may_be_shared_by_file_descriptor},
    {"a_region_of_another_process_is_the_same_memory", a_region_of_another_process_is_the_same_memory},
    {"more_blocks_than_multiprocessors_are_refused", more_blocks_than_multiprocessors_are_refused},
});

}  // namespace
}  // namespace commlib::testing
