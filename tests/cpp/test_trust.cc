// Messages that no rank of the job has sent, and messages that do not say what they should: none is acted on,
// and none writes where it should not, which AddressSanitizer would see.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>

#include "net/network.h"
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

Config on_two_nodes() {
  Config config = small_config(4);
  config.net.node_of = {0, 0, 1, 1};
  config.net.chunks = 2;
  config.slots = 4;
  return config;
}

Header header_of(int from, int to, Post post) {
  post.peer = from;
  return {post, test_key(from, to)};
}

Post words_at(uint64_t offset, uint64_t bytes = 8) {
  return {PostKind::words, Direction::outward, 0, 0, offset, bytes};
}

// -- which rank it is from

// All ranks go there and back; then `forge` makes messages come to rank 0 that no rank has sent.
void after_a_round_trip(uint64_t seed, const std::function<void(Rank&)>& forge, bool goes_on) {
  Random random(seed);
  const Config config = on_two_nodes();
  const Scenario s = random_scenario(config, 4, {}, random);
  in_ranks(config, 4, [&](Rank& self) {
    check_round_trip(self, s, s, {});
    self.meet();
    if (self.rank == 0) forge(self);
    self.meet();
    if (goes_on) check_round_trip(self, s, s, {});
  });
}

void a_message_without_proof_of_its_sender_is_dropped() {
  const auto forge = [](Rank& self) {
    // Each would say that rank 3 has given up.
    const uint64_t left = 3 * sizeof(Signals) + offsetof(Signals, departed);
    const Bytes word(8, std::byte{2});
    std::vector<Header> forged(9, header_of(3, 0, words_at(left)));
    forged[0].key[15] ^= std::byte{1};
    forged[1].key = {};
    forged[2].key = test_key(0, 3);               // what this rank itself shows
    forged[3].key = test_key(2, 0);               // that of another rank
    forged[4].key = test_key(3, 1);               // to another rank
    forged[5] = header_of(1, 0, words_at(left));  // a rank of this node
    forged[6] = header_of(0, 0, words_at(left));
    forged[7].post.peer = -1;
    forged[8].post.peer = 1 << 30;
    for (const Header& header : forged) self.net->forge(0, &header, sizeof header, word);
    const Header whole = header_of(3, 0, words_at(left));
    self.net->forge(0, &whole, sizeof whole - 1, word);
    self.net->forge(0, &whole, 0, word);
    while (self.comm->network()->messages_refused() < forged.size() + 2) std::this_thread::yield();
  };
  after_a_round_trip(500, forge, true);
}

// -- what it says of itself

struct Forgery {
  const char* fault;
  Post post;
  size_t bytes;  // received
};

