// What the kernels of one communicator share: with each other in device memory, with the host in mapped
// memory.
#pragma once

#include "protocol/combine.h"
#include "protocol/counts.h"
#include "protocol/failure.h"
#include "protocol/unpack.h"
#include "protocol/waves.h"

namespace commlib::cuda {

constexpr int kWarpLanes = 32;
constexpr int kWarps = 16;  // workers of a block
constexpr int kThreads = kWarps * kWarpLanes;
// Warps of a plan's one block, which should find room beside another block on its SM.
constexpr int kPlanWarps = 6;

// How a dispatch's counts came out.
enum class PlanStatus : uint64_t { placed = 0, bad_id = 1, overflow = 2, failed = 3 };

// Zero at the start.
struct DeviceState {
  // Of workers, see protocol/arrival.h. Warps add to them (acq_rel), and the warp that completes a count sets
  // it back to 0; no warp of the next kernel adds before that, because kernels of one stream follow each
  // other.
  uint64_t counters[kCounters];
  // The same for warps that have unpacked their part of each wave.
  uint64_t unpacking[kWaves];
  // 1 once a warp gave up (cas, acq_rel): the others leave their waits. Never reset: the communicator is
  // broken.
  uint64_t failed;
  // When the throttle is through with all that warps have given it, on globaltimer (cas). Orders nothing.
  uint64_t throttle_free;
  // unpacked[i]: the last dispatch in waves, by its epoch, whose wave i is in place, or which has failed.
  // Written by the last warp to unpack its part (release); streams wait for it.
  uint64_t unpacked[kWaves];
};

// Mapped host memory. The host reads what the device has written before a release of the flag beside it.
struct HostState {
  // 1: `record` says why an operation failed. Written once by the warp that set DeviceState::failed
  // (release).
  uint64_t failed;
  FailureRecord record;
  // Written by the host (release), read by waiting warps (acquire): what only the host can know. `abort` ends
  // every wait: a Cause (in the high half), and the peer. `lost`, a mask, ends waits for ranks of other nodes
  // from which nothing comes any more: no wait misses one that closed after its part.
  uint64_t abort;
  uint64_t lost;

  // The number of the newest plan whose results follow; written by the plan kernel (release) after them, read
  // by the host (acquire). Not the epoch, which a dispatch with a bad id gives back.
  uint64_t planned;
  PlanStatus plan_status;
  int64_t bad_index;  // bad_id: into topk_idx, and what it holds
  int64_t bad_id;
  int64_t fullest;  // overflow: the rank that would receive most, and how much
  int64_t fullest_rows;
  int64_t rounds;  // of counts
  int64_t dropped;
  int64_t grouped_rows;  // layout="expert"
  int64_t source_rows[kMaxRanks];
  uint8_t slots[kMaxRanks];
};

// Device memory that is used only within a kernel. A plan may run beside the rows of earlier dispatches, so
// they share none of it, and what rows need from their plan comes in their arguments.
struct Scratch {
  uint32_t* expert_counts;   // [experts]; this and the next are of plans
  uint32_t* warp_counts;     // [kPlanWarps][experts]
  uint8_t* waves_of_routes;  // [max_tokens][width]; of rows
};

// What every kernel is given.
struct OpParams {
  PeerTable peers;
  OpId id;
  uint64_t timeout_ns;
  DeviceState* state;
  HostState* host;  // as mapped on the device
  ThrottleRate throttle;
  int ring_bytes;  // of shared memory for each warp's copies; 0: the device has no bulk copies
};

struct PlanOp {
  OpParams common;
  RouterOutput routing;
  int64_t* routes;
  int32_t* ordinals;         // [tokens][topk]
  int64_t* rows_per_expert;  // [own experts]
  int64_t* group_firsts;     // [ranks][own experts]
  int64_t* offsets;          // [own experts + 1]; null: layout="rank"
  int64_t align;
  Scratch scratch;
  uint64_t plan;      // its number, told to the host when it is done
  uint32_t dispatch;  // number of the first round of counts
  int64_t capacity;
  bool drop;
};

struct RowsOp {
  OpParams common;
  SendPlan send;      // slots: null
  UnpackPlan unpack;  // source_rows: null
  // Of a fresh dispatch, as its plan found them: the slot that each rank lends, and how many rows it sends.
  uint8_t slots[kMaxRanks];
  int64_t source_rows[kMaxRanks];
  // Along a known routing: the last operation in which ranks pulled from the slot that this rank lends; 0:
  // none.
  uint64_t last_pull;
};

// A fresh dispatch in waves.
struct WavesOp {
  RowsOp rows;
  uint8_t* waves_of_routes;
};

struct CombineOp {
  OpParams common;
  LocalSumPlan local_sum;
  PullPlan pull;
  bool users_rows;     // the slot holds a tensor of the user's
  uint64_t last_pull;  // the last operation in which ranks pulled from the slot that sums go into; 0: none
};

struct AwaitOp {
  OpParams common;
  uint64_t last_pull;
};

}  // namespace commlib::cuda
