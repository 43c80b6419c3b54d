#include "watchdog.h"

#include <cxxabi.h>
#include <dirent.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "backend/failure.h"

namespace commlib::testing {
namespace {

constexpr int kExitCode = 3;
constexpr int kMostFrames = 40;

std::mutex ranks_mutex;
std::map<int, const cuda::HostState*> ranks;

// What the signal handler leaves for the watchdog's thread.
void* frames[kMostFrames];
int frame_count = 0;
std::atomic<bool> answered{false};

void note_stack(int) {
  frame_count = backtrace(frames, kMostFrames);
  answered.store(true);
}

void nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

void print_frame(void* address) {
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) {
    std::printf("      %p\n", address);
    return;
  }
  int status = -1;
  char* plain = info.dli_sname ? abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status) : nullptr;
  const std::string name = plain ? plain : info.dli_sname ? info.dli_sname : "?";
  std::free(plain);
  const auto offset = static_cast<std::byte*>(address) -
                      static_cast<std::byte*>(info.dli_saddr ? info.dli_saddr : info.dli_fbase);
  std::printf("      %p %s+0x%lx (%s)\n", address, name.substr(0, 120).c_str(), static_cast<long>(offset),
              info.dli_fname);
}

std::string name_of_thread(const std::string& id) {
  char name[64] = "";
  if (FILE* file = std::fopen(("/proc/self/task/" + id + "/comm").c_str(), "r")) {
    if (std::fscanf(file, "%63[^\n]", name) != 1) name[0] = 0;
    std::fclose(file);
  }
  return name;
}

// A thread of the driver may not answer.
void print_stack(pid_t id) {
  answered.store(false);
  if (syscall(SYS_tgkill, getpid(), id, SIGUSR2) != 0) return;
  for (int i = 0; i < 200 && !answered.load(); ++i) nap(1);
  if (!answered.load()) {
    std::printf("      does not answer\n");
    return;
  }
  for (int i = 2; i < frame_count; ++i) print_frame(frames[i]);  // but the handler's own
}

void print_stacks() {
  DIR* tasks = opendir("/proc/self/task");
  if (!tasks) return;
  while (const dirent* entry = readdir(tasks)) {
    const auto id = static_cast<pid_t>(std::strtol(entry->d_name, nullptr, 10));
    if (id == 0 || id == syscall(SYS_gettid)) continue;
    std::printf("    thread %d, \"%s\"\n", static_cast<int>(id), name_of_thread(entry->d_name).c_str());
    print_stack(id);
    std::fflush(stdout);
  }
  closedir(tasks);
}

// The communicator may be gone: the system call checks whether there is memory.
bool read_safely(const void* from, void* to, size_t bytes) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  const auto size = static_cast<ssize_t>(bytes);
  const bool ok = write(ends[1], from, bytes) == size && read(ends[0], to, bytes) == size;
  close(ends[0]);
  close(ends[1]);
  return ok;
}

void print_ranks() {
  const std::unique_lock<std::mutex> lock(ranks_mutex, std::try_to_lock);
  if (!lock) return;
  for (const auto& [rank, at] : ranks) {
    cuda::HostState state;
    if (!read_safely(at, &state, sizeof state)) {
      std::printf("    rank %d: its communicator has gone\n", rank);
      continue;
    }
    std::printf("    rank %d: %llu plans done, the last one's status %d; abort word 0x%llx; ", rank,
                static_cast<unsigned long long>(state.planned), static_cast<int>(state.report.status),
                static_cast<unsigned long long>(state.abort));
    std::printf("%s\n", state.failed ? describe(Failure{rank, state.record, ""}).c_str() : "no failed wait");
  }
}

}  // namespace

void watch_rank(int rank, const cuda::HostState* state) {
  std::lock_guard<std::mutex> lock(ranks_mutex);
  ranks[rank] = state;
}

void forget_ranks() {
  std::lock_guard<std::mutex> lock(ranks_mutex);
  ranks.clear();
}

Watchdog::Watchdog() {
  void* first[1];
  backtrace(first, 1);  // loads what it needs, which a handler must not
  struct sigaction action{};
  action.sa_handler = note_stack;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR2, &action, nullptr);
  thread_ = std::thread([this] { run(); });
}

Watchdog::~Watchdog() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void Watchdog::watch(const std::string& test, double seconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  test_ = test;
  seconds_ = seconds;
  ++watches_;
  changed_.notify_all();
}

void Watchdog::rest() { watch("", 0); }

void Watchdog::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!over_) {
    const uint64_t now = watches_;
    const auto other = [&] { return over_ || watches_ != now; };
    if (test_.empty()) {
      changed_.wait(lock, other);
      continue;
    }
    if (changed_.wait_for(lock, std::chrono::duration<double>(seconds_), other)) continue;
    std::printf("TOOK TOO LONG\n    %s is not done after %.0f s; --after %s goes on\n", test_.c_str(),
                seconds_, test_.c_str());
    std::fflush(stdout);
    print_ranks();
    std::fflush(stdout);
    print_stacks();
    _exit(kExitCode);
  }
}

}  // namespace commlib::testing
