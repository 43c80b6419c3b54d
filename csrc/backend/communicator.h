// One rank of an expert-parallel group: what Python talks to, and what all backends have in common. The CPU's
// is in cpu/communicator.h, the one of CUDA GPUs in cuda/communicator.h.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "backend/failure.h"
#include "backend/slots.h"
#include "backend/team.h"
#include "base/home_process.h"
#include "base/waiting.h"
#include "base/words.h"
#include "heap/peer_processes.h"
#include "net/net_config.h"
#include "protocol/bounded.h"
#include "protocol/operations.h"

namespace commlib {

struct Config {
  int rank = 0;
  int size = 1;
  int64_t experts = 1;
  int64_t hidden = 1;
  int topk = 1;
  int64_t max_tokens = 1;
  int64_t capacity = 1;
  // Rows grouped by expert, padding included, for which a slot has room. 0: on no rank do such rows lie in a
  // slot. The same on all ranks, and 0 where there are several nodes.
  int64_t grouped_rows = 0;
  DType dtype = DType::f32;
  int slots = 2;
  int num_sms = 1;  // threads (CPU) or blocks (CUDA)
  double timeout = 60.0;
  double link_gbps = 0;        // emulated limit of this rank's link, in GB/s; 0: none
  NetConfig net;               // across nodes
  uint64_t first_epoch = 1;    // for tests: tagged words carry the lower half, which wraps around
  std::shared_ptr<Team> team;  // null: no other communicator gives up with this one
  InterruptCheck interrupted = nullptr;
  void (*let_go)() = nullptr;  // of what operations held that have ended; null: nothing is held longer
  // CPU
  SpinPolicy spin;
  std::string vector_ops;  // "": the widest
  std::vector<int> cores;  // that the pool's threads may run on; empty: any
  // CUDA
  int device = 0;
  uintptr_t stream = 0;  // of communication
  // Of plans; 0: the same. A different one only where each rank of this process finds an SM for its plan
  // beside those for all ranks' rows: see cuda/plan.cuh.
  uintptr_t plan_stream = 0;
  std::shared_ptr<void> stream_owner;  // keeps others from using either stream; null: the caller does
  std::string share;                   // how heaps reach other processes: "fd", "fabric" or "none"
};

// What a rank tells the others when they connect.
struct PeerAddress {
  int64_t pid;
  int fd;              // of the heap; -1: it has none
  int workers;         // of each operation: a channel between nodes has no more queues
  std::string handle;  // of a heap without an fd
  std::string net;     // for ranks on other nodes
};

// The rows a rank sends and where they came from. Addresses; nothing is owned.
struct Rows {
  const std::byte* x = nullptr;
  int64_t stride = 0;  // bytes from row to row
  int64_t count = 0;
  bool has_weights = false;            // on all ranks alike, also where there are no rows
  const std::byte* weights = nullptr;  // [count][topk]
  const std::byte* scales = nullptr;   // [count], scales_stride bytes apart, where the format has any
  int64_t scales_stride = 0;
  RowFormat format{};       // as they are sent: the same on all ranks
  Conversion conversion{};  // from what x is to that format, where the two differ
};

// The route plan, which a dispatch found and later operations use again.
struct RoutePlan {
  const int64_t* topk_idx = nullptr;  // [tokens][topk]
  int64_t* routes = nullptr;          // [tokens][width]
  int64_t* places = nullptr;          // [tokens][topk], layout="expert" only: see place_in_groups
  int64_t tokens = 0;
  int64_t rows = 0;                    // unique rows received
  int64_t* expand_to = nullptr;        // [rows][topk], layout="expert" only
  int64_t* offsets = nullptr;          // [own experts + 1], layout="expert" only
  int64_t* rows_per_expert = nullptr;  // [own experts]
  GroupShape shape{};                  // of groups; layout="expert" only
  // Of a bounded dispatch, else null. The host knows for how many rows there is room: `rows` is that, and
  // `results` the same for the rows that the caller gets; `most_rows` is how many rows the groups of any rank
  // may have, besides the padding of `padded` experts. [0]: how many unique rows there are; [1]: how many
  // rows were dropped here, grouped ones in layout="expert".
  int64_t* totals = nullptr;
  int64_t results = 0;
  int64_t most_rows = 0;
  int64_t padded = 0;

