// The CUDA worker: one warp. protocol/worker.h says what its members mean; what they do with rows is in
// worker_rows.cuh.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/state.h"
#include "cuda/sum.cuh"

namespace commlib::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint64_t kLookNs = 5'000'000;  // between two looks at why a wait does not end

// A warp's shared memory. The ring comes first, because bulk copies want their alignment.
struct WarpShared {
  static constexpr int kBarriers = 8;
  static constexpr int kListBytes = (kMaxTopk + 1) * static_cast<int>(sizeof(Term));
  static constexpr int kWeightBytes = (kMaxTopk + 1) * static_cast<int>(sizeof(double));

  __host__ __device__ static constexpr int bytes(int ring_bytes) {
    return ring_bytes + static_cast<int>(align_up(kBarriers * 8 + kListBytes + kWeightBytes, 128));
  }
  // Stages of the ring in a sum, of `stage_bytes` bytes each.
  __host__ __device__ static constexpr int sum_stages(int ring_bytes, int stage_bytes) {
    return ring_bytes / stage_bytes < kBarriers ? ring_bytes / stage_bytes : kBarriers;
  }
  std::byte* ring;
  uint64_t* barriers;  // [kBarriers], one for each stage of the ring
  std::byte* list;     // Terms or Targets
  std::byte* weights;  // the values of the Terms' weights, as accumulators
};

// 16-byte pieces of a row that each lane sums at once; half of them where registers are short.
constexpr int kSumPieces = 4;

// What the warps of a block share; it lies before what each of them has.
struct BlockShared {
  uint64_t answer;     // one thread's, for all; two barriers of the block around it
  OpId id;             // of the operation; this and the next are written before the block begins
  uint64_t last_pull;  // from the slot that this rank lends: see Sequence
  uint32_t counted;    // of a plan: the same
  Lent lent;           // for collect_calls
};
constexpr int kBlockSharedBytes = 128;
static_assert(sizeof(BlockShared) <= kBlockSharedBytes);

__device__ inline BlockShared& block_shared() {
  return *reinterpret_cast<BlockShared*>(ptx::dynamic_shared());
}

// An outbox is larger than what is ever in it, unless the network's thread stands still: then the operation
// fails at its deadline.
__device__ inline void post_to(const OpParams& op, const Outbox& box, const Post& post) {
  const uint64_t ticket = ptx::add_acq_rel_gpu(box.tickets, 1);
  OutboxEntry& entry = box.entries[ticket % box.size];
  while (ptx::load_acquire_sys(&entry.turn) != ticket) {
    if (ptx::load_acquire_gpu(&op.state->failed) != 0) return;
    ptx::nanosleep(100);
  }
  entry.post = post;
  ptx::store_release_sys(&entry.turn, ticket + 1);
}

// Why a wait does not end, off the hot path: out of line, and without a worker, which so stays in registers.
struct WaitingLane {
  const OpParams& op;

  __device__ uint64_t read(const uint64_t* word) const { return ptx::load_acquire_sys(word); }
  __device__ void publish(uint64_t* word, uint64_t value) const { ptx::store_release_sys(word, value); }
  __device__ bool replace(uint64_t* word, uint64_t before, uint64_t after) const {
    return ptx::exchange_if_gpu(word, before, after) == before;
  }
  __device__ void post(const Outbox& box, const Post& post) const { post_to(op, box, post); }
};

// The first warp to give up tells the host why, and the other ranks that it did.
[[gnu::noinline]] __device__ inline void fail(const OpParams& op, FailureRecord* record, uint64_t start) {
  if (ptx::exchange_if_gpu(&op.state->failed, 0, 1) != 0) return;
  record->waited_ns = ptx::globaltimer() - start;
  op.host->record = *record;
  ptx::store_release_sys(&op.host->failed, 1);
#pragma unroll 1
  for (int p = 0; p < op.peers.size; ++p) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      ptx::store_release_sys(&op.peers.signals_to(p).departed[half],
                             tagged_half(kGaveUp, record->blamed, half));
    }
  }  // and the host tells those on other nodes, when it raises
}

