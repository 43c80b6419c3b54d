#include "backend/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "net/network.h"
#include "protocol/waves.h"

namespace commlib {
namespace {

constexpr double kFlushSeconds = 5;  // for what is on its way to other nodes when a communicator is closed
constexpr double kHandOverSeconds = 1;
constexpr int kMaxQueues = 16;  // GPUs have enough workers to fill any link several times over

}  // namespace

Communicator::Communicator(const Config& config)
    : config_(config),
      placement_{config.experts, config.size},
      width_(std::min(config.topk, config.size)),
      layout_{config.capacity,
              config.hidden * size_of(config.dtype),
              config.hidden * size_of(config.dtype),
              0,
              config.topk,
              accumulator_size(config.dtype),
              config.max_tokens,
              config.size * placement_.max_count(),
              config.net.node_of.empty() ? config.grouped_rows : 0},
      timeout_(config.timeout),
      epoch_(config.first_epoch - 1),
      near_epoch_(epoch_) {
  for (int64_t e = 0; e < config.experts; ++e) owner_.push_back(static_cast<uint8_t>(placement_.owner(e)));
}

Communicator::~Communicator() {
  if (config_.team && home_.is_here()) config_.team->remove(*this);
}

int64_t Communicator::count_words() const { return CountWords{placement_, layout_.grouped_rows > 0}.most(); }

int64_t Communicator::control_bytes() const {
  const int64_t signals = config_.size * static_cast<int64_t>(sizeof(Signals));
  const int64_t counts = int64_t{2} * config_.size * count_words() * static_cast<int64_t>(sizeof(uint64_t));
  return align_up(signals + counts, 4096);
}

// Makes words say "before the first operation", also where epochs soon wrap around.
void Communicator::write_first_words(std::byte* control) const {
  const uint64_t before = config_.first_epoch - 1;
  const uint64_t said_before = tagged(static_cast<uint32_t>(before), 0);
  auto* signals = reinterpret_cast<Signals*>(control);
  for (int s = 0; s < config_.size; ++s) {
    std::fill(std::begin(signals[s].arrived), std::end(signals[s].arrived), before);
    signals[s].pulled = before;
    for (SaidCall& said : signals[s].calls) said.word = said_before;
  }
  auto* counts = reinterpret_cast<uint64_t*>(signals + config_.size);
  std::fill_n(counts, int64_t{2} * config_.size * count_words(), said_before);
}

PeerTable Communicator::table_of(const std::vector<std::byte*>& heaps) const {
  PeerTable table{};
  table.rank = config_.rank;
  table.size = config_.size;
  table.count_words = count_words();
  table.internode = network_ ? &network_->internode() : nullptr;
  for (int p = 0; p < config_.size; ++p) {
    std::byte* heap = heaps[p] ? heaps[p] : network_->control_for(p);
    if (heaps[p]) table.near |= uint64_t{1} << p;
    table.peer[p] = {reinterpret_cast<Signals*>(heap),
                     reinterpret_cast<uint64_t*>(heap + config_.size * sizeof(Signals)),
                     heaps[p] ? heap + control_bytes() : nullptr};
  }
  return table;
}

void Communicator::make_network(std::unique_ptr<NetworkMemory> memory) {
  const NetShape shape{config_.rank, config_.size,      control_bytes(),      count_words(),
                       config_.topk, layout_.row_bytes, layout_.weight_bytes, config_.spin};
  network_ = std::make_unique<Network>(shape, config_.net, std::move(memory));
}

void Communicator::connect(const std::vector<PeerAddress>& peers) {
  const uint64_t near = network_ ? network_->topology().near : first_ranks(config_.size);
  std::vector<pid_t> pids;
  for (int p = 0; p < config_.size; ++p) {
    pids.push_back(has(near, p) ? static_cast<pid_t>(peers[p].pid) : PeerProcesses::kNotHere);
  }
  std::atomic_store(&processes_, std::make_shared<const PeerProcesses>(pids));
  std::vector<std::byte*> heaps;
  for (int p = 0; p < config_.size; ++p) heaps.push_back(has(near, p) ? map_heap(p, peers[p]) : nullptr);
  connect_network(peers, own_signals());
  peers_ = table_of(heaps);
  has_connected();
  if (config_.team) config_.team->add(*this);
}

Absence Communicator::absence_of(int rank, bool departed_too) {
  const auto processes = std::atomic_load(&processes_);
  if (!processes || rank == config_.rank) return {};
  const bool exited = processes->has_exited(rank);
  const bool lost = network_ && network_->has_lost(rank);
  const Departure said = departure_of(rank);  // read last: one that is gone says nothing more
  // A process on another node that has said goodbye may end, or go on.
  const bool departed = said.how() != 0;
  const char* why = exited                     ? "exited"
                    : lost && !departed        ? "lost"
                    : departed && departed_too ? "departed"
                                               : nullptr;
  // What it said cannot be read any more once another thread has closed this.
  if (!why || !std::atomic_load(&processes_)) return {};
  return {why, said.how() == kGaveUp ? said.blamed() : bit_of(rank)};
}

void Communicator::connect_network(const std::vector<PeerAddress>& peers, Signals* signals) {
  if (!network_) return;
  std::vector<std::string> addresses;
  int queues = kMaxQueues;
  for (const PeerAddress& a : peers) {
    addresses.push_back(a.net);
    queues = std::min(queues, a.workers);
  }
  network_->connect(addresses, queues, signals);
}

void Communicator::announce_departure_far(const Departure& departure) {
  for (int p = 0; p < peers_.size; ++p) {
    if (peers_.is_near(p)) continue;
    uint64_t* words = peers_.signals_to(p).departed;
    store_departure(words, departure);
    const auto offset = reinterpret_cast<std::byte*>(words) - network_->control_for(p);
    network_->post(
        {PostKind::words, Direction::outward, 0, p, static_cast<uint64_t>(offset), sizeof departure.words});
  }
}

void Communicator::refuse(const std::string& why) const {
  Failure failure;
  failure.record.cause = Cause::broken;
  failure.rank = config_.rank;
  failure.detail = why;
  throw CommFailure(failure);
}

void Communicator::check_can_wait() const {
  if (!home_.is_here()) {
    refuse("it belongs to process " + std::to_string(home_.id()) + ", of which this is a fork (" +
           std::to_string(getpid()) +
           "): make one here, or start processes by \"spawn\" (multiprocessing, data loaders)");
  }
  if (is_issuing_here()) refuse("a signal handler called it in the middle of one of its operations");
}

int Communicator::wave_of_own(int64_t expert) const {
  const int64_t own = placement_.count(config_.rank);
  if (expert < 0 || expert >= own) {
    throw std::invalid_argument("expert is " + std::to_string(expert) +
                                ", but this rank has local experts 0 to " + std::to_string(own - 1));
  }
  return wave_of(expert, own);
}

void Communicator::check_usable() const {
  if (!home_.is_here()) check_can_wait();
  std::lock_guard<std::mutex> lock(broken_mutex_);
  if (!broken_.empty()) refuse(broken_);
}

namespace {

// By the system's clock: ThreadSanitizer does not know of mutexes that are locked by the steady clock.
std::chrono::system_clock::time_point next_nap() {
  return std::chrono::system_clock::now() + std::chrono::milliseconds(static_cast<int>(kNapSeconds * 1e3));
}

}  // namespace

// Another thread's operation may take as long as a deadline; Ctrl-C ends the wait for that, too.
Communicator::Issue::Issue(Communicator& comm, Of of)
    : comm_(comm), lock_(comm.issue_mutex_, std::defer_lock) {
  comm.check_can_wait();
  while (!lock_.try_lock() && !lock_.try_lock_until(next_nap())) check_interrupt();
  comm.check_usable();
  if (of == Of::operation) await_turn();
  comm.issuer_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

void Communicator::Issue::check_interrupt() const {
  if (comm_.config_.interrupted && comm_.config_.interrupted(true)) throw Interrupted{};
}

void Communicator::Issue::await_turn() {
  while (comm_.turn_) {
    if (comm_.turn_->expired()) {
      comm_.give_up("rank " + std::to_string(comm_.config_.rank) +
                    " began a dispatch and never moved its rows");
    } else if (comm_.turn_of_ == std::this_thread::get_id()) {
      comm_.refuse("it was called, as by a signal handler, in the middle of one of its dispatches");
    } else if (comm_.turn_ended_.wait_until(lock_, next_nap()) == std::cv_status::timeout) {
      check_interrupt();
    }
    comm_.check_usable();
  }
}

void Communicator::begin_turn(PendingDispatch& dispatch) {
  dispatch.turn = std::make_shared<char>();
  turn_ = dispatch.turn;
  turn_of_ = std::this_thread::get_id();
}

void Communicator::end_turn(PendingDispatch& dispatch) {
  dispatch.turn.reset();
  turn_.reset();
  turn_ended_.notify_all();
}

Communicator::Issue::~Issue() { comm_.issuer_.store({}, std::memory_order_relaxed); }

int Communicator::slots_in_use() const {
  if (!home_.is_here()) check_can_wait();
  const auto slots = std::atomic_load(&slots_);
  return slots ? slots->in_use(capture_id()) : 0;
}

bool Communicator::is_usable() const {
  if (!home_.is_here()) return false;
  std::lock_guard<std::mutex> lock(broken_mutex_);
  return broken_.empty();
}

void Communicator::leave(uint32_t how, uint64_t blamed, const std::string& why) {
  if (!home_.is_here()) return;
  const bool first = leave_alone(how, blamed, why);
  if (first && how == kGaveUp && config_.team) config_.team->give_up(*this, blamed, why);
}

bool Communicator::leave_alone(uint32_t how, uint64_t blamed, const std::string& why) {
  {
    std::lock_guard<std::mutex> lock(broken_mutex_);
    if (!broken_.empty()) return false;
    broken_ = why;
  }
  gave_up_.store(true, std::memory_order_release);
  end_waits();
  announce_departure(Departure::of(how, blamed));
  // If this rank exits at the error, ranks that have not heard why must not blame it for that.
  if (how == kGaveUp && network_) network_->hand_over(kHandOverSeconds);
  return true;
}

void Communicator::raise(const FailureRecord& record) {
  if (record.cause == Cause::broken) check_usable();  // another call knows why
  Failure failure{config_.rank, record, ""};
  if (record.cause == Cause::lost) failure.detail = network_->why_lost(record.peer);
  leave(kGaveUp, record.blamed, describe(failure));
  throw CommFailure(std::move(failure));
}

void Communicator::drain_or_give_up(const std::string& why) {
  try {
    drain_unless_interrupted();
  } catch (const Interrupted&) {
    give_up(why);
    throw;
  }
}

void Communicator::close() {
  if (!home_.is_here()) return;
  if (is_issuing_here()) return give_up("a signal handler closed it in the middle");
  if (closed_.exchange(true, std::memory_order_acq_rel)) return;
  // A user who no longer waits for what is under way must not wait for it here: the others may never come.
  const std::string why = "it was interrupted (Ctrl-C) with operations under way, and closed";
  if (interrupted_.load(std::memory_order_relaxed)) give_up(why);
  bool interrupted = false;
  try {
    drain_or_give_up(why);
  } catch (const Interrupted&) {
    interrupted = true;
  }
  drain();
  bool usable;
  {
    std::lock_guard<std::mutex> lock(broken_mutex_);
    usable = broken_.empty();
  }
  std::exception_ptr untold;  // of an operation that only joined a stream, and failed since
  try {
    if (usable) check_ready();
  } catch (const CommFailure& failure) {
    // Another of the team has given up meanwhile: that is told elsewhere, as where it came first.
    if (failure.failure.record.cause != Cause::broken) untold = std::current_exception();
  } catch (...) {
    untold = std::current_exception();
  }
  leave(kClosed, bit_of(config_.rank), "it has been closed");
  if (config_.team) config_.team->remove(*this);  // which may be telling it on another thread
  if (network_) network_->close(std::min(kFlushSeconds, timeout_.load(std::memory_order_relaxed)));
  {
    std::lock_guard<std::timed_mutex> issue(issue_mutex_);  // no thread is in the middle of a call
    has_closed();
  }
  if (interrupted) throw Interrupted{};
  if (untold) std::rethrow_exception(untold);
}

void Communicator::note_uses(const std::vector<uintptr_t>& addresses, uintptr_t stream) {
  for (uintptr_t address : addresses) {
    if (const auto lease = slots_->find(reinterpret_cast<const std::byte*>(address))) lease->use_on(stream);
  }
}

}  // namespace commlib