  bool is_grouped() const { return offsets != nullptr; }  // others may be empty
};

// Where received rows go.
struct Received {
  std::byte* rows = nullptr;
  bool rows_in_slot = false;     // they stay there, and `rows` is null
  std::byte* weights = nullptr;  // [rows][topk], or [grouped rows]
  int64_t* topk_idx = nullptr;   // [rows][topk] local ids; layout="rank"
  int64_t* source = nullptr;     // [rows][2], or [grouped rows][2]
  std::byte* scales = nullptr;   // as rows
  int64_t count = 0;             // of rows, along a known routing
  Weighing weighing{};           // of a redispatch
  bool zero_rest = false;        // of a bounded dispatch: see UnpackPlan
  // The same, where no stream orders what comes after: when all is done, so many words are copied there from
  // rows_per_expert on. Null: they are not.
  int64_t* groups = nullptr;
  int64_t groups_words = 0;
};

// A dispatch whose counts are known and whose rows have not moved yet or, in waves, may be moving. Until they
// move it has the turn: no other operation of the communicator is issued, because rows move in the order of
// epochs (see Signals::arrived).
struct PendingDispatch {
  std::shared_ptr<void> turn;  // dropped without finish_dispatch, it ends the communicator
  OpId id{};
  std::shared_ptr<SlotLease> lease;
  PlanReport plan{};
  int64_t rows = 0;              // unique
  int64_t results = 0;           // unique, or grouped with their padding
  bool grouped_in_slot = false;  // they come grouped
};

struct CombineInput {
  const std::byte* y = nullptr;
  int64_t count = 0;
  int64_t stride = 0;
  const std::byte* weights = nullptr;       // one for each row of y
  bool has_weight_grads = false;            // on all ranks alike
  const std::byte* weight_grads = nullptr;  // [rows][topk], or [grouped rows]
  const std::byte* bias = nullptr;
  int64_t bias_stride = 0;
  RowFormat format{};  // of y, bias and sums; no scales. Other rows than the communicator's: of `dtype`
  DType dtype{};
};

// Why a rank does nothing more, and whom to blame, as a mask: those on which it had given up, or else itself.
struct Absence {
  const char* why = nullptr;  // "exited": its process; "lost": the connection to it; or "departed"
  uint64_t blamed = 0;
};

inline void store_departure(uint64_t* departed, const Departure& departure) {
  for (int half = 0; half < 2; ++half) store_word(&departed[half], departure.words[half]);
}

class Network;
class NetworkMemory;
struct Job;
using Ticket = std::shared_ptr<Job>;  // of an asynchronous operation; null where a stream orders it (CUDA)
// Keeps the memory that an asynchronous operation uses alive until it is done. Where a stream orders
// operations (CUDA), the memory's stream orders its use too, and nothing need be held; but a CUDA graph holds
// it for as long as it may run. May go on any thread.
using Held = std::shared_ptr<void>;
// What goes with an operation that a backend is to run: where no stream orders what comes after, it keeps all
// of it until the operation is done.
struct Execution {
  bool async;  // CPU: return before it is done
  Held held;
  std::shared_ptr<SlotLease> lease;
  // Of a bounded dispatch that may not have run yet: check_routes before rows move.
  std::optional<RoutePlan> unchecked{};
  std::function<void()> when_done{};  // called once, when all workers have done their part; or empty
};

class Communicator {
 public:
  virtual ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual PeerAddress address() = 0;
  // Maps the others' heaps. Each rank keeps its heap until all have connected (a barrier of the caller's).
  void connect(const std::vector<PeerAddress>& peers);