// Whether a wait for some ranks is to be given up; `for_good`: records why.
[[gnu::noinline]] __device__ inline bool gives_up(const OpParams& op, uint64_t awaited, Phase phase,
                                                  uint64_t start, bool for_good) {
  if (ptx::load_acquire_gpu(&op.state->failed) != 0) return true;
  WaitingLane w{op};
  const OpId& id = block_shared().id;
  FailureRecord record{};
  // Read first: what a rank said before it was lost is there by then.
  const uint64_t gone = ptx::load_acquire_sys(&op.host->lost);
  if (!find_cause(w, op.peers, id, awaited, phase, &record)) {
    const uint64_t lost = missed_of(w, op.peers, id, gone, awaited);
    const uint64_t abort = ptx::load_acquire_sys(&op.host->abort);
    if (!lost && !abort && ptx::globaltimer() - start < ptx::load_acquire_sys(&op.host->timeout_ns))
      return false;
    const Cause cause = lost ? Cause::lost : static_cast<Cause>(tag_of(abort));
    const uint64_t blamed = lost ? lost : bit_of(static_cast<int>(value_of(abort)));
    record = lost || abort ? new_record(w, op.peers, id, cause, awaited, blamed, phase)
                           : timeout_record(w, op.peers, id, awaited, phase);
  }
  if (for_good) fail(op, &record, start);
  return true;
}

// See announce_wait. A function of its own: gives_up has no registers left for it in a plan.
[[gnu::noinline]] __device__ inline void announce_wait_of(const OpParams& op, uint64_t awaited,
                                                          uint64_t start) {
  WaitingLane w{op};
  const uint64_t half = ptx::load_acquire_sys(&op.host->timeout_ns) / 2;
  announce_wait(w, op.peers, block_shared().id, awaited, ptx::globaltimer() - start >= half);
}

[[gnu::noinline]] __device__ inline void fail_by_mismatch(const OpParams& op, int peer) {
  WaitingLane w{op};
  FailureRecord record = mismatch_record(w, op.peers, block_shared().id, peer);
  fail(op, &record, ptx::globaltimer());
}

[[gnu::noinline]] __device__ inline void fail_by_malformed(const OpParams& op, int peer, Phase phase) {
  WaitingLane w{op};
  FailureRecord record = malformed_record(w, op.peers, block_shared().id, peer, phase);
  fail(op, &record, ptx::globaltimer());
}

enum class Does : uint8_t { plan, wait, move_rows };

// One thread of a block begins the operation for all. False: it is not to run, because an earlier one has
// failed, or the communicator is closed. No other may be moving rows: a kernel that the host launches follows
// all others in its stream, but a graph may be launched anywhere.
[[gnu::noinline]] __device__ inline bool begin(const OpParams& op, Does does) {
  DeviceSequence& sequence = op.state->sequence;
  OpId& id = block_shared().id;
  const uint64_t ended = ptx::load_acquire_gpu(&sequence.ended);
  const uint64_t last = sequence.refused > ended ? sequence.refused : ended;
  id = {op.call, op.number == 0 ? last + 1 : op.number + sequence.replayed, op.format};
  block_shared().last_pull = sequence.last_pull[op.call.slot];
  if (does == Does::plan) block_shared().counted = sequence.counted;
  if (does == Does::wait) id.epoch = block_shared().last_pull;  // it waits for that operation's pulls
  if (ptx::load_acquire_gpu(&op.state->failed) != 0 || op.state->closed != 0) return false;
  // In a graph, plan and rows of a dispatch follow each other, and the plan begins for both.
  const bool planned = op.number == 0 && op.call.has(kCallBounded);
  if (does != (planned ? Does::plan : Does::move_rows) || blockIdx.x != 0) return true;
  if (ptx::exchange_if_gpu(&sequence.begun, ended, id.epoch) == ended) return true;
  WaitingLane w{op};
  const uint64_t me = bit_of(op.peers.rank);
  FailureRecord record = new_record(w, op.peers, id, Cause::overlap, me, me, Phase::call);
  fail(op, &record, ptx::globaltimer());
  return false;
}

