// What only the CUDA backend has: words between host and kernels, ways to share memory, room for all blocks.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "cpp/operations.h"
#include "cpp/suite.h"
#include "cuda/communicator.h"
#include "cuda/nvml.h"
#include "simt/runtime/cudart.h"
#include "simt/runtime/driver.h"

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

// A switch of the simulated machine, as long as this lives.
class Set {
 public:
  Set(bool* which, bool value) : which_(which), before_(*which) { *which = value; }
  ~Set() { *which_ = before_; }

 private:
  bool* which_;
  bool before_;
};

// As another process would: with a descriptor of its own for the same memory.
void a_region_of_another_process_is_the_same_memory() {
  const auto machine = make_machine();
  const Set imex(&simt::has_imex, true);
  for (const auto share : {cuda::Share::fd, cuda::Share::fabric, cuda::Share::ipc}) {
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

// The attribute alone made one node of two hosts.
void fabric_memory_is_what_can_be_made_not_what_the_device_says() {
  const auto machine = make_machine();
  int says = 0;
  cuda::driver().device_get_attribute(&says, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, 0);
  check_equal(says, 1, "the device's word");
  check(!cuda::makes_fabric_memory(0), "without nvidia-imex there is none");
  const Set imex(&simt::has_imex, true);
  check(cuda::makes_fabric_memory(0), "with nvidia-imex there is");
  check_equal(cuda::facts_of(0).domain, std::string(), "the domain of a GPU that NVML does not know");
}

cuda::FabricInfo registered() {
  cuda::FabricInfo info{};
  info.cluster[0] = 0xab;
  info.cluster[15] = 1;
  info.clique = 7;
  info.state = cuda::kFabricCompleted;
  return info;
}

void a_domain_is_a_cluster_and_a_clique() {
  const cuda::FabricInfo info = registered();
  check_equal(cuda::domain_key(info), std::string("ab000000000000000000000000000001/7"), "the key");
  cuda::FabricInfo other = info;
  other.health = 5;
  check_equal(cuda::domain_key(other), cuda::domain_key(info), "the key of a less healthy GPU");
  other.clique = 8;
  check(cuda::domain_key(other) != cuda::domain_key(info), "another clique is another domain");
  other = info;
  other.cluster[15] = 2;
  check(cuda::domain_key(other) != cuda::domain_key(info), "another cluster is another domain");
}

void a_gpu_that_is_not_registered_is_in_no_domain() {
  const std::string none;
  for (unsigned char state : {0, 1, 2}) {  // not supported, not started, in progress
    cuda::FabricInfo info = registered();
    info.state = state;
    check_equal(cuda::domain_key(info), none, "before the registration is completed");
  }
  cuda::FabricInfo info = registered();
  info.status = 999;
  check_equal(cuda::domain_key(info), none, "after it has failed");
  info = registered();
  std::memset(info.cluster, 0, sizeof info.cluster);
  check_equal(cuda::domain_key(info), none, "with links on its own host alone");
}

void gpus_that_cannot_count_in_each_others_memory_are_refused() {
  const auto machine = make_machine();
  cuda::require_peer_access(0, 1);
  const Set atomics(&simt::peers_have_atomics, false);
  cuda::require_peer_access(0, 0);
  const auto error =
      check_throws<std::runtime_error>([] { cuda::require_peer_access(0, 1); }, "peers without atomics");
  check_contains(error.what(), "GPU 0 has no native atomics in the memory of GPU 1", "the text");
  const std::string mine = cuda::facts_of(0).uuid;
  check_equal(cuda::device_with(mine), 0, "the device of a UUID");
  cuda::require_peer_access(1, std::string(32, 'f'));  // not to be seen here: nothing is known
  check_throws<std::runtime_error>([&] { cuda::require_peer_access(1, mine); }, "by UUID");
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
    {"fabric_memory_is_what_can_be_made_not_what_the_device_says",
     fabric_memory_is_what_can_be_made_not_what_the_device_says},
    {"a_domain_is_a_cluster_and_a_clique", a_domain_is_a_cluster_and_a_clique},
    {"a_gpu_that_is_not_registered_is_in_no_domain", a_gpu_that_is_not_registered_is_in_no_domain},
    {"gpus_that_cannot_count_in_each_others_memory_are_refused",
     gpus_that_cannot_count_in_each_others_memory_are_refused},
    {"more_blocks_than_multiprocessors_are_refused", more_blocks_than_multiprocessors_are_refused},
});

}  // namespace
}  // namespace commlib::testing
