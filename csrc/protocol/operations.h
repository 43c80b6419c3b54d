// The operations that move rows, as every worker of a rank runs them; planning.h has what comes before the
// rows of a fresh dispatch.
//
// A worker that fails goes on with ok = false where workers meet, and leaves no other short.
#pragma once

#include "protocol/calls.h"
#include "protocol/internode/combine.h"
#include "protocol/internode/dispatch.h"
#include "protocol/waves.h"

namespace commlib {

// The rows of a dispatch: fresh, or along a known routing.
struct RowsOp {
  SendPlan send;  // lent: null
  UnpackPlan unpack;
  uint8_t* waves_of_routes;  // in waves: scratch, [tokens][width]
};

struct CombineOp {
  LocalSumPlan local_sum;
  PullPlan pull;
  bool in_place;    // the rows to pull are in the slot already, in the order received or grouped
  bool users_rows;  // which holds a tensor of the user's
};

// Of a fresh dispatch, with what ranks lend, which its own plan has left in the slot.
COMMLIB_HD SendPlan fresh_send(const RowsOp& op) {
  SendPlan send = op.send;
  send.lent = &op.unpack.slot.record->lent;
  return send;
}

template <class Worker>
COMMLIB_HD void run_rows(Worker& w, const RowsOp& op, const PeerTable& peers, const OpId& id) {
  const bool fresh = op.send.is_fresh();
  SendPlan send = fresh_send(op);
  if (!fresh) {
    // No other rank has heard of this call yet.
    if (w.index() == 0) lend_when_writable(w, peers, id);
    if (!w.once([&] { return collect_calls(w, peers, id, w.lent()); })) return w.flush();
    send.lent = w.lent();
  }
  if (move_rows(w, send, peers, id)) unpack(w, op.unpack);
  w.flush();
}

// The rows of a fresh dispatch in waves; unpacked(wave): see move_in_waves. False: a wait has failed.
template <class Worker, class Unpacked>
COMMLIB_HD bool run_waves(Worker& w, const RowsOp& op, const PeerTable& peers, const OpId& id,
                          Unpacked unpacked) {
  return move_in_waves(w, fresh_send(op), op.unpack, op.waves_of_routes, peers, id, unpacked);
}

template <class Worker>
COMMLIB_HD void run_combine(Worker& w, const CombineOp& op, const PeerTable& peers, const OpId& id) {
  PullPlan pull = op.pull;
  pull.lent = w.lent();
  bool ok = op.in_place || w.once([&] { return await_slot(w, peers); });
  if (ok) {
    if (w.index() == 0) publish_call(w, peers, id);
    start_pull(w, pull, peers, id);
    sum_local_rows(w, op.local_sum, rows_pulled_from_y(w, pull, peers.rank));
    if (arrive(w, peers, id.epoch)) w.pulls_from_slot(id);
    ok = w.once([&] {
      return collect_calls(w, peers, id, w.lent()) &&
             await_arrivals(w, peers, peers.near, kLastWave, id.epoch);
    });
  }
  ok = ok && pull_all(w, pull, peers, id);
  if (finish_pull(w, peers, id.epoch, ok)) w.ended(id);
  // The user's tensor may be written as soon as this returns; so may the weight gradients beside it, by the
  // next operation.
  if (ok && op.users_rows && w.index() == 0) await_pulled(w, peers, id.epoch);
}

}  // namespace commlib
