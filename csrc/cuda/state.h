// What the kernels of one communicator share: with each other in device memory, with the host in mapped
// memory.
#pragma once

#include "protocol/bounded.h"
#include "protocol/failure.h"
#include "protocol/operations.h"
#include "protocol/sequence.h"

namespace commlib::cuda {

constexpr int kWarpLanes = 32;
constexpr int kWarps = 16;  // workers of a block
constexpr int kThreads = kWarps * kWarpLanes;
// Warps of a plan's one block, which should find room beside another block on its SM.
constexpr int kPlanWarps = 5;

// The order of this rank's operations. The host numbers those that it launches; those of a graph take the
// next number when they run. Kernels that move rows follow each other, and each writes these words when all
// of its workers have read them: the worker that completes their count does. A plan beside the rows of
// earlier operations reads `replayed` and `last_pull`: the first changes only while a graph runs, and what
// its slot was last used for has ended before.
struct DeviceSequence : Sequence {
  uint64_t ended;     // the last operation whose workers have all done their part
  uint64_t begun;     // the last one that has begun to move rows, or in a graph to plan: it is under way
                      // unless it has ended
  uint64_t refused;   // the last one that ended with its plan, because too many rows would have come
  uint64_t replayed;  // how many operations of graphs have run, which the host has not counted
};

// Zero at the start, except that `sequence` says what the first operation is.
struct DeviceState {
  DeviceSequence sequence;
  // Of workers, see protocol/arrival.h. Warps add to them (acq_rel), and the warp that completes a count sets
  // it back to 0; no warp of the next kernel adds before that, because kernels of one stream follow each
  // other.
  uint64_t counters[kCounters];
  // The same for warps that have unpacked their part of each wave.
  uint64_t unpacking[kWaves];
  // 1 once a warp gave up (cas, acq_rel): the others leave their waits. Never reset: the communicator is
  // broken.
  uint64_t failed;
  // 1: the communicator is closed, and a graph with operations of it does nothing. Written by the host while
  // nothing runs.
  uint64_t closed;
  // When the throttle is through with all that warps have given it, on globaltimer (cas). Orders nothing.
  uint64_t throttle_free;
  // unpacked[i]: the last dispatch in waves, by its number, whose wave i is in place, or which has failed.
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
  uint64_t timeout_ns;  // the same, for waits under way too

  // The number of the newest plan whose results follow; written by the plan kernel (release) after them, read
  // by the host (acquire). Not the epoch, which a dispatch with a bad id gives back.
  uint64_t planned;
  PlanReport report;

  // 1: `trouble` says what was wrong with a bounded dispatch. Written by a plan (release) that finds 0; the
  // host takes what it says, and writes 0 (release). So each waits for the other, and the first trouble that
  // nobody has taken is kept.
  uint64_t troubled;
  Trouble trouble;
};

// What every kernel is given.
struct OpParams {
  PeerTable peers;
  Call call;
  uint64_t format;  // of OpId
  uint64_t number;  // of the operation, among those that the host has launched; 0: it is in a graph
  DeviceState* state;
  HostState* host;  // as mapped on the device
  ThrottleRate throttle;
  int ring_bytes;  // of shared memory for each warp's copies; 0: the device has no bulk copies
};

struct PlanKernelOp {
  OpParams common;
  PlanOp plan;
  uint64_t number;  // of the plan: told to the host when it is done; not of a bounded one
};

struct RowsKernelOp {
  OpParams common;
  RowsOp rows;
};

struct CombineKernelOp {
  OpParams common;
  CombineOp combine;
};

struct AwaitKernelOp {
  OpParams common;
};

}  // namespace commlib::cuda