class WarpWorker {
 public:
  static constexpr bool kMetadataWithRows = true;
  static constexpr bool kInternode = false;
  static constexpr bool kPlansGroups = false;
  static constexpr bool kBoundsPlans = false;
  static constexpr bool kConverts = false;

  __device__ explicit WarpWorker(const OpParams& op) : op_(op) {
    lane_ = static_cast<int>(threadIdx.x % kWarpLanes);
    warp_ = static_cast<int>(threadIdx.x / kWarpLanes);
    std::byte* base = ptx::dynamic_shared() + kBlockSharedBytes + warp_ * WarpShared::bytes(op.ring_bytes);
    shared_.ring = base;
    shared_.barriers = reinterpret_cast<uint64_t*>(base + op.ring_bytes);
    shared_.list = base + op.ring_bytes + WarpShared::kBarriers * 8;
    shared_.weights = shared_.list + WarpShared::kListBytes;
    if (lane_ < WarpShared::kBarriers) ptx::mbarrier_init(&shared_.barriers[lane_]);
    ptx::fence_mbarrier_init();
    __syncwarp();
  }

  // Begins the operation, unless it is not to run. All threads.
  __device__ bool begin(Does does) const {
    if (threadIdx.x == 0) block_shared().answer = cuda::begin(op_, does);
    return answer_for_block();
  }
  __device__ OpId id() const { return block_shared().id; }
  __device__ uint64_t last_pull() const { return block_shared().last_pull; }
  __device__ void pulls_from_slot(const OpId& id) const {
    if (lane_ == 0) op_.state->sequence.last_pull[id.call.slot] = id.epoch;
  }
  __device__ uint32_t counted() const { return block_shared().counted; }
  __device__ void has_counted(uint32_t number) const {
    op_.state->sequence.counted = block_shared().counted = number;
  }
  __device__ void ended(const OpId& id) const {
    if (lane_ != 0) return;
    DeviceSequence& sequence = op_.state->sequence;
    if (op_.number == 0) ++sequence.replayed;
    ptx::store_relaxed_gpu(&sequence.ended, id.epoch);
  }

