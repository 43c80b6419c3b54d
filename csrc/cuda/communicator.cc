// Construction, waiting and failure of a communicator on a GPU; how its operations run is in execute.cc.
#include "cuda/communicator.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "cuda/capture.h"
#include "cuda/driver.h"
#include "cuda/network_memory.h"
#include "cuda/wait.h"

namespace commlib::cuda {
namespace {

std::shared_ptr<HostState> mapped_host_state(int device) {
  const Memory memory = mapped_memory(device, sizeof(HostState));
  std::memset(memory.get(), 0, sizeof(HostState));
  return std::reinterpret_pointer_cast<HostState>(memory);
}

// Hands out parts of one allocation, each 256-byte aligned; first without memory, to count.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    const int64_t at = used_;
    used_ = align_up(used_ + n * static_cast<int64_t>(sizeof(T)), 256);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace

CudaCommunicator::CudaCommunicator(const Config& config)
    : Communicator(config), awaiting_waves_(std::make_shared<StreamUses>()), departures_(config.size) {
  const OnDevice guard = on_device();
  shape_ = prepare_kernels(config.device, config.num_sms, reinterpret_cast<cudaStream_t>(config.stream));
  region_ = DeviceRegion::create(config.device, static_cast<size_t>(heap_bytes()), share_named(config.share));
  slots_ = std::make_shared<CudaSlotPool>(config.device, region_, region_->data() + control_bytes(), layout_,
                                          config.slots);
  aside_ = side_stream(config.device);
  plan_stream_ = config.plan_stream && config.net.node_of.empty()
                     ? reinterpret_cast<cudaStream_t>(config.plan_stream)
                     : shape_.stream;
  for (cudaEvent_t* event : {&planned_, &issued_}) {
    check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  std::vector<std::byte> control(static_cast<size_t>(control_bytes()));
  write_first_words(control.data());
  put(region_->data(), control.data(), control.size());
  host_ = mapped_host_state(config.device);
  check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&host_on_device_), host_.get(), 0),
        "cudaHostGetDevicePointer");
  CudaCommunicator::set_timeout(config.timeout);
  make_scratch();
  if (!config.net.node_of.empty()) make_network(gpu_network_memory(config.device, region_->data()));
}

// Waits for this rank's kernels only, and until their deadline at most. Frees nothing: see pool.h.
CudaCommunicator::~CudaCommunicator() {
  try {
    close();
  } catch (const std::exception&) {  // an operation has failed, and a destructor cannot report it
  }
  try {
    watch_.reset();
    drain();  // nothing of this rank may use what goes back to the pool
    keep_what_others_use();
    cudaEventDestroy(planned_);
    cudaEventDestroy(issued_);
  } catch (const std::exception&) {  // the device is lost
  }
}

void CudaCommunicator::keep_what_others_use() {
  keep_until(memory_, [uses = awaiting_waves_] { return uses->done(); });
  if (visitors_.empty()) return;
  keep_until(region_, [device = config_.device, signals = reinterpret_cast<Signals*>(region_->data()),
                       aside = aside_, processes = processes_, visitors = visitors_]() mutable {
    const OnDevice guard(device);
    const auto has_detached = [&](int p) {
      uint64_t detached = 0;
      const bool known = cudaMemcpyAsync(&detached, &signals[p].detached, sizeof detached,
                                         cudaMemcpyDeviceToHost, aside.get()) == cudaSuccess &&
                         cudaStreamSynchronize(aside.get()) == cudaSuccess;
      return !known || detached || processes->has_exited(p);  // nothing is known of a lost device
    };
    visitors.erase(std::remove_if(visitors.begin(), visitors.end(), has_detached), visitors.end());
    return visitors.empty();
  });
}

