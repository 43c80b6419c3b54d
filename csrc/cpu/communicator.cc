// Construction, state and failure of a communicator; its operations are in operations.cc.
#include "cpu/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace commlib {

Communicator::Communicator(const Config& config)
    : config_(config),
      placement_{config.experts, config.size},
      width_(std::min(config.topk, config.size)),
      layout_{config.capacity, config.hidden * size_of(config.dtype), config.topk,
              accumulator_size(config.dtype)},
      ops_(&vector_ops(config.vector_ops)),
      region_(Region::create(static_cast<size_t>(control_bytes() + config.slots * layout_.bytes()))),
      workers_(config.size, config.workers),
      slots_(std::make_shared<SlotPool>(region_, region_->data() + control_bytes(), layout_, config.slots)),
      buffers_(std::make_shared<BufferPool>()),
      pool_(std::make_unique<WorkerPool>(config.workers, config.spin, config.interrupted)),
      timeout_(config.timeout),
      epoch_(config.first_epoch - 1),
      dispatches_(config.first_epoch - 1) {
  for (int64_t e = 0; e < config.experts; ++e) owner_.push_back(static_cast<uint8_t>(placement_.owner(e)));
  // Words say "before the first operation", also where epochs wrap around soon.
  const uint64_t before = tagged(epoch_, 0);
  auto* mail = reinterpret_cast<Mailbox*>(region_->data());
  for (int s = 0; s < config.size; ++s) {
    mail[s].pulled = before;
    std::fill(std::begin(mail[s].calls), std::end(mail[s].calls), before);
  }
  auto* counts = reinterpret_cast<uint64_t*>(mail + config.size);
  std::fill_n(counts, 2 * config.size * count_words(placement_), before);
}

Communicator::~Communicator() { close(); }

int64_t Communicator::control_bytes() const {
  const int64_t mail = config_.size * static_cast<int64_t>(sizeof(Mailbox));
  const int64_t counts = 2 * config_.size * count_words(placement_) * static_cast<int64_t>(sizeof(uint64_t));
  return align_up(mail + counts, 4096);
}

PeerTable Communicator::table_of(const std::vector<std::shared_ptr<Region>>& regions) const {
  PeerTable table{};
  table.rank = config_.rank;
  table.size = config_.size;
  table.count_words = count_words(placement_);
  for (int p = 0; p < config_.size; ++p) {
    std::byte* base = regions[p]->data();
    std::byte* counts = base + config_.size * sizeof(Mailbox);
    table.peer[p] = {reinterpret_cast<Mailbox*>(base), reinterpret_cast<uint64_t*>(counts),
                     base + control_bytes()};
  }
  return table;
}

PeerAddress Communicator::address() const { return {getpid(), region_->fd(), config_.workers}; }

void Communicator::connect(const std::vector<PeerAddress>& peers) {
  std::vector<pid_t> pids;
  for (int p = 0; p < config_.size; ++p) {
    const auto pid = static_cast<pid_t>(peers[p].pid);
    pids.push_back(pid);
    regions_.push_back(p == config_.rank ? region_ : Region::open(pid, peers[p].fd, region_->bytes()));
    workers_[p] = peers[p].workers;
  }
  peers_ = table_of(regions_);
  processes_ = std::make_unique<PeerProcesses>(pids);
}

std::shared_ptr<OpContext> Communicator::context(Call call, uint32_t epoch) const {
  auto op = std::make_shared<OpContext>();
  op->peers = &peers_;
  op->ops = ops_;
  op->processes = processes_.get();
  op->spin = config_.spin;
  op->interrupted = config_.interrupted;
  op->call = call;
  op->epoch = epoch;
  op->timeout = timeout_.load(std::memory_order_relaxed);
  return op;
}

void Communicator::check_usable() const {
  std::lock_guard<std::mutex> lock(broken_mutex_);
  if (broken_.empty()) return;
  Failure failure;
  failure.cause = Cause::broken;
  failure.rank = config_.rank;
  failure.detail = broken_;
  throw CommFailure(failure);
}

void Communicator::leave(uint32_t how, int blamed, const std::string& why) {
  {
    std::lock_guard<std::mutex> lock(broken_mutex_);
    if (!broken_.empty()) return;
    broken_ = why;
  }
  for (int p = 0; p < peers_.size; ++p) {
    __atomic_store_n(&peers_.mail_to(p).left, tagged(how, static_cast<uint32_t>(blamed)), __ATOMIC_RELEASE);
    ring(peers_.mail_to(p).bell);
  }
}

void Communicator::raise(OpContext& op) {
  std::unique_lock<std::mutex> lock(op.mutex);
  Failure failure = op.failure;
  lock.unlock();
  leave(kGaveUp, failure.peers.empty() ? config_.rank : failure.peers.front(), describe(failure));
  throw CommFailure(std::move(failure));
}

void Communicator::give_up(const std::string& why) { leave(kGaveUp, config_.rank, why); }

void Communicator::close() {
  if (closed_.exchange(true, std::memory_order_acq_rel)) return;
  pool_->drain();
  leave(kClosed, config_.rank, "it has been closed");
}

}  // namespace commlib