  // Plans, sends counts and waits for every rank's; fills in routes, rows_per_expert and offsets, on a GPU
  // after it has returned. Checks ids before anything is sent: std::invalid_argument. CapacityError on all
  // ranks alike when one would receive more than `capacity` rows, unless `drop`. `in_waves`: rows go in the
  // order in which wait_expert may ask for them; needs expand_to, and ranks of one node. `grouped_in_slot`:
  // this rank's rows may come grouped by expert, and stay in their slot, if it has room for them. `caller`:
  // see Call. `format`: of the rows to come; std::invalid_argument where a slot has no room for them.
  std::unique_ptr<PendingDispatch> begin_dispatch(const RoutePlan& routing, bool has_weights, bool drop,
                                                  bool in_waves, bool grouped_in_slot = false,
                                                  uint8_t caller = 0, const RowFormat& format = {});
  // Moves the rows. `routing` now has expand_to where the layout wants it. On a CPU the ticket is already
  // done unless `async`.
  Ticket finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutePlan& routing,
                         const Received& received, bool async, Held held = nullptr);
  // Both in one, for which no rank's host waits: see protocol/bounded.h. What is wrong is told by a later
  // call, as is, unless `drop`, that rows had no room. `lease` receives the slot if rows stay in it.
  Ticket dispatch_bounded(const Rows& rows, const RoutePlan& routing, const Received& received, bool drop,
                          bool async, std::shared_ptr<SlotLease>* lease, Held held = nullptr,
                          uint8_t caller = 0);
  // Moves the rows of other tensors along a known routing; `lease` receives the slot if rows stay in it.
  // Where they are grouped by expert, std::invalid_argument unless it has room for them.
  Ticket redispatch(const Rows& rows, const RoutePlan& routing, const Received& received, bool async,
                    std::shared_ptr<SlotLease>* lease, Held held = nullptr, uint8_t caller = 0);
  Ticket combine(const CombineInput& input, const RoutePlan& routing, std::byte* out, std::byte* out_weights,
                 bool async, Held held = nullptr, uint8_t caller = 0);
  virtual void wait(const Ticket& ticket) = 0;
  // Of a dispatch in waves: the rows of one of this rank's experts, numbered from 0, are in place. CPU: when
  // it returns; throws the failure. CUDA: for what `stream` does next, also after a failure, which the next
  // call throws.
  virtual void wait_expert(const PendingDispatch& dispatch, const Ticket& ticket, int64_t expert,
                           uintptr_t stream) = 0;
  // CUDA: waits until the event, recorded on the communication stream, is done; throws the failure.
  virtual void wait_event(uintptr_t) { check_usable(); }
  // Waits until all operations issued are done; throws the failure.
  virtual void synchronize() = 0;
  // Throws if an operation has failed, or the communicator is closed. Does not wait.
  virtual void check_health() { check_usable(); }
  // Throws what was wrong with an earlier, bounded dispatch, if that is known by now: once.
  void raise_trouble();
  // A slot to write rows for combine into. `once`: good for one combine, which does not wait until other
  // ranks have read it.
  std::shared_ptr<SlotLease> lend_slot(bool once = true);

  // CUDA: work that `stream` has queued when a tensor at one of these addresses goes may still use it. Skips
  // addresses that are not the first row of a slot in use.
  void note_uses(const std::vector<uintptr_t>& addresses, uintptr_t stream);

  // Finishes what is under way, and tells the others. Then throws a failure that no call has reported yet, or
  // Interrupted. May be called twice. Does nothing in a forked child. In a signal handler that interrupted an
  // operation, ends the operation; the next call does the rest.
  void close();
  // After an error between two halves of an operation: the other ranks need not wait. They are told whom to
  // blame, which is this rank unless it knows better.
  void give_up(const std::string& why) { give_up(why, bit_of(config_.rank)); }
  void give_up(const std::string& why, uint64_t blamed) { leave(kGaveUp, blamed, why); }
  // Of the team's: leaves, and tells the ranks of this communicator only. Whether it had not left before.
  bool leave_alone(uint32_t how, uint64_t blamed, const std::string& why);
  // Whether this is the process that made it, and not a fork of that process.
  bool is_here() const { return home_.is_here(); }

  const Config& config() const { return config_; }
  const SlotLayout& layout() const { return layout_; }
  virtual void set_timeout(double seconds) { timeout_.store(seconds, std::memory_order_relaxed); }
  int slots_in_use() const;
  // Whether operations can be issued, as far as this rank knows. Unlike check_health, reports nothing.
  virtual bool is_usable() const;
  int64_t heap_bytes() const { return control_bytes() + config_.slots * layout_.bytes(); }
  virtual int64_t touched_bytes() = 0;

  // Whether a rank will never do anything again, as far as this one can see; or, if `departed_too`, nothing
  // more with this communicator. Once this communicator is closed, it may know of none. Any thread may ask.
  Absence absence_of(int rank, bool departed_too);
  // The stream of begin_dispatch, which the caller orders after the ids; 0: there are no streams.
  virtual uintptr_t plan_stream() const { return 0; }
  // To other nodes: null, or what the network counts.
  const Network* network() const { return network_.get(); }

 protected:
  explicit Communicator(const Config& config);

  // The wave in which rows for one of this rank's experts come; throws where there is no such expert.
  int wave_of_own(int64_t expert) const;

