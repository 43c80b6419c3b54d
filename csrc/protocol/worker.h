// What the protocol asks of a worker. The protocol is written once, as templates over these primitives;
// cpu/worker.h makes a worker of a thread, cuda/worker.cuh of a warp.
//
//   index(), count()           this worker's number among those of its rank's operation
//   lane(), lanes()            this thread's number among those of the worker: 0 and 1 on a CPU
//   kInternode                 whether there may be ranks on other nodes
//   kPlansGroups               whether plans may be of dispatches whose rows go straight to groups
//   kBoundsPlans               whether they may be of bounded dispatches
//   kConverts                  whether rows may be converted as they are sent
//   id()                       the operation. (A plan, which is short of registers, reads it where it needs
//   it) share(n)                   this worker's contiguous part of n items
//
// All lanes call these together:
//
//   list<T>(n, f)              those of f(0) .. f(n - 1) that are not null; lives until the next list
//   all(ok)                    whether ok holds on every lane; what one has acquired, all have then
//   any_bits(mask)             the lanes' masks, or-ed
//   lowest(value)              the least of the lanes' values
//   prefix(value)              the sum over the lanes below, and over all lanes
//   take(mine, counter)        where mine: *counter and the number of lower lanes that take; adds them
//   take_each(key, counters)   the same with counters[key], where key is not negative
//   multicast(to, src, bytes)  copies src to every target
//   convert(to, how, src)      converts the row at src, once, and copies it and its scales to every target;
//                              where kConverts
//   reduce(dtype, dst, terms, elements)
//                              sums rows in the order of the list, in fp32 (fp64 for fp64), multiply and
//                              add apart, one rounding at the end, and one of each sum of parts (see Term);
//                              no terms: zeros
//   will_read(n, f)            a hint: the reduce after the next one reads the rows f(0) .. f(n - 1), or null
//   weigh(dtype, dst, term, y, elements, dot)
//                              dst: the term's row times its weight, each element rounded once; *dot: the
//                              product of the row with y, summed in fp32 (fp64 for fp64) in an order that
//                              depends on the dtype and the backend alone, multiply and add apart
//   zero(dst, bytes)
//   throttled()                whether the rank's link is emulated to be slower
//   pass_throttle(bytes)       waits until the bytes have had their time on that link
//   flush()                    orders what this worker wrote before what it publishes or adds next
//   await_change(internode, seen, ranks)
//                              waits until `progress` is no longer `seen`; ranks: a mask of those that are to
//                              bring something
//   await(ready, peer, late, phase)
//                              each lane waits until its own ready(), which `peer` notifies it of; late():
//                              the ranks that the operation waits for then, as a mask. False once this
//                              rank's operation has failed, which a wait past its deadline causes
//   await_tag(word, tag, peer, phase)
//                              the same for a word of `peer` alone
//
// All lanes of all workers call these together:
//
//   meet(ok)                   whether ok holds on all lanes of all workers, which have come that far, and
//   see
//                              what the others wrote before; in a plan only
//   gather()                   flushes; the number of workers that this one speaks for from then on, which
//                              have all flushed: one worker may speak for several
//   spoken_for_failed()        after gather(): whether one of the others that this worker speaks for may have
//                              failed
//   once(ask)                  what ask() returns; one of several workers may ask for all
//   lent()                     for collect_calls: of all workers that share an answer
//
//   pulls_from_slot(id)        writes that word, once all workers have begun the operation. Lanes of one
//                              worker call it together
//   ended(id)                  tells later operations of this rank that all workers have done their part of
//                              this one. Lanes of one worker call it together
//
// Single lanes call these:
//
//   publish(word, value)       a release store
//   read(word)                 an acquire load
//   last_pull()                the word of the Sequence for the slot that this rank lends, as the operation
//                              found it
//   counted()                  the last round of counts: see Sequence
//   has_counted(number)        makes it that one
//   store_relaxed(word, value) a store that is whole and orders nothing: the word says everything by itself
//   load_relaxed(word)         a load that orders nothing
//   counter(i)                 one of kCounters that the workers of this rank share, 0 when they begin
//   completes(counter, n, all) adds n, acquire and release; whether that makes `all`, and sets it back to 0
//   add_relaxed(counter, n)    adds to a counter that workers of this rank share, unordered
//   replace(word, old, new)    whether it was `old` and is `new` now; of workers of this rank, one succeeds
//   notify(signals)            wakes the threads that wait for one of these words, where threads sleep
//   post(outbox, post)         hands something to the network
//   copy_scalar(dst, src, n)   4 or 8 bytes; null writes zero
//   mismatch(peer)             records that the peer made another call, or has other rows; always false
//   malformed(peer, phase)     records that the peer sent something that does not fit the operation
#pragma once

#include <utility>

#include "base/dtype.h"
#include "protocol/control_block.h"
#include "protocol/quantize.h"

namespace commlib {

// Counters of workers: of those that have sent their part of each wave, and of those that have pulled.
constexpr int kPulledCounter = kWaves;
constexpr int kCounters = kWaves + 1;

// A term is added to the others as it is; or it is a part of one: parts in a row, up to the last, are summed,
// and their sum is rounded, before it is added to the others. So a source that sums a rank's rows itself gets
// the bits that it gets where that rank has summed and stored them.
enum class TermKind : int32_t { whole = 0, part = 1, last_part = 2 };

// One row of a sum. weight: null, or a scalar of the accumulator's type.
struct Term {
  const std::byte* row;
  const std::byte* weight;
  TermKind kind = TermKind::whole;
  COMMLIB_HD explicit operator bool() const { return row != nullptr; }
};
using Target = std::byte*;

// Of a converted row and its scales.
struct ConvertedTarget {
  std::byte* row;
  std::byte* scales;
  COMMLIB_HD explicit operator bool() const { return row != nullptr; }
};

template <class T>
struct List {
  const T* items;
  int count;
};

struct Span {
  int64_t begin, end;
};

// Of a sum over lanes.
struct Prefix {
  int64_t before, all;
};

// The contiguous part of n items that falls to one of `count` workers.
COMMLIB_HD constexpr Span share_of(int64_t n, int64_t index, int64_t count) {
  return {n * index / count, n * (index + 1) / count};
}

}  // namespace commlib