void CudaCommunicator::make_scratch() {
  uint8_t* owner = nullptr;
  const auto carve = [&](std::byte* base) {
    Carver c(base);
    state_ = c.take<DeviceState>(1);
    owner = c.take<uint8_t>(config_.experts);
    scratch_ = {c.take<uint32_t>(config_.experts), c.take<uint32_t>(kPlanWarps * config_.experts),
                c.take<uint32_t>(config_.experts), c.take<uint32_t>(config_.experts),
                c.take<uint8_t>(config_.max_tokens * width_)};
    return c.used();
  };
  memory_ = device_memory(config_.device, static_cast<size_t>(carve(nullptr)));
  carve(memory_.get());
  DeviceState first{};
  first.sequence.ended = first.sequence.begun = epoch_;
  first.sequence.counted = static_cast<uint32_t>(epoch_);
  put(state_, &first, sizeof first);
  put(owner, owner_.data(), owner_.size());
  owner_on_device_ = owner;
}

// Copies to the device, and is done when it returns. On a stream that waits for no other: another rank's
// kernel may be waiting for this rank.
void CudaCommunicator::put(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, aside_.get()), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(aside_.get()), "cudaStreamSynchronize");
}

PeerAddress CudaCommunicator::address() {
  return {getpid(), region_->fd(), config_.num_sms * kWarps, region_->handle(),
          network_ ? network_->address() : ""};
}

std::byte* CudaCommunicator::map_heap(int rank, const PeerAddress& a) {
  const OnDevice guard = on_device();
  if (a.pid != getpid()) visitors_.push_back(rank);
  regions_.push_back(rank == config_.rank
                         ? region_
                         : DeviceRegion::open(config_.device, a.pid, a.fd, a.handle, region_->bytes()));
  return regions_.back()->data();
}

void CudaCommunicator::has_connected() {
  const OnDevice guard = on_device();
  if (network_) {
    internode_on_device_ = device_memory(config_.device, sizeof(Internode));
    put(internode_on_device_.get(), &network_->internode(), sizeof(Internode));
    peers_.internode = reinterpret_cast<const Internode*>(internode_on_device_.get());
  }
  free_idle(config_.device);  // no rank of this process that made its heap needs any of it
  if (!visitors_.empty() || network_) {
    watch_ = std::make_unique<Watch>([this] {
      try {
        check_processes();
      } catch (const std::exception&) {  // the device is lost: calls that wait for it report that
      }
    });
  }
  if (regions_.size() - visitors_.size() > 1) {  // ranks of this process
    shared_device_ = std::make_unique<SharedDevice>(config_.device);
  }
}

OpParams CudaCommunicator::params(const OpId& id, int ring_bytes) const {
  OpParams op{};
  op.peers = peers_;
  op.call = id.call;
  op.format = id.format;
  op.number = id.epoch;
  op.state = state_;
  op.host = host_on_device_;
  op.throttle = ThrottleRate::of(config_.link_gbps);
  op.ring_bytes = ring_bytes;
  return op;
}

void CudaCommunicator::set_timeout(double seconds) {
  Communicator::set_timeout(seconds);
  store_word(&host_->timeout_ns, static_cast<uint64_t>(seconds * 1e9));
}

void CudaCommunicator::check_health() {
  check_usable();
  if (load_word(&host_->failed) == 0) return;
  drain();  // kernels leave their waits now, and use their tensors, which the caller may free, until then
  raise(host_->record);
}

bool CudaCommunicator::is_usable() const {
  return Communicator::is_usable() && load_word(&host_->failed) == 0;
}

void CudaCommunicator::abort_waits(Cause cause, int peer) {
  store_word(&host_->abort, tagged(static_cast<uint32_t>(cause), static_cast<uint32_t>(peer)));
}

Departure CudaCommunicator::departure_of(int rank) {
  std::lock_guard<std::mutex> lock(look_mutex_);
  Departure& known = departures_[rank];
  if (known.how() != 0) return known;
  const OnDevice guard = on_device();
  const auto& words = reinterpret_cast<const Signals*>(region_->data())[rank].departed;
  check(cudaMemcpyAsync(known.words, words, sizeof words, cudaMemcpyDeviceToHost, aside_.get()),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(aside_.get()), "cudaStreamSynchronize");
  return known;
}

