// What the protocol asks of a worker. The protocol is written once, as templates over these primitives;
// cpu/worker.h makes a worker of a thread, cuda/worker.cuh of a warp.
//
//   index(), count()           this worker's number among those of its rank's operation
//   lane(), lanes()            this thread's number among those of the worker: 0 and 1 on a CPU
//   kInternode                      whether there may be ranks on other nodes
//   share(n)                   this worker's contiguous part of n items
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
//   reduce(dtype, dst, terms, elements)
//                              sums rows in the order of the list, in fp32 (fp64 for fp64), multiply and
//                              add apart, one rounding at the end; no terms: zeros
//   zero(dst, bytes)
//   throttled()             whether the rank's link is limited
//   pass_throttle(bytes)           waits until they have passed it
//   flush()                    orders what this worker wrote before what it publishes or adds next
//   await_change(internode, seen, ranks)
//                              waits until the progress of other nodes are no longer `seen`; `ranks`: a mask
//                              of those who are to bring some
//   await(ready, peer, late, phase)
//                              each lane waits until its own ready(), of which `peer` rings a event; late():
//                              the ranks that the operation waits for then, as a mask. False once this
//                              rank's operation has failed, which a wait past its deadline causes
//   await_tag(word, tag, peer, phase)
//                              the same for a word of `peer` alone
//
// All lanes of all workers call these together:
//
//   gather()                   flushes; the number of workers that this one speaks for from then on: workers
//                              may have one of them speak for several, which have all flushed
//   once(ask)                  what ask() says; one of several workers may ask for all
//
// Single lanes call these:
//
//   publish(word, value)       a release store
//   add(counter, n)            a release addition; of 1, if n is not given
//   read(word)                 an acquire load
//   say(word, value)           a store that is whole and orders nothing: all there is to know is in the word
//   load_relaxed(word)               a load that orders nothing
//   replace(word, old, new)    whether it was `old` and is `new` now; of workers of this rank, one succeeds
//   wake(signals)              rings its event, where threads sleep
//   post(outbox, post)         hands something to the network
//   add_relaxed(counter, n)          adds to a counter that workers of this rank share, unordered
//   copy_scalar(dst, src, n)   4 or 8 bytes; null writes zero
//   mismatch(peer, theirs)     records that the peer made another call; always false
//   malformed(peer, phase)     records that the peer sent what does not fit the operation
#pragma once

#include <utility>

#include "base/dtype.h"
#include "protocol/operation.h"

namespace commlib {

// One row of a sum. weight: null, or a scalar of the accumulator's type.
struct Term {
  const std::byte* row;
  const std::byte* weight;
  COMMLIB_HD explicit operator bool() const { return row != nullptr; }
};
using Target = std::byte*;

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
