// Where the words of ranks that wait for each other lead.
#include <cstring>

#include "protocol/failure.h"
#include "suite.h"

namespace commlib::testing {
namespace {

// What protocol/blame.h asks of a worker, in memory that only this thread touches.
struct Clerk {
  static uint64_t read(const uint64_t* word) { return *word; }
  static void publish(uint64_t* word, uint64_t value) { *word = value; }
  static bool replace(uint64_t* word, uint64_t before, uint64_t after) {
    if (*word != before) return false;
    *word = after;
    return true;
  }
  static void post(const Outbox&, const Post&) {}
};

// Ranks of one node, each with its signals.
struct Ranks {
  std::vector<std::vector<Signals>> signals;
  std::vector<PeerTable> peers;
  Clerk clerk;

  explicit Ranks(int size) : signals(size, std::vector<Signals>(size)), peers(size) {
    for (int r = 0; r < size; ++r) {
      peers[r].rank = r;
      peers[r].size = size;
      peers[r].near = peers[r].all();
      for (int p = 0; p < size; ++p) peers[r].peer[p].signals = signals[p].data();
    }
  }
  void call(int rank, uint32_t epoch) {
    for (auto& of : signals)
      of[rank].calls[epoch % kCallRing].word = tagged(epoch, Call{OpKind::combine}.bits());
  }
  void awaits(int rank, uint64_t ranks) { publish_awaited(clerk, peers[rank], ranks); }
  void awaits_no_more(int rank) { publish_awaited(clerk, peers[rank], 0); }
  uint64_t blamed_by(int rank, uint32_t epoch, uint64_t late) {
    return timeout_record(clerk, peers[rank], {Call{OpKind::combine}, epoch}, late, Phase::arrival).blamed;
  }
};

void blame_passes_through_waiting_ranks_to_silent_ones() {
  Ranks ranks(40);
  for (int r = 0; r < 40; ++r) ranks.call(r, 9);
  check_equal(ranks.blamed_by(0, 9, bit_of(1)), bit_of(1), "blamed, where nobody says anything");
  ranks.awaits(1, bit_of(2));
  ranks.awaits(2, bit_of(39) | bit_of(3));
  check_equal(ranks.blamed_by(0, 9, bit_of(1)), bit_of(39) | bit_of(3), "blamed, at the end of a chain");
  ranks.awaits(3, bit_of(0) | bit_of(1));
  ranks.awaits(0, bit_of(1));
  check_equal(ranks.blamed_by(0, 9, bit_of(1)), bit_of(39), "blamed, where a circle is behind it");
  check_equal(ranks.blamed_by(4, 9, bit_of(0)), bit_of(39), "blamed by another");
}

void in_a_circle_the_awaited_rank_is_blamed() {
  Ranks ranks(3);
  for (int r = 0; r < 3; ++r) ranks.call(r, 9);
  for (int r = 0; r < 3; ++r) ranks.awaits(r, bit_of((r + 1) % 3));
  check_equal(ranks.blamed_by(0, 9, bit_of(1)), bit_of(1), "blamed");
}

void what_a_rank_awaits_is_forgotten_when_withdrawn_or_past() {
  Ranks ranks(4);
  for (int r = 0; r < 4; ++r) ranks.call(r, 0xffffffff);  // the last epoch before the wrap-around
  ranks.awaits(1, bit_of(2));
  check_equal(ranks.blamed_by(0, 0xffffffff, bit_of(1)), bit_of(2), "blamed");
  ranks.awaits_no_more(1);
  check_equal(ranks.blamed_by(0, 0xffffffff, bit_of(1)), bit_of(1), "blamed, when it was taken back");
  ranks.awaits(1, bit_of(2));
  for (int r = 0; r < 4; ++r) ranks.call(r, 0);
  check_equal(ranks.blamed_by(0, 0, bit_of(1)), bit_of(1), "blamed, when it has called again");
}

// Rank 1 is still in the previous operation.
void a_late_rank_is_not_blamed_while_it_waits_for_another() {
  Ranks ranks(4);
  for (int r = 0; r < 4; ++r) ranks.call(r, 9);
  ranks.call(0, 10);
  ranks.call(3, 10);
  ranks.awaits(1, bit_of(2));
  check_equal(ranks.blamed_by(0, 10, bit_of(1)), bit_of(2), "blamed");
}

const Suite suite({{"blame_passes_through_waiting_ranks_to_silent_ones",
                    blame_passes_through_waiting_ranks_to_silent_ones},
                   {"in_a_circle_the_awaited_rank_is_blamed", in_a_circle_the_awaited_rank_is_blamed},
                   {"what_a_rank_awaits_is_forgotten_when_withdrawn_or_past",
                    what_a_rank_awaits_is_forgotten_when_withdrawn_or_past},
                   {"a_late_rank_is_not_blamed_while_it_waits_for_another",
                    a_late_rank_is_not_blamed_while_it_waits_for_another}});

}  // namespace
}  // namespace commlib::testing