// From rank 2 to rank 0, each of which is the other's gateway.
std::vector<Forgery> forgeries(const Config& config) {
  constexpr uint64_t mine = 2 * sizeof(Signals), left = offsetof(Signals, departed);
  const uint64_t counts = 4 * sizeof(Signals);
  const auto chunk = [](uint64_t number, uint64_t bytes, uint16_t queue = 0, int direction = 0) {
    return Post{PostKind::chunk, static_cast<Direction>(direction), queue, 0, number, bytes};
  };
  const auto taken = [](uint64_t number, uint16_t queue = 0, int direction = 0) {
    return Post{PostKind::taken, static_cast<Direction>(direction), queue, 0, number, 0};
  };
  const uint64_t far = uint64_t{1} << 40, most = UINT64_MAX;
  return {
      {"no known kind", {static_cast<PostKind>(3), Direction::outward, 0, 0, 0, 0}, 0},
      {"no known kind", {static_cast<PostKind>(255), Direction::outward, 0, 0, 0, 8}, 8},
      {"not as long as it says", words_at(mine + left, 16), 8},
      {"not as long as it says", words_at(mine + left, most - 7), 8},
      {"not as long as it says", chunk(0, most), 64},
      {"not whole", words_at(mine + left + 1), 8},
      {"not whole", words_at(mine + left, 7), 7},
      {"not whole", words_at(mine + left, 0), 0},
      {"not its own", words_at(left), 8},                             // rank 0's
      {"not its own", words_at(mine), 8},                             // arrivals, which a gateway adds
      {"not its own", words_at(mine + sizeof(Signals) - 8, 16), 16},  // into the next signals
      {"not its own", words_at(counts), 8},                           // rank 0's
      {"not its own", words_at(most - 7), 8},                         // offset + bytes is 0
      {"not its own", words_at(most - 7, 4096), 4096},                // and below the block's size
      {"not its own", words_at(uint64_t{1} << 63, 8), 8},
      {"not its own", words_at(1 << 20, 8), 8},  // past the block
      {"no room", chunk(far, 64), 64},
      {"no room", chunk(most, 64), 64},
      {"no room", chunk(static_cast<uint64_t>(config.net.chunks) + 1, 64), 64},
      {"size that there is not", chunk(0, 63), 63},
      {"size that there is not", chunk(0, 0), 0},
      {"size that there is not", chunk(0, 1 << 20), 1 << 20},
      {"channel that there is not", chunk(0, 64, 16), 64},  // no rank has that many queues
      {"channel that there is not", chunk(0, 64, UINT16_MAX), 64},
      {"channel that there is not", chunk(0, 64, 0, 2), 64},
      {"channel that there is not", chunk(0, 64, 0, 255), 64},
      {"not sent", taken(far), 0},
      {"not sent", taken(most), 0},
      {"no channel", taken(0, 16), 0},
      {"no channel", taken(0, 0, 9), 0},
  };
}

// Rank 0 gets the message; then `body` on all ranks.
void with_forgery(const Config& config, const Forgery& f, const std::function<void(Rank&)>& body) {
  in_ranks(config, 4, [&](Rank& self) {
    if (self.rank == 0) {
      const Header header = header_of(2, 0, f.post);
      self.net->forge(0, &header, sizeof header, Bytes(f.bytes));
      while (!self.comm->network()->has_lost(2)) std::this_thread::yield();
      check_contains(self.comm->network()->why_lost(2), f.fault, "why");
    }
    self.meet();
    body(self);
    self.meet();
  });
}

void a_message_that_does_not_fit_is_not_acted_on_and_its_rank_is_lost() {
  const Config config = on_two_nodes();
  for (const Forgery& f : forgeries(config)) with_forgery(config, f, [](Rank&) {});
}

void a_message_that_does_not_fit_is_an_error_that_names_its_rank() {
  Random random(501);
  const Config config = on_two_nodes();
  const Scenario s = random_scenario(config, 4, {}, random);
  with_forgery(config, forgeries(config)[0], [&](Rank& self) {
    if (self.rank == 2) return;
    const CommFailure e = check_throws<CommFailure>([&] { start_dispatch(self, s, {})->under_way.wait(); },
                                                    "a dispatch, to which rank 2 does not come");
    check(e.failure.record.cause == Cause::lost || self.rank != 0, e.what());
    check(e.failure.record.blamed == bit_of(2), e.what());
  });
}

void a_chunk_that_comes_twice_is_an_error() {
  const auto forge = [](Rank& self) {
    const Header header = header_of(2, 0, {PostKind::chunk, Direction::outward, 0, 0, 0, 64});
    self.net->forge(0, &header, sizeof header, Bytes(64));
    while (!self.comm->network()->has_lost(2)) std::this_thread::yield();
  };
  after_a_round_trip(502, forge, false);
}

// -- what chunks bring

struct Tampering {
  Direction direction;
  int64_t offset;  // in the chunk, of an int32
  int64_t value;
};

FrameLayout layout_of(const Config& config) {
  return FrameLayout::of(2, config.topk, config.topk, config.topk * 4, 0);
}

// Whether any token of a rank has a row on a node of two.
bool sends_to(const Scenario& s, int rank, int node) {
  const Placement placement{s.config.experts, 4};
  const Int64s& ids = s.ranks[rank].topk_idx;
  return std::any_of(ids.begin(), ids.end(),
                     [&](int64_t e) { return e >= 0 && placement.owner(e) / 2 == node; });
}

