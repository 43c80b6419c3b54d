// More rows than a rank has room for.
#pragma once

#include "operations.h"
#include "world.h"

namespace commlib::testing {

// An oversubscribed scenario: rank 0 would receive every token of every rank. Where it drops, ranks may
// group.
inline Scenario oversubscribed(const Config& config, int ranks, bool drop, Random& random,
                               bool may_group = true) {
  Asked asked;
  asked.drop = drop;
  Scenario s{config, asked, {}};
  for (int p = 0; p < ranks; ++p) {
    RankCase r;
    r.tokens = config.max_tokens;
    for (int64_t t = 0; t < r.tokens; ++t) {
      r.topk_idx.push_back(0);
      for (int k = 1; k < config.topk; ++k) r.topk_idx.push_back(1 + random.below(config.experts - 1));
    }
    r.grouped = drop && may_group && random.one_in(2);
    r.align = r.grouped ? 3 : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  return s;
}

// Room for one rank's tokens and a few more.
inline Config narrow_config(int ranks) {
  Config config = small_config(ranks);
  config.capacity = config.max_tokens + 3;
  return config;
}

// A scenario that such a configuration has room for.
inline Scenario fitting(Config config, int ranks, Random& random) {
  config.max_tokens = config.capacity / ranks;
  return random_scenario(config, ranks, {}, random);
}

// What a dispatch of such a scenario throws. Its routing is freed at once.
inline CapacityError refusal(Rank& self, const Scenario& many) {
  const RoutingRoom room(many, self.rank);
  return check_throws<CapacityError>([&] { self.comm->begin_dispatch(room.view, true, false, false); },
                                     "a dispatch past capacity");
}

}  // namespace commlib::testing
