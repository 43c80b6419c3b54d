// One rank of an expert-parallel group on the CPU: its heap, its slots, its pool, and the operations on them.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/pool.h"
#include "cpu/slots.h"
#include "cpu/worker.h"
#include "heap/symmetric_heap.h"
#include "protocol/combine.h"
#include "protocol/counts.h"

namespace commlib {

struct Config {
  int rank = 0;
  int size = 1;
  int64_t experts = 1;
  int64_t hidden = 1;
  int topk = 1;
  int64_t max_tokens = 1;
  int64_t capacity = 1;
  DType dtype = DType::f32;
  int slots = 2;
  int workers = 1;
  double timeout = 60.0;
  SpinPolicy spin;
  std::string vector_ops;    // "": the widest
  uint32_t first_epoch = 1;  // for tests of the wrap-around
  InterruptCheck interrupted = nullptr;
};

// What a rank tells the others when they connect.
struct PeerAddress {
  int64_t pid;
  int fd;
  int workers;
};

// The rows a rank sends and where they came from. Addresses; nothing is owned.
struct Rows {
  const std::byte* x = nullptr;
  int64_t stride = 0;  // bytes from row to row
  int64_t count = 0;
  bool has_weights = false;            // on all ranks alike, also where there are no rows
  const std::byte* weights = nullptr;  // [count][topk]
};

// Routing that a dispatch found, and that later operations use again.
struct RoutingView {
  const int64_t* topk_idx = nullptr;  // [tokens][topk]
  int64_t* routes = nullptr;          // [tokens][width]
  int64_t tokens = 0;
  int64_t rows = 0;                          // unique rows received
  int64_t* places = nullptr;                 // [rows][topk], layout="expert" only
  const int64_t* offsets = nullptr;          // [own experts + 1], layout="expert" only
  const int64_t* rows_per_expert = nullptr;  // [own experts], layout="expert" only
};

// Where received rows go.
struct Received {
  std::byte* rows = nullptr;     // null: they stay in the slot
  std::byte* weights = nullptr;  // [rows][topk], or [grouped rows]
  int64_t* topk_idx = nullptr;   // [rows][topk] local ids; layout="rank"
  int64_t* source = nullptr;     // [rows][2], or [grouped rows][2]
};

// A dispatch whose counts are known and whose rows have not moved yet.
struct PendingDispatch {
  uint32_t epoch = 0;
  Call call;
  std::shared_ptr<SlotLease> lease;
  std::vector<int64_t> source_rows;      // [ranks]
  std::vector<int64_t> rows_per_expert;  // [own experts]
  std::vector<uint8_t> slots;            // [ranks]
  int64_t rows = 0;
  int64_t dropped = 0;  // of this rank's (token, rank) pairs
};

struct CombineInput {
  const std::byte* y = nullptr;
  int64_t stride = 0;
  const std::byte* weights = nullptr;       // one for each row of y
  bool has_weight_grads = false;            // on all ranks alike
  const std::byte* weight_grads = nullptr;  // [rows][topk], or [grouped rows]
  const std::byte* bias = nullptr;
  int64_t bias_stride = 0;
};

using Ticket = std::shared_ptr<Job>;

class Communicator {
 public:
  explicit Communicator(const Config& config);  // makes this rank's heap
  ~Communicator();

  PeerAddress address() const;
  // Maps the others' heaps. All ranks keep theirs until all have connected (a barrier of the caller's).
  void connect(const std::vector<PeerAddress>& peers);

  // Plans, sends counts and waits for everyone's. Checks ids before anything is sent: std::invalid_argument.
  // CapacityError on all ranks alike when one would receive more than `capacity` rows, unless `drop`.
  std::unique_ptr<PendingDispatch> begin_dispatch(const RoutingView& routing, bool has_weights, bool drop);
  // Moves the rows. `routing` now has places where the layout wants them. A ticket, done already unless
  // `async`.
  Ticket finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutingView& routing,
                         const Received& received, bool async);
  // The rows of other tensors along a known routing; `lease` receives the slot where rows stay in it.
  Ticket redispatch(const Rows& rows, const RoutingView& routing, const Received& received, bool async,
                    std::shared_ptr<SlotLease>* lease);
  Ticket combine(const CombineInput& input, const RoutingView& routing, std::byte* out,
                 std::byte* out_weights, bool async);
  void wait(const Ticket& ticket) { pool_->wait(*ticket); }

  // A slot to write rows for combine into.
  std::shared_ptr<SlotLease> lend_slot();
  std::shared_ptr<BufferPool> buffers() const { return buffers_; }

  // Finishes what is under way, and tells the others. May be called twice.
  void close();
  // After an error between two halves of an operation: the others need not wait.
  void give_up(const std::string& why);

  const Config& config() const { return config_; }
  const SlotLayout& layout() const { return layout_; }
  void set_timeout(double seconds) { timeout_.store(seconds, std::memory_order_relaxed); }
  const char* vector_ops_name() const { return ops_->name; }
  int slots_in_use() { return slots_->in_use(); }
  size_t heap_bytes() const { return region_->bytes(); }
  size_t touched_bytes() const { return region_->touched_bytes(); }

  // For benchmarks: one worker's send_rows or pull_rows and nothing else, over the routing of a dispatch
  // whose slots are not in use. The machine's own limit for this routing and these stores.
  void bare_send(const Rows& rows, const RoutingView& routing);
  void bare_pull(const RoutingView& routing, std::byte* out);

 private:
  struct Transfer;

  PeerTable table_of(const std::vector<std::shared_ptr<Region>>& regions) const;
  int64_t control_bytes() const;
  std::shared_ptr<OpContext> context(Call call, uint32_t epoch) const;
  std::shared_ptr<SlotLease> take_slot(Call call);
  StagePlan stage_plan(const CombineInput& input, const RoutingView& routing, const SlotLease& lease,
                       bool in_place) const;
  SendPlan send_plan(const Rows& rows, const RoutingView& routing) const;
  PullPlan pull_plan(const RoutingView& routing, std::byte* out) const;
  uint32_t announce(Call call);
  std::vector<uint64_t> next_arrivals();
  Ticket start(std::shared_ptr<Job> job, bool async);
  Ticket start_transfer(std::shared_ptr<Transfer> transfer, bool async);
  [[noreturn]] void raise(OpContext& op);
  void check_usable() const;
  void leave(uint32_t how, int blamed, const std::string& why);

  Config config_;
  Placement placement_;
  int width_;
  std::vector<uint8_t> owner_;  // by expert
  SlotLayout layout_;
  const VectorOps* ops_;
  std::vector<std::shared_ptr<Region>> regions_;  // by rank
  std::shared_ptr<Region> region_;                // this rank's
  PeerTable peers_{};
  std::unique_ptr<PeerProcesses> processes_;
  std::vector<int> workers_;  // by rank
  std::shared_ptr<SlotPool> slots_;
  std::shared_ptr<BufferPool> buffers_;
  std::unique_ptr<WorkerPool> pool_;
  std::atomic<double> timeout_;

  std::mutex issue_mutex_;  // guards the members below it: operations are issued one at a time
  uint32_t epoch_;
  uint32_t dispatches_;
  uint64_t moves_ = 0;  // operations that moved rows

  mutable std::mutex broken_mutex_;  // guards broken_, which jobs of the pool set as well
  std::string broken_;
  std::atomic<bool> closed_{false};
};

}  // namespace commlib