void CudaCommunicator::check_processes() {
  if (network_) store_word(&host_->lost, network_->lost_ranks());
  for (int p = 0; p < config_.size; ++p) {
    // A rank that departed before its process ended did its part in what it took part in: the kernels judge
    // by its word.
    if (processes_->has_exited(p) && departure_of(p).how() == 0) return abort_waits(Cause::exited, p);
  }
}

// What only the host can see while kernels wait.
void CudaCommunicator::check_peers() {
  check_processes();
  if (config_.interrupted && config_.interrupted(true)) abort_waits(Cause::interrupted, config_.rank);
}

bool CudaCommunicator::is_idle() const {
  bool idle = true;
  for (const cudaStream_t stream : {plan_stream_, shape_.stream}) {
    const cudaError_t error = cudaStreamQuery(stream);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      idle = false;
    } else {
      check(error, "a communication kernel");
    }
  }
  return idle;
}

void CudaCommunicator::wait_until(const std::function<bool()>& done) {
  HostWait wait(config_.spin);
  while (!done()) {
    if (!wait.pause()) continue;
    check_peers();
    if (is_idle() && !done()) {
      throw std::runtime_error("communication kernels have ended without a word: a fault of commlib's");
    }
  }
}

void CudaCommunicator::wait_for(const std::function<bool()>& done) {
  wait_until(done);
  check_health();
}

void CudaCommunicator::wait_event(uintptr_t event) {
  check_can_wait();
  const OnDevice guard = on_device();
  wait_until([&] {
    const cudaError_t error = cudaEventQuery(reinterpret_cast<cudaEvent_t>(event));
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(error, "a communication kernel");
    return true;
  });
  if (load_word(&host_->failed) != 0) check_health();  // having been closed since is no failure
}

void CudaCommunicator::synchronize() {
  check_can_wait();
  const OnDevice guard = on_device();
  wait_for([&] { return is_idle(); });
  raise_trouble();
}

// However operations end: those that fail do so by their deadline.
void CudaCommunicator::drain() {
  const OnDevice guard = on_device();
  cudaStreamSynchronize(plan_stream_);
  cudaStreamSynchronize(shape_.stream);
}

// Ctrl-C makes the kernels leave their waits.
void CudaCommunicator::drain_unless_interrupted() {
  const OnDevice guard = on_device();
  wait_until([&] { return is_idle(); });
}

// By copies beside the kernels, which may be waiting for this very word.
void CudaCommunicator::announce_departure(const Departure& departure) {
  const OnDevice guard = on_device();
  for (int p = 0; p < peers_.size; ++p) {
    if (peers_.is_near(p)) put(peers_.signals_to(p).departed, departure.words, sizeof departure.words);
  }
  if (network_) announce_departure_far(departure);
}

// On each stream whose kernels tell other ranks of the slot, because these then write there.
// What this rank's operations queue until the lease ends also uses the slot: a plan beside them must not lend
// it before that is done.
void CudaCommunicator::prepare_slot(SlotLease& lease) {
  const OnDevice guard = on_device();
  auto& slots = static_cast<CudaSlotPool&>(*slots_);
  if (is_captured()) {  // whoever captures has waited for what was queued before
    cuda::keep_with_graph(shape_.stream, slots.reservation(lease.index()));
    return slots.wait_for_captured_uses(lease.index(), shape_.stream);
  }
  slots.wait_for_uses(lease.index(), shape_.stream);
  if (plan_stream_ == shape_.stream) return;
  slots.wait_for_uses(lease.index(), plan_stream_);
  lease.use_on(reinterpret_cast<uintptr_t>(shape_.stream));
}

// Comes after everything else that this rank does to others' memory.
void CudaCommunicator::has_closed() {
  watch_.reset();
  if (peers_.size == 0) return;  // it never connected
  const OnDevice guard = on_device();
  const uint64_t yes = 1;
  if (has_graphs_) put(&state_->closed, &yes, sizeof yes);
  for (int p : visitors_) put(&peers_.signals_to(p).detached, &yes, sizeof yes);
  shared_device_.reset();
}

}  // namespace commlib::cuda