// Rank 0 gets from rank 2 one chunk that says something else.
void names_the_sender(const Tampering& t, OpKind kind, uint64_t stream_seed) {
  Random random(stream_seed);
  Config config = on_two_nodes();
  config.net.chunk_bytes = 4096;
  Scenario s = random_scenario(config, 4, {}, random);
  while (!sends_to(s, 0, 1) || !sends_to(s, 2, 0)) s = random_scenario(config, 4, {}, random);
  bool done = false;  // of rank 0's network alone
  in_ranks(config, 4, [&](Rank& self) {
    DispatchedPtr d;
    const auto dispatch = [&] {
      d = start_dispatch(self, s, {});
      d->under_way.wait();
    };
    if (kind == OpKind::combine) dispatch();
    self.meet();
    if (self.rank == 0) {
      self.net->tamper_with([&](int to, const Header& header, Bytes& data) {
        if (to != 0 || done || header.post.peer != 2 || header.post.kind != PostKind::chunk) return;
        if (header.post.direction != t.direction ||
            reinterpret_cast<const ChunkHeader*>(data.data())->frames == 0)
          return;
        const auto value = static_cast<int32_t>(t.value);
        std::memcpy(data.data() + t.offset, &value, sizeof value);
        done = true;
      });
    }
    self.meet();
    try {
      kind == OpKind::combine ? start_combine(self, *d, s, {})->under_way.wait() : dispatch();
      check(self.rank != 0, "a chunk that does not fit is an error");  // others may have finished by then
    } catch (const CommFailure& e) {
      check(e.failure.record.blamed == bit_of(2), e.what());
      check(e.failure.record.cause == Cause::malformed || self.rank != 0, e.what());
    }
    self.meet();
  });
}

void rows_and_tokens_that_do_not_exist_are_an_error_that_names_the_sender() {
  const Config config = on_two_nodes();
  const FrameLayout layout = layout_of(config);
  constexpr int64_t frame = sizeof(ChunkHeader);
  const int64_t frames = offsetof(ChunkHeader, frames), tag = offsetof(ChunkHeader, tag);
  const int64_t row = frame + layout.rows_at, expert = frame + layout.experts_at;
  for (const OpKind kind : {OpKind::dispatch, OpKind::combine}) {
    for (const Tampering& t : std::vector<Tampering>{{Direction::outward, frames, -1},
                                                     {Direction::outward, frames, 4096},
                                                     {Direction::outward, tag, 77},
                                                     {Direction::outward, frame, -1},
                                                     {Direction::outward, frame, config.max_tokens},
                                                     {Direction::outward, row, -2},
                                                     {Direction::outward, row, config.capacity},
                                                     {Direction::outward, row + 4, INT32_MAX},
                                                     {Direction::outward, expert, -2},
                                                     {Direction::outward, expert, config.experts},
                                                     {Direction::outward, expert + 4, INT32_MIN}}) {
      names_the_sender(t, kind, 503);
    }
  }
  for (const Tampering& t :
       {Tampering{Direction::homeward, frames, -1}, Tampering{Direction::homeward, tag, 0},
        Tampering{Direction::homeward, frame, config.max_tokens}}) {
    names_the_sender(t, OpKind::combine, 504);
  }
}

const Suite suite({{"a_message_without_proof_of_its_sender_is_dropped",
                    a_message_without_proof_of_its_sender_is_dropped},
                   {"a_message_that_does_not_fit_is_not_acted_on_and_its_rank_is_lost",
                    a_message_that_does_not_fit_is_not_acted_on_and_its_rank_is_lost},
                   {"a_message_that_does_not_fit_is_an_error_that_names_its_rank",
                    a_message_that_does_not_fit_is_an_error_that_names_its_rank},
                   {"a_chunk_that_comes_twice_is_an_error", a_chunk_that_comes_twice_is_an_error},
                   {"rows_and_tokens_that_do_not_exist_are_an_error_that_names_the_sender",
                    rows_and_tokens_that_do_not_exist_are_an_error_that_names_the_sender}});

}  // namespace
}  // namespace commlib::testing