  // How a backend runs operations: as jobs of a pool of threads, or as kernels on a stream. What they are is
  // written once, in protocol/: run_plan, run_rows or run_waves, run_combine. The plan of a fresh dispatch
  // is waited for.
  virtual PlanReport execute_plan(const OpId& id, PlanOp op) = 0;
  virtual Ticket execute_rows(const OpId& id, const RowsOp& op, Execution execution) = 0;
  // Plan and rows of a bounded dispatch.
  virtual Ticket execute_bounded(const OpId& id, PlanOp plan, const RowsOp& rows, Execution execution) = 0;
  virtual Ticket execute_combine(const OpId& id, const CombineOp& op, Execution execution) = 0;
  // What was wrong with a bounded dispatch, if anybody has noticed that by now: once.
  virtual std::optional<Trouble> take_trouble() = 0;
  // What comes next, on the calling thread or in the stream, comes after every rank's pulls from the slot of
  // `call`, which is leased.
  virtual void await_pulls(Call call, const std::shared_ptr<SlotLease>& lease) = 0;
  // Of the CUDA graph in which operations are captured now; 0: in none. What is captured runs when the graph
  // does, as often as it does, and is numbered then.
  virtual uint64_t capture_id() const { return 0; }
  bool is_captured() const { return capture_id() != 0; }
  // The next plan comes after all operations issued before it.
  virtual void plan_after_all() = 0;
  // The next plan, for which the host waits, comes after those of bounded dispatches issued before it: counts
  // go out in the order of dispatches (see PeerTable::counts).
  virtual void plan_after_plans() = 0;
  // Throws std::invalid_argument for a routing, known to the caller, whose routes name rows that there are
  // not: other ranks' memory is written and read where it says. Where the host can read them.
  virtual void check_routes(const RoutePlan&) const {}

  // Waits until operations under way have given their slots back, however they end.
  virtual void drain() = 0;
  // The same; if the user wants out before that, either throws Interrupted or makes the operations end.
  virtual void drain_unless_interrupted() = 0;
  // The same; gives up for this reason before it throws Interrupted.
  void drain_or_give_up(const std::string& why);
  // Writes a word for every rank: this one has departed.
  virtual void announce_departure(const Departure& departure) = 0;
  // What a rank has announced here. Any thread may ask, also while another one closes.
  virtual Departure departure_of(int rank) = 0;
  // Lets go of slots that only what has ended still holds.
  virtual void collect_slots() = 0;
  // The slot has been taken, and is about to be shown to others.
  virtual void prepare_slot(SlotLease&) {}
  // Lets operations under way end, because the communicator is of no use any more.
  virtual void end_waits() {}
  // close() is through: nothing is under way, and everything but what the user still holds can go.
  virtual void has_closed() {}

  // The right to issue an operation, which one thread at a time has. Throws CommFailure where no operation
  // can be issued: in a forked child, in a signal handler that interrupted one, or see check_usable.
  class Issue {
   public:
    // Of an operation, which waits until a dispatch that has begun has moved its rows; or of a call that
    // belongs to that dispatch, or to none.
    enum class Of { operation, pending_dispatch };
    explicit Issue(Communicator& comm, Of of = Of::operation);
    ~Issue();
    Issue(const Issue&) = delete;
    Issue& operator=(const Issue&) = delete;

   private:
    void await_turn();
    void check_interrupt() const;

    Communicator& comm_;
    std::unique_lock<std::timed_mutex> lock_;
  };
  // The dispatch has the turn from the end of its first half to the end of its second.
  void begin_turn(PendingDispatch& dispatch);
  void end_turn(PendingDispatch& dispatch);
  // Throws unless this thread can wait for the operations of this communicator.
  void check_can_wait() const;

  // The heap of a rank of this node, as this rank reaches it; stays mapped.
  virtual std::byte* map_heap(int rank, const PeerAddress& address) = 0;
  // This rank's signals, if threads sleep on their event counts.
  virtual Signals* own_signals() { return nullptr; }
  // Every heap is mapped and peers_ complete.
  virtual void has_connected() {}

  // The heap: control words, then slots.
  int64_t control_bytes() const;
  int64_t count_words() const;  // that each source writes, at most
  void write_first_words(std::byte* control) const;
  // heaps: by rank; null: on another node.
  PeerTable table_of(const std::vector<std::byte*>& heaps) const;
  // Connects to ranks on other nodes, if any: all ranks' addresses are known.
  void make_network(std::unique_ptr<NetworkMemory> memory);
  void connect_network(const std::vector<PeerAddress>& peers, Signals* signals);
  void announce_departure_far(const Departure& departure);

