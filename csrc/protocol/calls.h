// Calls: what each rank says of its part in an operation, and the slot that it lends to the others.
#pragma once

#include "protocol/combine.h"
#include "protocol/failure.h"
#include "protocol/notify.h"

namespace commlib {

// Each rank says what it calls, and which of its slots the call may use. This wakes no thread: counts, or
// rows in place, follow and wake those that wait. Ranks wait for the call itself only before a redispatch.
template <class Worker>
COMMLIB_HD void publish_call(Worker& w, const PeerTable& peers, const OpId& id) {
  for (int p = w.lane(); p < peers.size; p += w.lanes()) {
    SaidCall& said = peers.signals_to(p).calls[id.epoch % kCallRing];
    const bool own = id.format == 0;
    if (!own) w.store_relaxed(&said.format, id.format);
    w.publish(&said.word, tagged(id.tag(), id.call.bits()));
    if (!peers.is_near(p)) {
      send_words(w, peers, p, own ? &said.word : &said.format, own ? 1 : 2);
    } else if (id.call.op == OpKind::redispatch) {
      w.notify(peers.signals_to(p));
    }
  }
}

// Says what this rank calls once no rank pulls any more from the slot that it lends. All lanes of one worker.
template <class Worker>
COMMLIB_HD bool lend_when_writable(Worker& w, const PeerTable& peers, const OpId& id) {
  if (!await_slot(w, peers)) return false;
  publish_call(w, peers, id);
  return true;
}

// Reads every rank's call at this epoch, and the slot it lends: false if a call is
// missing at the deadline, or does not agree with this rank's, nor its rows with this rank's.
template <class Worker>
COMMLIB_HD bool collect_calls(Worker& w, const PeerTable& peers, const OpId& id, Lent* lent) {
  bool ok = true;
  uint64_t mine = 0;
  for (int p = w.lane(); ok && p < peers.size; p += w.lanes()) {
    const SaidCall& said = peers.signals_from(p).calls[id.epoch % kCallRing];
    ok = w.await_tag(&said.word, id.tag(), p, Phase::call);
    if (!ok) break;
    const CallAndFormat theirs = call_in(w, said, w.read(&said.word));
    if (!theirs.agrees_with(w.id())) ok = w.mismatch(p);  // id(): a plan has no registers left for it
    lent->slots[p] = theirs.call.slot;
    if (theirs.call.has(kCallSlotIsGrouped)) mine |= bit_of(p);
  }
  mine = w.any_bits(mine);
  if (w.lane() == 0) lent->grouped = mine;
  return w.all(ok);
}

}  // namespace commlib