  // Warps with neighbouring numbers lie on different SMs, so that even little work uses all SMs.
  __device__ int index() const { return warp_ * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); }
  __device__ int count() const { return static_cast<int>(blockDim.x / kWarpLanes * gridDim.x); }
  __device__ int lane() const { return lane_; }
  __device__ static constexpr int lanes() { return kWarpLanes; }
  __device__ int warp() const { return warp_; }
  __device__ Span share(int64_t n) const { return share_of(n, index(), count()); }
  __device__ Lent* lent() const { return &block_shared().lent; }

  template <class T, class F>
  __device__ List<T> list(int n, F f);
  __device__ bool all(bool ok) const {
    ok = __all_sync(kAllLanes, ok);
    __syncwarp();              // a vote does not order memory
    ptx::fence_proxy_async();  // so that bulk copies see it as well
    return ok;
  }
  __device__ uint64_t any_bits(uint64_t mask) const {
    for (int step = 16; step > 0; step /= 2) mask |= __shfl_sync(kAllLanes, mask, lane_ ^ step);
    return mask;
  }
  __device__ int64_t lowest(int64_t value) const {
    for (int step = 16; step > 0; step /= 2) {
      const int64_t other = __shfl_sync(kAllLanes, value, lane_ ^ step);
      value = other < value ? other : value;
    }
    return value;
  }
  __device__ Prefix prefix(int64_t value) const {
    int64_t with = value;
    for (int step = 1; step < kWarpLanes; step *= 2) {
      const int64_t below = __shfl_sync(kAllLanes, with, lane_ < step ? lane_ : lane_ - step);
      if (lane_ >= step) with += below;
    }
    return {with - value, __shfl_sync(kAllLanes, with, kWarpLanes - 1)};
  }
  __device__ uint32_t take(bool mine, uint32_t* counter) const {
    const unsigned takers = __ballot_sync(kAllLanes, mine);
    return take_as(takers, counter, lane_ == 0);
  }
  __device__ uint32_t take_each(int32_t key, uint32_t* counters) const {
    const unsigned takers = __match_any_sync(kAllLanes, key);
    // Lanes without a key read some counter, and none of them writes.
    return take_as(takers, &counters[key < 0 ? 0 : key], key >= 0 && lane_ == __ffs(takers) - 1);
  }

  template <class F>
  static __device__ void will_read(int, F) {}  // others hide the latency of memory
  __device__ void multicast(List<Target> to, const std::byte* src, int64_t bytes);
  template <class T, int kUnroll, bool kParts>
  __device__ void sum(std::byte* dst, List<Term> terms, int64_t elements);
  __device__ void weigh(DType t, std::byte* dst, const Term& term, const std::byte* y, int64_t elements,
                        std::byte* dot);
  __device__ void zero(std::byte* dst, int64_t bytes) const;
  // Each lane's bulk copies are complete, and its ordinary stores stay before bulk copies of other threads
  // that acquire what is released next; the barrier passes both on to whichever lane releases.
  __device__ void flush() const {
    ptx::bulk_wait_written();
    ptx::fence_proxy_async();
    __syncwarp();
  }

  __device__ static bool meet(bool ok) { return __syncthreads_and(ok) != 0; }
  // One warp speaks for its block, because each that does pays for a system-wide fence. That fence orders
  // what the others have written before the block's barrier like its own writes.
  __device__ int gather() const {
    flush();
    __syncthreads();
    return warp_ == 0 ? kWarps : 0;
  }
  // A warp that fails says so in `failed` before it comes to the barrier of gather().
  __device__ bool spoken_for_failed() const { return ptx::load_acquire_gpu(&op_.state->failed) != 0; }
  // One warp asks for its block; all() makes what it has acquired good for the bulk copies of the others.
  template <class Ask>
  __device__ bool once(Ask ask) const {
    if (warp_ == 0) {
      const bool ok = ask();
      if (lane_ == 0) block_shared().answer = ok;
    }
    return all(answer_for_block());
  }

  __device__ bool throttled() const { return op_.throttle.fs_per_byte != 0; }
  __device__ void pass_throttle(int64_t bytes) const {
    if (lane_ == 0) {
      uint64_t free = ptx::load_acquire_gpu(&op_.state->throttle_free), end;
      const uint64_t now = ptx::globaltimer();
      for (;;) {
        end = op_.throttle.end_of(bytes, now, free);
        const uint64_t before = ptx::exchange_if_gpu(&op_.state->throttle_free, free, end);
        if (before == free) break;
        free = before;
      }
      while (ptx::globaltimer() < end) ptx::nanosleep(100);
    }
    __syncwarp();
  }

  __device__ void publish(uint64_t* word, uint64_t value) const { ptx::store_release_sys(word, value); }
  __device__ uint64_t read(const uint64_t* word) const { return ptx::load_acquire_sys(word); }
  __device__ void store_relaxed(uint64_t* word, uint64_t value) const { ptx::store_relaxed_sys(word, value); }
  __device__ static uint64_t load_relaxed(const uint64_t* word) { return ptx::load_relaxed_sys(word); }
  __device__ uint64_t* counter(int i) const { return &op_.state->counters[i]; }
  // The fence is system-wide, although the counter is this GPU's: what this warp's block has written to other
  // GPUs must be there before the last of the blocks tells them.
  __device__ static bool completes(uint64_t* counter, uint64_t n, uint64_t all) {
    ptx::fence_acq_rel_sys();
    if (ptx::add_acq_rel_gpu(counter, n) + n != all) return false;
    ptx::store_relaxed_gpu(counter, 0);
    return true;
  }
  __device__ void notify(const Signals&) const {}
  __device__ void post(const Outbox& box, const Post& post) const { post_to(op_, box, post); }
  __device__ void add_relaxed(uint32_t* counter, int n) const {
    ptx::add_relaxed_gpu(counter, static_cast<uint32_t>(n));
  }
  __device__ static void copy_scalar(std::byte* dst, const std::byte* src, int64_t bytes) {
    if (bytes == 4) {
      *reinterpret_cast<uint32_t*>(dst) = src ? *reinterpret_cast<const uint32_t*>(src) : 0;
    } else {
      *reinterpret_cast<uint64_t*>(dst) = src ? *reinterpret_cast<const uint64_t*>(src) : 0;
    }
  }

  template <class Ready, class Late>
  __device__ bool await(Ready ready, int peer, Late late, Phase phase) const;
  __device__ bool await_tag(const uint64_t* word, uint32_t tag, int peer, Phase phase) const {
    return await([=] { return tag_of(ptx::load_acquire_sys(word)) == tag; }, peer,
                 [=] { return bit_of(peer); }, phase);
  }
  __device__ bool await_change(const Internode& internode, uint64_t seen, uint64_t ranks) const {
    const uint64_t* progress = internode.progress;
    return all(await([=] { return ptx::load_acquire_sys(progress) != seen; }, 0, [=] { return ranks; },
                     Phase::network));
  }
  __device__ bool mismatch(int peer) const {
    fail_by_mismatch(op_, peer);
    return false;
  }
  __device__ void malformed(int peer, Phase phase) const { fail_by_malformed(op_, peer, phase); }

 protected:
  // What one thread of the block has written there.
  __device__ static bool answer_for_block() {
    __syncthreads();
    const bool answer = block_shared().answer != 0;
    __syncthreads();  // no thread comes back and overwrites it before all have read it
    return answer;
  }
  // Lanes of `takers` get *counter + 0, 1, ...; the lane with `writes` writes the sum.
  __device__ uint32_t take_as(unsigned takers, uint32_t* counter, bool writes) const {
    const uint32_t before = *counter;
    __syncwarp();
    if (writes) *counter = before + static_cast<uint32_t>(__popc(takers));
    __syncwarp();
    return before + static_cast<uint32_t>(__popc(takers & ((1u << lane_) - 1)));
  }

  __device__ bool all_aligned(uintptr_t bits) const;
  __device__ void bulk_multicast(Target mine, const std::byte* src, int64_t bytes);
  __device__ void plain_multicast(List<Target> to, const std::byte* src, int64_t bytes) const;
  template <class T>
  __device__ void element_multicast(List<Target> to, const std::byte* src, int64_t bytes) const;
  template <class T>
  __device__ void weigh_as(std::byte* dst, const Term& term, const std::byte* y, int64_t elements,
                           std::byte* dot);
  template <class T>
  __device__ Accumulator<T> bulk_weigh(std::byte* dst, const Term& term, const std::byte* y, int bytes);
  template <class T>
  __device__ bool gather_weights(List<Term> terms, bool parts) const;
  template <class Sums>
  __device__ void sum_as(std::byte* dst, List<Term> terms, int bytes);
  template <class Sums>
  __device__ void bulk_sum(std::byte* dst, List<Term> terms, int bytes);
  template <class Sums>
  __device__ void plain_sum(std::byte* dst, List<Term> terms, int bytes) const;

  // The ring's stages are taken in turn, and each mbarrier flips its phase each time round.
  struct Turn {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next(int stages) {
      if (++stage < stages) return;
      stage = 0;
      parity ^= 1;
    }
  };
  __device__ void await_ring(Turn turn) const {
    while (!ptx::mbarrier_try_wait(&shared_.barriers[turn.stage], turn.parity)) {
    }
  }
  __device__ void load_into_ring(int stage, int stage_bytes, const std::byte* src, int64_t bytes) const {
    uint64_t* barrier = &shared_.barriers[stage];
    ptx::mbarrier_expect(barrier, static_cast<uint32_t>(bytes));
    ptx::bulk_load(shared_.ring + stage * stage_bytes, src, static_cast<uint32_t>(bytes), barrier);
  }

  template <class Ready, class Late>
  __device__ bool await_long(Ready ready, Late late, Phase phase, uint64_t start) const;

  const OpParams& op_;
  WarpShared shared_;
  int lane_, warp_;
  Turn turn_;
};

