// The record of a wait that does not end, and how a waiting rank finds out why: from the words that other
// ranks wrote for it. Plain words, so that a GPU can write the record.
#pragma once

#include "protocol/blame.h"

namespace commlib {

enum class Cause : uint8_t {
  none,
  timeout,
  exited,
  departed,
  mismatch,
  interrupted,
  broken,
  lost,
  malformed,
  overlap
};

struct FailureRecord {
  Cause cause;
  OpKind op;
  Phase phase;
  int32_t peer;      // the first of those blamed
  int32_t reporter;  // departed: the rank that said so; it gave up on those blamed, or is blamed itself
  uint32_t epoch;
  uint32_t call;        // what this rank called, packed
  uint32_t their_call;  // mismatch: what `peer` called instead, packed
  // In a mismatch the rows of both calls (OpId::format) take the place of two others, to keep it small: a GPU
  // has it on a stack.
  union {
    uint64_t awaited;  // the ranks that this one waited for, as a mask; often those blamed
    uint64_t format;
  };
  union {
    uint64_t last_call;  // the newest call word of `peer`, 0: none yet
    uint64_t their_format;
  };
  uint64_t blamed;  // as a mask
  uint64_t waited_ns;
};

// `blamed`: not empty.
template <class Worker>
COMMLIB_HD FailureRecord new_record(Worker& w, const PeerTable& peers, const OpId& id, Cause cause,
                                    uint64_t awaited, uint64_t blamed, Phase phase) {
  FailureRecord r{};
  r.cause = cause;
  r.op = id.call.op;
  r.phase = phase;
  r.peer = r.reporter = lowest_bit(blamed);
  r.epoch = id.tag();
  r.call = id.call.bits();
  r.awaited = awaited;
  r.blamed = blamed;
  r.last_call = newest_call(w, peers, r.peer);
  return r;
}

template <class Worker>
COMMLIB_HD FailureRecord timeout_record(Worker& w, const PeerTable& peers, const OpId& id, uint64_t awaited,
                                        Phase phase) {
  const uint64_t late = late_ranks(w, peers, id.tag(), awaited);
  uint64_t others = 0;  // that some rank waits for: they hold up all ranks
#pragma unroll 1
  for (int p = 0; p < peers.size; ++p) others |= awaited_by(w, peers, p);
  const uint64_t silent = silent_ranks(w, peers, late | others) & ~bit_of(peers.rank);
  return new_record(w, peers, id, Cause::timeout, late, silent ? silent : late, phase);
}

// A call of a rank, and of what rows it is.
struct CallAndFormat {
  Call call;
  uint64_t format;
  COMMLIB_HD bool agrees_with(const OpId& id) const {
    return call.agrees_with(id.call) && format == id.format;
  }
};

// What is said there of a call: `word` is its word as it was read (acquire).
template <class Worker>
COMMLIB_HD CallAndFormat call_in(Worker& w, const SaidCall& said, uint64_t word) {
  const Call call = Call::from_bits(value_of(word));
  return {call, call.has(kCallSaysFormat) ? w.read(&said.format) : 0};
}

// `peer` has made another call at this epoch; what it said of that stays until it is a ring of calls ahead.
template <class Worker>
COMMLIB_HD FailureRecord mismatch_record(Worker& w, const PeerTable& peers, const OpId& id, int peer) {
  FailureRecord r = new_record(w, peers, id, Cause::mismatch, bit_of(peer), bit_of(peer), Phase::call);
  const SaidCall& said = peers.signals_from(peer).calls[id.epoch % kCallRing];
  const CallAndFormat theirs = call_in(w, said, w.read(&said.word));
  r.their_call = theirs.call.bits();
  r.format = id.format;
  r.their_format = theirs.format;
  return r;
}

template <class Worker>
COMMLIB_HD FailureRecord malformed_record(Worker& w, const PeerTable& peers, const OpId& id, int peer,
                                          Phase phase) {
  return new_record(w, peers, id, Cause::malformed, bit_of(peer), bit_of(peer), phase);
}

// Whether any rank made another call at this epoch: the cause, whatever else is late because of it.
template <class Worker>
COMMLIB_HD bool someone_calls_otherwise(Worker& w, const PeerTable& peers, const OpId& id,
                                        FailureRecord* record) {
  for (int p = 0; p < peers.size; ++p) {
    const SaidCall& said = peers.signals_from(p).calls[id.epoch % kCallRing];
    const uint64_t word = w.read(&said.word);
    const CallAndFormat theirs = call_in(w, said, word);
    if (tag_of(word) != id.tag() || theirs.call.op == OpKind::none || theirs.agrees_with(id)) continue;
    *record = mismatch_record(w, peers, id, p);
    return true;
  }
  return false;
}

// How rank p departed, or 0; and the ranks that it blames.
template <class Worker>
COMMLIB_HD uint32_t how_departed(Worker& w, const PeerTable& peers, int p, uint64_t* blamed) {
  const auto& words = peers.signals_from(p).departed;
  const uint64_t low = w.read(&words[0]);
  if (low == 0) return 0;
  const Departure said{{low, w.read(&words[1])}};
  *blamed = said.blamed() & peers.all();
  return *blamed ? said.how() : 0;
}

// Whether a rank that this operation needs has departed: any rank that gave up, or one that closed its
// communicator before it reached this operation. The first awaited rank is asked first: its own word is
// the best reason.
template <class Worker>
COMMLIB_HD bool someone_departed(Worker& w, const PeerTable& peers, const OpId& id, uint64_t awaited,
                                 Phase phase, FailureRecord* record) {
  const int first = lowest_bit(awaited);
#pragma unroll 1
  for (int i = 0; i < peers.size; ++i) {
    const int p = (first + i) % peers.size;
    uint64_t blamed = 0;
    const uint32_t how = p == peers.rank ? 0 : how_departed(w, peers, p, &blamed);
    if (how == 0) continue;  // asking what it called last takes more words
    // What a rank of this node did before it closed is in place; from another node it may still be on its
    // way.
    const auto did_its_part = [&] {
      return (!has(awaited, p) || !peers.is_near(p)) && has_called(w, peers, p, id.tag());
    };
    if (how == kClosed && did_its_part()) continue;
    // A rank that gave up on others may not have heard which ranks those wait for.
    const uint64_t silent = blamed == bit_of(p) ? 0 : silent_ranks(w, peers, blamed);
    *record = new_record(w, peers, id, Cause::departed, awaited, silent ? silent : blamed, phase);
    record->reporter = p;
    return true;
  }
  return false;
}

// Of the ranks that are gone, those without which this operation cannot end: it awaits them, or they had not
// made this call, and never will. Ranks are awaited one after the other, and the one that is awaited now may
// only be late. One that is gone and had made the call may have done its part.
template <class Worker>
COMMLIB_HD uint64_t missed_of(Worker& w, const PeerTable& peers, const OpId& id, uint64_t gone,
                              uint64_t awaited) {
  uint64_t missed = gone & awaited;
#pragma unroll 1
  for (uint64_t left = gone & ~awaited; left; left &= left - 1) {
    const int p = lowest_bit(left);
    if (!has_called(w, peers, p, id.tag())) missed |= bit_of(p);
  }
  return missed;
}

// Why a wait cannot end, if other ranks' words say so. `departed` is read first: a rank that made another
// call said so before it gave up (release), so a mismatch is never reported as "gave up".
template <class Worker>
COMMLIB_HD bool find_cause(Worker& w, const PeerTable& peers, const OpId& id, uint64_t awaited, Phase phase,
                           FailureRecord* record) {
  FailureRecord departure;
  const bool departed = someone_departed(w, peers, id, awaited, phase, &departure);
  if (phase != Phase::slot_reuse && someone_calls_otherwise(w, peers, id, record)) return true;
  if (departed) *record = departure;
  return departed;
}

// What a wait for some ranks also does now and then, and once more when it has ended well, if others may have
// been told of it: `awaited` is then none. `long_wait`: it has lasted half its deadline. Returns whether
// others know of it now.
template <class Worker>
COMMLIB_HD bool announce_wait(Worker& w, const PeerTable& peers, const OpId& id, uint64_t awaited,
                              bool long_wait) {
  if (awaited && !long_wait && !is_awaited(w, peers)) return false;
  publish_awaited(w, peers, awaited ? late_ranks(w, peers, id.tag(), awaited) : 0);
  return awaited != 0;
}

}  // namespace commlib
