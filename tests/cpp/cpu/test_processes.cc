// Ranks as processes that are forked, as launchers make them: each maps the others' heaps, and one may die.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstring>

#include "../operations.h"
#include "../suite.h"
#include "cpu/communicator.h"

namespace commlib::testing {
namespace {

constexpr int kMostRanks = 4;
constexpr unsigned kSecondsToLive = 120;  // of a rank that hangs

// What the ranks of one world share, in memory common to forked processes.
struct Board {
  pthread_barrier_t barrier;
  struct {
    int64_t pid;
    int fd, workers;
  } addresses[kMostRanks];
  char failures[kMostRanks][400];
};

class SharedBoard {
 public:
  explicit SharedBoard(int ranks) {
    void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "memory that processes share");
    board_ = static_cast<Board*>(memory);
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&board_->barrier, &shared, static_cast<unsigned>(ranks));
  }
  ~SharedBoard() { munmap(board_, sizeof(Board)); }
  Board* operator->() const { return board_; }

 private:
  Board* board_;
};

using Body = std::function<void(Rank&)>;

// A rank of its own process, up to its end.
void be_rank(const SharedBoard& board, Config config, const Body& body) {
  Meeting alone(1);
  Rank self{config.rank, std::make_shared<CpuCommunicator>(config),
            alone,       Random(static_cast<uint64_t>(config.rank)),
            nullptr,     nullptr};
  const PeerAddress mine = self.comm->address();
  board->addresses[self.rank] = {mine.pid, mine.fd, mine.workers};
  pthread_barrier_wait(&board->barrier);
  std::vector<PeerAddress> peers;
  for (int p = 0; p < config.size; ++p) {
    const auto& said = board->addresses[p];
    peers.push_back({said.pid, said.fd, said.workers, "", ""});
  }
  self.comm->connect(peers);
  pthread_barrier_wait(&board->barrier);
  body(self);
}

[[noreturn]] void live_as_rank(const SharedBoard& board, const Config& config, const Body& body) {
  alarm(kSecondsToLive);  // the parent's is not inherited
  int status = 0;
  try {
    be_rank(board, config, body);
  } catch (const std::exception& e) {
    std::strncpy(board->failures[config.rank], e.what(), sizeof board->failures[0] - 1);
    status = 1;
  }
  _exit(status);
}

// Runs `body` on ranks that are processes, all on one node. Those in `killed` must end by SIGKILL, all others
// by themselves.
void in_processes(Config config, int ranks, const std::vector<int>& killed, const Body& body) {
  const SharedBoard board(ranks);
  std::array<pid_t, kMostRanks> pids{};
  for (config.rank = 0; config.rank < ranks; ++config.rank) {
    pids[config.rank] = fork();
    check(pids[config.rank] >= 0, "a process can be forked");
    if (pids[config.rank] == 0) live_as_rank(board, config, body);
  }
  std::string failures;
  for (int rank = 0; rank < ranks; ++rank) {
    int status = 0;
    waitpid(pids[rank], &status, 0);
    const bool dies = std::find(killed.begin(), killed.end(), rank) != killed.end();
    const bool right = dies ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 0;
    if (!right) {
      failures += "rank " + std::to_string(rank) + " ended with status " + std::to_string(status) + ": " +
                  board->failures[rank] + "; ";
    }
  }
  if (!failures.empty()) throw Failed(failures);
}

Config config_of(int ranks) {
  Config config = small_config(ranks);
  config.num_sms = 2;
  config.slots = 6;
  config.timeout = 60;
  return config;
}

void ranks_in_processes_get_what_they_should() {
  for (const int ranks : {2, 3, 4}) {
    Random random(110 + static_cast<uint64_t>(ranks));
    const Config config = config_of(ranks);
    const Scenario s = random_scenario(config, ranks, {}, random);
    const Scenario other = with_other_values(s, random);
    in_processes(config, ranks, {}, [&](Rank& self) {
      for (int i = 0; i < 20; ++i) {
        self.nap_sometimes();
        check_round_trip(self, s, other, random_manner(self.random));
      }
    });
  }
}

void a_process_that_is_killed_is_named_by_all_others() {
  Random random(115);
  const Config config = config_of(3);
  const Scenario s = random_scenario(config, 3, {}, random);
  in_processes(config, 3, {1}, [&](Rank& self) {
    check_round_trip(self, s, s, {});
    if (self.rank == 1) raise(SIGKILL);
    const Failure failure =
        check_throws<CommFailure>([&] { start_dispatch(self, s, {}); }, "a dispatch without rank 1").failure;
    const Cause cause = failure.record.cause;
    check(cause == Cause::exited || cause == Cause::departed, "nobody waits for the deadline");
    check(failure.peers() == std::vector<int>{1}, "the rank that died is named");
  });
}

void a_process_may_leave_with_rows_under_way() {
  Random random(117);
  const Config config = config_of(2);
  const Scenario s = random_scenario(config, 2, {}, random);
  in_processes(config, 2, {0}, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    Manner async;
    async.async = true;
    const CombinedPtr back = start_combine(self, *d, s, async);
    if (self.rank == 0) raise(SIGKILL);
    try {
      back->under_way.wait();
    } catch (const CommFailure& e) {
      check(e.failure.peers() == std::vector<int>{0}, "the rank that died is named");
    }
  });
}

const Suite suite({{"ranks_in_processes_get_what_they_should", ranks_in_processes_get_what_they_should},
                   {"a_process_that_is_killed_is_named_by_all_others",
                    a_process_that_is_killed_is_named_by_all_others},
                   {"a_process_may_leave_with_rows_under_way", a_process_may_leave_with_rows_under_way}});

}  // namespace
}  // namespace commlib::testing
