// Construction, state and failure of a communicator on the CPU; its operations are in operations.cc.
#include "cpu/communicator.h"

#include <unistd.h>

namespace commlib {

CpuCommunicator::CpuCommunicator(const Config& config)
    : Communicator(config),
      ops_(&vector_ops(config.vector_ops)),
      link_(config.link_gbps),
      region_(Region::create(static_cast<size_t>(heap_bytes()))),
      buffers_(std::make_shared<BufferPool>()),
      pool_(std::make_unique<WorkerPool>(config.num_sms, config.spin, config.interrupted, config.cores)) {
  slots_ = std::make_shared<SlotPool>(region_, region_->data() + control_bytes(), layout_, config.slots);
  write_first_words(region_->data());
}

CpuCommunicator::~CpuCommunicator() { close(); }

PeerAddress CpuCommunicator::address() { return {getpid(), region_->fd(), config_.num_sms, ""}; }

void CpuCommunicator::connect(const std::vector<PeerAddress>& peers) {
  std::vector<pid_t> pids;
  std::vector<std::byte*> heaps;
  for (int p = 0; p < config_.size; ++p) {
    const auto pid = static_cast<pid_t>(peers[p].pid);
    pids.push_back(pid);
    regions_.push_back(p == config_.rank ? region_ : Region::open(pid, peers[p].fd, region_->bytes()));
    heaps.push_back(regions_.back()->data());
    workers_[p] = peers[p].workers;
  }
  peers_ = table_of(heaps);
  processes_ = std::make_unique<PeerProcesses>(pids);
}

std::shared_ptr<OpContext> CpuCommunicator::context(Call call, uint32_t epoch) const {
  auto op = std::make_shared<OpContext>();
  op->peers = &peers_;
  op->ops = ops_;
  op->link = &link_;
  op->processes = processes_.get();
  op->spin = config_.spin;
  op->interrupted = config_.interrupted;
  op->wait = {call, epoch};
  op->timeout = timeout_.load(std::memory_order_relaxed);
  return op;
}

void CpuCommunicator::tell_all(uint64_t left) {
  for (int p = 0; p < peers_.size; ++p) {
    __atomic_store_n(&peers_.mail_to(p).left, left, __ATOMIC_RELEASE);
    ring(peers_.mail_to(p).bell);
  }
}

void CpuCommunicator::raise_failed(OpContext& op) {
  std::unique_lock<std::mutex> lock(op.mutex);
  const FailureRecord record = op.record;
  lock.unlock();
  raise(record);
}

void CpuCommunicator::abandon(OpContext& op, const std::exception_ptr& error) {
  std::string why = "a communication thread failed";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    why += std::string(": ") + e.what();
  } catch (...) {
  }
  op.failed.store(true, std::memory_order_release);
  give_up(why);
}

void CpuCommunicator::synchronize() {
  drain();
  check_usable();
}

}  // namespace commlib