template <class Ready, class Late>
__device__ bool WarpWorker::await(Ready ready, int, Late late, Phase phase) const {
  if (ready()) return true;
  const uint64_t start = ptx::globaltimer();
  const bool ok = await_long(ready, late, phase, start);
  if (ok && ptx::globaltimer() - start >= kLookNs) announce_wait_of(op_, 0, start);
  return ok;
}

template <class Ready, class Late>
__device__ bool WarpWorker::await_long(Ready ready, Late late, Phase phase, uint64_t start) const {
  uint64_t next_look = start + kLookNs;
  for (;;) {
#pragma unroll 1
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
    }
    ptx::nanosleep(100);
    const uint64_t now = ptx::globaltimer();
    if (now < next_look) continue;
    next_look = now + kLookNs;
    const uint64_t awaited = late();
    if (awaited == 0) continue;  // it has come meanwhile
    if (!gives_up(op_, awaited, phase, start, false)) {
      announce_wait_of(op_, awaited, start);
      continue;
    }
    if (ready()) return true;  // a departed rank did its part before it said so
    // The reason may no longer hold: from another node, word that a rank has departed may come before what
    // it did. No wait is given up without a record.
    if (gives_up(op_, awaited, phase, start, true)) return false;
  }
}

// Lanes evaluate f side by side; a ballot closes the gaps. The barriers keep the list from being overwritten
// while lanes still read the one before, and make it whole before they read it.
template <class T, class F>
__device__ List<T> WarpWorker::list(int n, F f) {
  static_assert(sizeof(T) <= sizeof(Term));
  T* items = reinterpret_cast<T*>(shared_.list);
  int kept = 0;
  __syncwarp();
  for (int first = 0; first < n; first += kWarpLanes) {
    const int j = first + lane_;
    T item{};
    if (j < n) item = f(j);
    const bool keep = static_cast<bool>(item);
    const unsigned keepers = __ballot_sync(kAllLanes, keep);
    if (keep) items[kept + __popc(keepers & ((1u << lane_) - 1))] = item;
    kept += __popc(keepers);
  }
  __syncwarp();
  return {items, kept};
}

// Plans of groups. They have a kernel of their own, too, which needs more registers.
class GroupPlanWorker : public WarpWorker {
 public:
  using WarpWorker::WarpWorker;
  static constexpr bool kPlansGroups = true;
};

// Of bounded plans, whatever the layout.
class BoundedPlanWorker : public GroupPlanWorker {
 public:
  using GroupPlanWorker::GroupPlanWorker;
  static constexpr bool kBoundsPlans = true;
};

// Where there are ranks on other nodes. It has kernels of its own, so that those for one node stay small.
class InternodeWorker : public WarpWorker {
 public:
  using WarpWorker::WarpWorker;
  static constexpr bool kInternode = true;
};

// Adds rows of T.
template <class T, class Base>
class SumWorker : public Base {
 public:
  using Base::Base;
  __device__ void reduce(DType, std::byte* dst, List<Term> terms, int64_t elements) {
    constexpr bool kParts = !Base::kInternode;  // between nodes no slot is grouped
    this->template sum<T, Base::kInternode ? kSumPieces / 2 : kSumPieces, kParts>(dst, terms, elements);
  }
};

}  // namespace commlib::cuda
