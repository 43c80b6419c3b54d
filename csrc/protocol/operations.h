// The operations, as every worker of a rank runs them. What comes before (the plan of a fresh dispatch, the
// slot, this rank's own call) is the business of whoever starts them: a thread of the host on a CPU, the same
// kernel on a GPU.
//
// A worker that fails goes on with ok = false where workers meet, and leaves no other short.
#pragma once

#include "protocol/internode/combine.h"
#include "protocol/internode/dispatch.h"
#include "protocol/waves.h"

namespace commlib {

// The rows of a dispatch. Without send.slots the routing is known from an earlier one, and the ranks' calls
// say which slots they lend.
template <class Worker>
COMMLIB_HD void run_dispatch(Worker& w, SendPlan send, const UnpackPlan& unpacking, const PeerTable& peers,
                             const OpId& id) {
  if (!send.slots) {
    if (!w.once([&] { return collect_calls(w, peers, id, w.slots()); })) return w.flush();
    send.slots = w.slots();
  }
  if (move_rows(w, send, peers, id)) unpack(w, unpacking);
  w.flush();
}

// ok: this rank's slot may be written. users_rows: it holds a tensor of the user's.
template <class Worker>
COMMLIB_HD void run_combine(Worker& w, const LocalSumPlan& local_sum, PullPlan pull, const PeerTable& peers,
                            const OpId& id, bool users_rows, bool ok) {
  pull.slots = w.slots();
  if (ok) {
    start_pull(w, pull, peers, id);
    sum_local_rows(w, local_sum, rows_pulled_from_y(w, pull, peers.rank));
    arrive(w, peers, id.epoch);
    ok = w.once([&] {
      return collect_calls(w, peers, id, w.slots()) &&
             await_arrivals(w, peers, peers.near, kLastWave, id.epoch);
    });
  }
  ok = ok && pull_all(w, pull, peers, id);
  finish_pull(w, peers, id.epoch, ok);
  // The user's tensor may be written as soon as this returns; so may the weight gradients beside it, by the
  // next operation.
  if (ok && users_rows && w.index() == 0) await_pulled(w, peers, id.epoch);
}

}  // namespace commlib
