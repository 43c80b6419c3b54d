// Construction, waiting and state of a communicator on the CPU; how its operations run is in execute.cc.
#include "cpu/communicator.h"

#include <unistd.h>

namespace commlib {

CpuCommunicator::CpuCommunicator(const Config& config)
    : Communicator(config),
      ops_(&vector_ops(config.vector_ops)),
      throttle_(config.link_gbps),
      region_(Region::create(static_cast<size_t>(heap_bytes()))),
      buffers_(std::make_shared<BufferPool>()),
      pool_(std::make_unique<WorkerPool>(config.num_sms, config.spin, config.interrupted, config.cores)) {
  slots_ = std::make_shared<SlotPool>(region_, region_->data() + control_bytes(), layout_, config.slots);
  write_first_words(region_->data());
  sequence_.counted = static_cast<uint32_t>(epoch_);
  if (!config.net.node_of.empty()) make_network(host_network_memory(region_->data()));
}

CpuCommunicator::~CpuCommunicator() {
  try {
    close();
  } catch (const std::exception&) {  // an operation has failed, and a destructor cannot report it
  } catch (const Interrupted&) {     // nor this: what was under way has been given up
  }
}

PeerAddress CpuCommunicator::address() {
  return {getpid(), region_->fd(), config_.num_sms, "", network_ ? network_->address() : ""};
}

std::byte* CpuCommunicator::map_heap(int rank, const PeerAddress& address) {
  const auto pid = static_cast<pid_t>(address.pid);
  regions_.push_back(rank == config_.rank ? region_ : Region::open(pid, address.fd, region_->bytes()));
  return regions_.back()->data();
}

Signals* CpuCommunicator::own_signals() { return reinterpret_cast<Signals*>(region_->data()); }

std::shared_ptr<OpContext> CpuCommunicator::context_of(const OpId& id) {
  auto op = std::make_shared<OpContext>();
  op->peers = &peers_;
  op->ops = ops_;
  op->throttle = &throttle_;
  op->sequence = &sequence_;
  op->processes = processes_.get();
  op->network = network_.get();
  op->spin = config_.spin;
  op->interrupted = config_.interrupted;
  op->gave_up = &gave_up_;
  op->id = id;
  op->timeout = timeout_.load(std::memory_order_relaxed);
  return op;
}

void CpuCommunicator::announce_departure(const Departure& departure) {
  for (int p = 0; p < peers_.size; ++p) {
    if (!peers_.is_near(p)) continue;
    store_departure(peers_.signals_to(p).departed, departure);
    notify(peers_.signals_to(p).event);
  }
  if (network_) announce_departure_far(departure);
}

Departure CpuCommunicator::departure_of(int rank) {
  const auto region = std::atomic_load(&region_);
  if (!region) return {};
  const auto& words = reinterpret_cast<const Signals*>(region->data())[rank].departed;
  return {{load_word(&words[0]), load_word(&words[1])}};
}

template <class Wait>
void CpuCommunicator::wait_for(Wait wait) {
  check_can_wait();
  try {
    wait();
  } catch (const Interrupted&) {
    interrupted_.store(true, std::memory_order_relaxed);
    throw;
  }
}

void CpuCommunicator::wait(const Ticket& ticket) {
  wait_for([&] { pool_->wait(*ticket); });
}

void CpuCommunicator::wait_expert(const PendingDispatch&, const Ticket& ticket, int64_t expert, uintptr_t) {
  wait_for([&] { pool_->wait_wave(*ticket, wave_of_own(expert)); });
}

void CpuCommunicator::synchronize() {
  wait_for([&] { drain_unless_interrupted(); });
  check_usable();
  raise_trouble();
}

std::shared_ptr<void> CpuCommunicator::new_rows(int64_t rows) {
  check_usable();
  return buffers_->take(static_cast<size_t>(rows * layout_.row_bytes));
}

int64_t CpuCommunicator::touched_bytes() {
  const auto region = std::atomic_load(&region_);
  return region ? static_cast<int64_t>(region->touched_bytes()) : 0;
}

// Threads that wait for an operation may still be on their way out of the pool, so the pool itself stays. The
// heap stays as long as tensors lie in it.
void CpuCommunicator::has_closed() {
  pool_->stop();
  std::atomic_store(&processes_, {});
  regions_.clear();
  std::atomic_store(&region_, {});
  std::atomic_store(&slots_, {});
}

}  // namespace commlib
