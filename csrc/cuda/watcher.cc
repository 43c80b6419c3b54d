#include "cuda/watcher.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

namespace commlib::cuda {

class Watcher {
 public:
  // Never destroyed: the process may end while ranks are watched.
  static Watcher& get() {
    static auto* const one = new Watcher;
    return *one;
  }

  void add(Watch* watch) {
    std::lock_guard<std::mutex> lock(mutex_);
    watches_.insert(watch);
    if (!thread_) thread_ = start();
  }

  void remove(Watch* watch) {
    std::unique_ptr<std::thread> ended;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      watches_.erase(watch);
      if (!watches_.empty()) return;
      ended = std::move(thread_);
      ++ends_;
      end_.notify_all();
    }
    ended->join();
  }

 private:
  // Signals are for other threads: Python's main thread wants Ctrl-C.
  std::unique_ptr<std::thread> start() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    auto thread = std::make_unique<std::thread>([this, mine = ends_] { run(mine); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread->native_handle(), "commlib-watcher");
    return thread;
  }

  void run(int mine) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!end_.wait_for(lock, std::chrono::milliseconds(100), [&] { return ends_ != mine; })) {
      for (Watch* watch : watches_) watch->look_();
    }
  }

  std::mutex mutex_;  // guards the members below it
  std::condition_variable end_;
  std::set<Watch*> watches_;
  std::unique_ptr<std::thread> thread_;
  int ends_ = 0;  // threads that were told to end: each ends when this is no longer as at its start
};

Watch::Watch(std::function<void()> look) : look_(std::move(look)), process_(getpid()) {
  Watcher::get().add(this);
}

Watch::~Watch() {
  if (getpid() == process_) Watcher::get().remove(this);
}

}  // namespace commlib::cuda