  // Of rows of this format in a slot; std::invalid_argument where it has no room for them.
  SlotLayout layout_of(const RowFormat& format) const;
  // Whether rows of this routing are grouped by expert, and may lie so in slots.
  bool uses_places(const RoutePlan& routing) const {
    return routing.is_grouped() && layout_.grouped_rows > 0;
  }
  // Of sums: std::invalid_argument also where weights would have to be of another type.
  void check_sum_of(DType dtype) const;
  // std::invalid_argument where a slot cannot take as many rows grouped by expert.
  void check_room_for_groups(const RoutePlan& routing, int64_t rows) const;
  void check_usable() const;
  [[noreturn]] void refuse(const std::string& why) const;
  // The communicator is of no use from here on; the first reason counts. Its team gives up with it.
  void leave(uint32_t how, uint64_t blamed, const std::string& why);
  [[noreturn]] void raise(const FailureRecord& record);
  std::string what_is_bad(int64_t index, int64_t id) const;  // of an expert id, into topk_idx
  // A combine's results must not lie where other ranks pull rows from.
  void check_out(const std::byte* out) const;
  // Before an operation is issued: see check_health and raise_trouble.
  void check_ready();
  [[noreturn]] void raise_overflow(int64_t rank, int64_t rows) const;
  std::shared_ptr<SlotLease> take_slot();
  // The slot that combine pulls from: y's, if y lies in one in the order received, else a free one.
  struct CombineSlot {
    std::shared_ptr<SlotLease> lease;
    bool in_place;
    bool users_rows;  // the slot holds a tensor of the user's
  };
  CombineSlot combine_slot(const CombineInput& input, const RoutePlan& routing, const SlotLayout& layout);

  void keep_near();
  // What a backend makes of an operation that has its number.
  template <class Execute>
  auto issued(Execute execute) -> decltype(execute());
  // The next operation. Its epoch is 0 where it is captured: it has none before it runs.
  OpId next_op(Call call, const SlotLease& lease, const RowFormat& format);
  PlanOp plan_op(const RoutePlan& routing, const SlotLease& lease, bool drop) const;
  RowsOp rows_op(const Rows& rows, const RoutePlan& routing, const Received& received,
                 const SlotLease& lease) const;
  SendPlan send_plan(const Rows& rows, const RoutePlan& routing) const;
  UnpackPlan unpack_plan(const RoutePlan& routing, const Received& received, const SlotLease& lease) const;
  LocalSumPlan local_sum_plan(const CombineInput& input, const RoutePlan& routing,
                              const CombineSlot& slot) const;
  PullPlan pull_plan(const CombineInput& input, const RoutePlan& routing, const LocalSumPlan& local_sum,
                     std::byte* out, std::byte* out_weights) const;

  const Config config_;
  const Placement placement_;
  const int width_;
  std::vector<uint8_t> owner_;  // by expert
  const SlotLayout layout_;
  // Set by the backend, once it has a heap. Loaded and stored whole: any thread may ask slots_in_use().
  std::shared_ptr<SlotPool> slots_;
  std::unique_ptr<Network> network_;  // null: all ranks share a node
  PeerTable peers_{};
  // Of ranks of this node. Loaded and stored whole, because any thread may ask absence_of().
  std::shared_ptr<const PeerProcesses> processes_;
  std::atomic<double> timeout_;

  const HomeProcess home_;
  // Set when the communicator is of no use any more (release): its operations read it where they begin and
  // where they wait (acquire), and end. Never reset.
  std::atomic<bool> gave_up_{false};
  // The user has stopped waiting for operations under way (Ctrl-C): close() does not wait for others either.
  std::atomic<bool> interrupted_{false};

  std::timed_mutex issue_mutex_;  // guards the members below it: operations are issued one at a time
  uint64_t epoch_;                // of the operation issued last; graphs' operations are not among them
  uint64_t near_epoch_;           // of the last plan that came after all operations before it

 private:
  // The turn, while a dispatch has it, and the thread that began that dispatch. Guarded by issue_mutex_.
  std::optional<std::weak_ptr<void>> turn_;
  std::thread::id turn_of_;
  std::condition_variable_any turn_ended_;

  bool is_issuing_here() const {
    return issuer_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }

  // The thread that has issue_mutex_. Orders nothing: a thread asks only whether it is that one.
  std::atomic<std::thread::id> issuer_{};
  mutable std::mutex broken_mutex_;  // guards broken_, which threads of the backend set as well
  std::string broken_;
  std::atomic<bool> closed_{false};
};

}  // namespace commlib
