// What a wait that does not end leaves behind, and how a waiting rank finds out why: from the words that
// other ranks left with it. Plain words, so that a GPU can write the record.
#pragma once

#include "protocol/words.h"

namespace commlib {

enum class Cause : uint8_t { none, timeout, exited, left, mismatch, interrupted, broken, lost, damaged };

struct FailureRecord {
  Cause cause;
  OpKind op;
  Phase phase;
  int32_t peer;    // who was waited for, or is blamed
  int32_t teller;  // left: the rank that gave up on `peer`, or `peer` itself
  uint32_t epoch;
  uint32_t call;        // what this rank called, packed
  uint32_t their_call;  // mismatch: what `peer` called instead, packed
  uint64_t missing;     // timeout: the ranks that have not made this call, as a mask
  uint64_t last_call;   // the newest call word of `peer`, 0: none yet
  uint64_t waited_ns;
};

// One operation, as far as waiting in it is concerned.
struct Wait {
  Call call;
  uint32_t epoch;
};

// The newest call that `peer` told this rank of, or 0.
template <class Worker>
COMMLIB_HD uint64_t newest_call(Worker& w, const PeerTable& peers, int peer) {
  uint64_t newest = 0;
#pragma unroll 1
  for (const uint64_t& word : peers.mail_from(peer).calls) {
    const uint64_t v = w.read(&word);
    const bool said = Call::unpack(value_of(v)).op != OpKind::none;
    if (said && (newest == 0 || reached(tag_of(v), tag_of(newest)))) newest = v;
  }
  return newest;
}

// Whether `peer` has come as far as this operation.
template <class Worker>
COMMLIB_HD bool has_called(Worker& w, const PeerTable& peers, int peer, uint32_t epoch) {
  const uint64_t newest = newest_call(w, peers, peer);
  return newest != 0 && reached(tag_of(newest), epoch);
}

template <class Worker>
COMMLIB_HD FailureRecord new_record(Worker& w, const PeerTable& peers, const Wait& wait, Cause cause,
                                    int peer, Phase phase) {
  FailureRecord r{};
  r.cause = cause;
  r.op = wait.call.op;
  r.phase = phase;
  r.peer = r.teller = peer;
  r.epoch = wait.epoch;
  r.call = wait.call.pack();
  r.last_call = newest_call(w, peers, peer);
  if (cause != Cause::timeout) return r;
  for (int p = 0; p < peers.size; ++p) {
    const bool late = p == peer || (p != peers.rank && !has_called(w, peers, p, wait.epoch));
    if (late) r.missing |= uint64_t{1} << p;
  }
  return r;
}

template <class Worker>
COMMLIB_HD FailureRecord mismatch_record(Worker& w, const PeerTable& peers, const Wait& wait, int peer,
                                         Call theirs) {
  FailureRecord r = new_record(w, peers, wait, Cause::mismatch, peer, Phase::call);
  r.their_call = theirs.pack();
  return r;
}

// Whether any rank made another call at this place in the order: the cause, whatever else is late for it.
template <class Worker>
COMMLIB_HD bool someone_calls_otherwise(Worker& w, const PeerTable& peers, const Wait& wait,
                                        FailureRecord* record) {
  for (int p = 0; p < peers.size; ++p) {
    const uint64_t word = w.read(&peers.mail_from(p).calls[wait.epoch % kCallRing]);
    const Call theirs = Call::unpack(value_of(word));
    if (tag_of(word) != wait.epoch || theirs.op == OpKind::none || theirs.agrees_with(wait.call)) continue;
    *record = mismatch_record(w, peers, wait, p, theirs);
    return true;
  }
  return false;
}

// Whether a rank left that this operation needs: one that gave up, whichever it is, or one that closed its
// communicator before it came here. The awaited peer first: its own word is the best reason.
template <class Worker>
COMMLIB_HD bool someone_left(Worker& w, const PeerTable& peers, const Wait& wait, int peer, Phase phase,
                             FailureRecord* record) {
  for (int i = 0; i < peers.size; ++i) {
    const int p = (peer + i) % peers.size;
    const uint64_t left = w.read(&peers.mail_from(p).left);
    if (p == peers.rank || left == 0) continue;  // to ask what it called last takes many words
    // What a rank of this node did before it closed is in place; from another node it may still be on its
    // way.
    const auto did_its_part = [&] {
      return (p != peer || !peers.is_near(p)) && has_called(w, peers, p, wait.epoch);
    };
    if (tag_of(left) == kClosed && did_its_part()) continue;
    *record = new_record(w, peers, wait, Cause::left, static_cast<int>(value_of(left)), phase);
    record->teller = p;
    return true;
  }
  return false;
}

// Why a wait for `peer` cannot end, if other ranks' words say so. `left` is read first: who made another call
// said so before it gave up (release), so a mismatch is never told as "gave up".
template <class Worker>
COMMLIB_HD bool find_cause(Worker& w, const PeerTable& peers, const Wait& wait, int peer, Phase phase,
                           FailureRecord* record) {
  FailureRecord left;
  const bool gone = someone_left(w, peers, wait, peer, phase, &left);
  if (phase != Phase::slot_reuse && someone_calls_otherwise(w, peers, wait, record)) return true;
  if (gone) *record = left;
  return gone;
}

}  // namespace commlib
