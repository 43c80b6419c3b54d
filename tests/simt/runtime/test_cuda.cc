// What only the CUDA backend has: words between host and kernels, ways to share memory, limits on blocks.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpp/operations.h"
#include "cpp/suite.h"
#include "cuda/communicator.h"
#include "simt/runtime/connected.h"

namespace commlib::testing {
namespace {

std::atomic<bool> interrupted{false};

void a_user_who_interrupts_ends_the_wait() {
  Random random(200);
  const Config config = small_config(2);
  std::vector<Config> configs(2, config);
  configs[0].interrupted = [](bool) { return interrupted.load(); };
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

// An operation that only queues may fail unseen.
void closing_reports_what_no_call_has_reported() {
  Random random(203);
  Config config = small_config(2);
  config.timeout = 0.3;
  const Scenario s = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    d->under_way.wait();
    self.meet();
    if (self.rank == 0) {
      const CombinedPtr sums = start_combine(self, *d, s, {});
      const auto error =
          check_throws<CommFailure>([&] { self.comm->close(); }, "to close after a combine without rank 1");
      check(error.failure.peers() == std::vector<int>{1}, "it is named");
      self.comm->close();  // reported once
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
  config.share = "fd";
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
  const Int64s ids{0, 1, 2, 3};
  const RoutingRoom room(config_of(0, 2), 2, 0, ids);
  const auto error = check_throws<CommFailure>([&] { me->begin_dispatch(room.view, false, false, false); },
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

// As another process would.
void a_region_of_another_process_is_the_same_memory() {
  const auto machine = make_machine();
  const auto mine = cuda::DeviceRegion::create(0, 100'000, cuda::Share::fd);
  const auto open_as_another = [&] {
    return cuda::DeviceRegion::open(0, getpid() + 1, mine->fd(), mine->handle(), mine->bytes());
  };
  const auto theirs = open_as_another();
  std::memset(mine->data(), 7, mine->bytes());
  check(theirs != mine, "mapped once more");
  check_equal(static_cast<int>(theirs->data()[99'999]), 7, "the last byte");
  check(open_as_another() == theirs, "what is mapped is not mapped again");
  check(cuda::DeviceRegion::open(0, getpid(), -1, mine->handle(), mine->bytes()) == mine,
        "within a process it is shared");
  const std::string handle = cuda::DeviceRegion::create(0, 100, cuda::Share::fd)->handle();
  check_throws<std::runtime_error>([&] { cuda::DeviceRegion::open(0, getpid(), -1, handle, 100); },
                                   "a region that has gone");
}

void memory_that_cannot_be_shared_is_refused_to_other_processes() {
  const auto machine = make_machine();
  const auto mine = cuda::DeviceRegion::create(0, 100'000, cuda::Share::none);
  check(cuda::DeviceRegion::open(0, getpid(), -1, mine->handle(), mine->bytes()) == mine, "shared within");
  const auto error = check_throws<std::runtime_error>(
      [&] { cuda::DeviceRegion::open(0, getpid() + 1, -1, mine->handle(), mine->bytes()); },
      "another process's");
  check_contains(error.what(), "one of these GPUs cannot", "the text");
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

// A combine of no tokens, which ends when both ranks have come.
void start_empty_combine(Communicator& comm) { comm.combine({}, {}, nullptr, nullptr, false); }

// The simulated GPU frees memory as a real one does: when all kernels have ended.
void a_destructor_waits_for_no_other_rank() {
  const auto machine = make_machine();
  for (const char* share : {"none", "fd"}) {
    Config config = small_config(2);
    config.share = share;
    config.timeout = 10;  // so that a destructor that waits would fail rank 1
    const Communicators ranks = connected(*machine, config);
    Communicators another = connected(*machine, small_config(1));
    start_empty_combine(*another[0]);
    start_empty_combine(*ranks[1]);
    another.clear();
    check(!is_done(*ranks[1], nullptr), "rank 1 still waits for rank 0");
    start_empty_combine(*ranks[0]);
    for (const auto& comm : ranks) comm->synchronize();
  }
}

// Two ranks that take each other for another process's.
Communicators strangers(Machine& machine, const Child& other) {
  Communicators ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.push_back(machine.communicator(config_of(rank, 2)));
  }
  for (int rank = 0; rank < 2; ++rank) {
    std::vector<PeerAddress> addresses{ranks[0]->address(), ranks[1]->address()};
    addresses[1 - rank].pid = other.pid();
    ranks[rank]->connect(addresses);
  }
  return ranks;
}

void a_heap_is_used_again_only_when_other_processes_have_gone() {
  const auto machine = make_machine();
  for (const bool dies : {false, true}) {
    Child other;
    Communicators ranks = strangers(*machine, other);
    const std::string heap = ranks[0]->address().handle;
    ranks[0].reset();
    const auto before = machine->communicator(config_of(0, 2));
    check(before->address().handle != heap, "rank 1 may still write there");
    if (dies) {
      other.end();
    } else {
      ranks[1]->close();
    }
    const auto after = machine->communicator(config_of(0, 2));
    check(after->address().handle == heap, "it is used again");
  }
}

// While no thread of rank 0's host waits for it.
void a_peer_that_dies_ends_kernels_that_wait_for_it() {
  const auto machine = make_machine();
  Child other;
  const Communicators ranks = strangers(*machine, other);
  start_empty_combine(*ranks[0]);
  other.end();
  while (!is_done(*ranks[0], nullptr)) usleep(1000);
  const auto error = check_throws<CommFailure>([&] { ranks[0]->check_health(); }, "the next call");
  check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::exited), "the cause");
  check(error.failure.peers() == std::vector<int>{1}, "it is named");
}

void a_wait_for_an_event_may_be_interrupted() {
  const auto machine = make_machine();
  Config config = small_config(2);
  config.interrupted = [](bool) { return interrupted.load(); };
  interrupted = false;
  const Communicators ranks = connected(*machine, config);
  const auto end_of = [](Communicator& comm) {
    cudaEvent_t event = nullptr;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaEventRecord(event, reinterpret_cast<cudaStream_t>(comm.config().stream));
    return event;
  };
  for (const auto& comm : ranks) start_empty_combine(*comm);
  cudaEvent_t event = end_of(*ranks[0]);
  ranks[0]->wait_event(reinterpret_cast<uintptr_t>(event));
  check(cudaEventQuery(event) == cudaSuccess, "the event is done");
  cudaEventDestroy(event);
  start_empty_combine(*ranks[0]);
  event = end_of(*ranks[0]);
  interrupted = true;
  const auto error = check_throws<CommFailure>(
      [&] { ranks[0]->wait_event(reinterpret_cast<uintptr_t>(event)); }, "an event without rank 1");
  check_equal(static_cast<int>(error.failure.record.cause), static_cast<int>(Cause::interrupted),
              "the cause");
  cudaEventDestroy(event);
}

// A stream that stands still until told to go on.
class SideStream {
 public:
  SideStream() {
    std::memset(word_.data(), 0, static_cast<size_t>(word_.bytes()));
    cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    cuda::check(cuda::driver().stream_wait_value(stream_, reinterpret_cast<CUdeviceptr>(word_.as<uint64_t>()),
                                                 1, CU_STREAM_WAIT_VALUE_GEQ),
                "cuStreamWaitValue64");
  }
  ~SideStream() {
    go();
    cudaStreamDestroy(stream_);
  }
  void go() {
    __atomic_store_n(word_.as<uint64_t>(), 1, __ATOMIC_RELEASE);
    cudaStreamSynchronize(stream_);
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_;
  Buffer word_{sizeof(uint64_t)};  // 1: go on
};

void memory_is_kept_until_streams_have_passed_their_use_of_it() {
  const auto machine = make_machine();
  constexpr size_t kBytes = 4321;  // a size that nothing else has
  SideStream user;
  const auto uses = std::make_shared<cuda::StreamUses>();
  uses->note(0, user.get());
  cuda::Memory memory = cuda::device_memory(0, kBytes);
  const std::byte* was = memory.get();
  cuda::keep_until(std::move(memory), [uses] { return uses->done(); });
  check(cuda::device_memory(0, kBytes).get() != was, "it may still be used");
  user.go();
  const cuda::Memory next = cuda::device_memory(0, kBytes), after = cuda::device_memory(0, kBytes);
  check(next.get() == was || after.get() == was, "it is used again");
}

void no_two_communicators_share_a_stream() {
  const auto machine = make_machine();
  std::vector<cuda::Stream> streams;
  std::vector<cudaStream_t> handles;
  for (int i = 0; i < 70; ++i) {
    streams.push_back(cuda::comm_stream(0));
    handles.push_back(streams.back().get());
  }
  std::sort(handles.begin(), handles.end());
  check(std::unique(handles.begin(), handles.end()) == handles.end(), "each has its own");
  streams.clear();
  cuda::free_idle(0);
  check(std::binary_search(handles.begin(), handles.end(), cuda::comm_stream(0).get()),
        "they are used again");
}

void a_slot_that_another_stream_reads_is_not_written() {
  Random random(202);
  Config config = small_config(1);
  config.slots = 1;
  Asked asked;
  asked.may_group = false;
  const Scenario s = random_scenario(config, 1, asked, random), t = with_other_values(s, random);
  in_ranks(config, 1, [&](Rank& self) {
    const DispatchedPtr known = start_dispatch(self, s, {});
    check_dispatch(*known);
    Manner manner;
    manner.zero_copy = true;
    DispatchedPtr d = start_dispatch(self, s, manner);
    check_dispatch(*d);
    const Buffer& wanted = d->mine().received;
    const auto bytes = static_cast<size_t>(d->routing.rows * s.row_bytes());
    Buffer read(d->routing.rows * s.row_bytes());
    SideStream reader;
    cudaMemcpyAsync(read.data(), d->data(), bytes, cudaMemcpyDefault, reader.get());
    self.comm->note_uses({reinterpret_cast<uintptr_t>(d->data())}, reinterpret_cast<uintptr_t>(reader.get()));
    d.reset();
    const DispatchedPtr again = start_redispatch(self, *known, t, {});  // in the same slot
    usleep(50'000);                                                     // enough to write it
    reader.go();
    check_bytes(read.data(), wanted, "what the other stream read");
    check_redispatch(*again);
  });
}

const Suite suite({
    {"a_peer_that_dies_ends_kernels_that_wait_for_it", a_peer_that_dies_ends_kernels_that_wait_for_it},
    {"a_wait_for_an_event_may_be_interrupted", a_wait_for_an_event_may_be_interrupted},
    {"memory_is_kept_until_streams_have_passed_their_use_of_it",
     memory_is_kept_until_streams_have_passed_their_use_of_it},
    {"no_two_communicators_share_a_stream", no_two_communicators_share_a_stream},
    {"a_slot_that_another_stream_reads_is_not_written", a_slot_that_another_stream_reads_is_not_written},
    {"memory_that_cannot_be_shared_is_refused_to_other_processes",
     memory_that_cannot_be_shared_is_refused_to_other_processes},
    {"a_heap_is_used_again_only_when_other_processes_have_gone",
     a_heap_is_used_again_only_when_other_processes_have_gone},
    {"a_destructor_waits_for_no_other_rank", a_destructor_waits_for_no_other_rank},
    {"closing_reports_what_no_call_has_reported", closing_reports_what_no_call_has_reported},
    {"a_user_who_interrupts_ends_the_wait", a_user_who_interrupts_ends_the_wait},
    {"a_rank_whose_process_has_gone_is_named_at_once", a_rank_whose_process_has_gone_is_named_at_once},
    {"virtual_memory_may_be_shared_by_file_descriptor", virtual_memory_may_be_shared_by_file_descriptor},
    {"a_region_of_another_process_is_the_same_memory", a_region_of_another_process_is_the_same_memory},
    {"more_blocks_than_multiprocessors_are_refused", more_blocks_than_multiprocessors_are_refused},
});

}  // namespace
}  // namespace commlib::testing
