// A dispatch in waves: rows travel and are unpacked in the order in which experts may begin, so that a rank
// works on its first experts while rows of its last ones are still under way.
//
// The experts of each rank are cut into kWaves runs. A row belongs to the first wave that holds one of its
// experts at the receiver. In that wave it is sent, and goes to all its grouped rows, those in later waves'
// groups as well: straight, or copied from the slot. So once waves 0 to i are unpacked, every row of wave i's
// experts is in place, and nothing has been sent or copied twice. All metadata goes ahead, because it says
// where rows lie in the groups; it does not depend on waves. Between nodes there are no waves: metadata
// travels with rows there.
#pragma once

#include "protocol/dispatch.h"
#include "protocol/unpack.h"

namespace commlib {

// The wave of expert `local` of a rank's `count`. The last expert is in the last wave: a wait for it is a
// wait for everything. Where there are fewer than kWaves experts, some waves are empty.
COMMLIB_HD int wave_of(int64_t local, int64_t count) {
  return static_cast<int>((static_cast<uint32_t>(local + 1) * kWaves - 1) / static_cast<uint32_t>(count));
}

// The wave of the row that token t has at rank p. Experts of other ranks wrap around, or lie past its own.
COMMLIB_HD int wave_of_row(const SendPlan& plan, int64_t t, int p) {
  const int64_t first = plan.placement.first_expert(p);
  auto lowest = UINT64_MAX;
  for (int64_t i = t * plan.topk; i < (t + 1) * plan.topk; ++i) {
    const auto local = static_cast<uint64_t>(plan.topk_idx[i] - first);
    lowest = local < lowest ? local : lowest;
  }
  return wave_of(static_cast<int64_t>(lowest), plan.placement.count(p));
}

// The wave of every row that this worker sends.
template <class Worker>
COMMLIB_HD void plan_waves(Worker& w, const SendPlan& plan, uint8_t* of_routes) {
  const int64_t step = static_cast<int64_t>(w.count()) * w.lanes();
  for (int64_t t = w.index() + static_cast<int64_t>(w.lane()) * w.count(); t < plan.tokens; t += step) {
    const int64_t* route = plan.routes + t * plan.width;
    for (int j = 0; j < plan.width && route[j] != kNoRoute; ++j) {
      of_routes[t * plan.width + j] = static_cast<uint8_t>(wave_of_row(plan, t, rank_of(route[j])));
    }
  }
}

// Sends the metadata of all rows, before any row.
template <class Worker>
COMMLIB_HD void send_metadata_ahead(Worker& w, const SendPlan& plan, const PeerTable& peers) {
  if (!Worker::kMetadataWithRows) return send_metadata(w, plan, peers);
  for (int64_t t = w.index(); t < plan.tokens; t += w.count()) {
    const int64_t* route = plan.routes + t * plan.width;
    for (int j = 0; j < plan.width && route[j] != kNoRoute; ++j) {
      send_row_metadata(w, plan, peers, t, route[j]);
    }
  }
}

// How far a worker has come with what it sends.
struct Sending {
  int wave;
  int64_t token;
};

// Sends the rows of a few more tokens, few enough that what has arrived meanwhile need not wait long.
template <class Worker>
COMMLIB_HD void send_some(Worker& w, const SendPlan& plan, const PeerTable& peers, const uint8_t* of_routes,
                          const OpId& id, Sending* at) {
  constexpr int kTokensAtOnce = 4;
  for (int sent = 0; sent < kTokensAtOnce && at->token < plan.tokens; at->token += w.count()) {
    const int64_t* route = plan.routes + at->token * plan.width;
    const uint8_t* wave = of_routes + at->token * plan.width;
    const auto goes_now = [&](int p) { return wave[route_to(route, plan.width, bit_of(p))] == at->wave; };
    if (send_row(w, plan, peers, at->token, goes_now) == 0) continue;
    if (w.throttled()) {
      w.pass_throttle(remote_rows(plan.rows_of(at->token), peers.rank, goes_now) * plan.layout.moved_bytes());
    }
    ++sent;
  }
  if (at->token < plan.tokens) return;
  if (arrive_in_wave(w, peers, at->wave, id.epoch) && at->wave == kLastWave) w.ended(id);
  *at = {at->wave + 1, w.index()};
}

// Whether the rows of every source's wave are in place.
template <class Worker>
COMMLIB_HD bool wave_has_arrived(Worker& w, const PeerTable& peers, int wave, uint64_t epoch) {
  bool ok = true;
  for (int s = w.lane(); ok && s < peers.size; s += w.lanes()) ok = has_arrived(w, peers, s, wave, epoch);
  return w.all(ok);
}

// The wave of unique row n, from its experts; those of other ranks are -1, which is past all others.
COMMLIB_HD int wave_of_row(const UnpackPlan& plan, int64_t n) {
  auto lowest = UINT32_MAX;
  for (int64_t i = n * plan.topk; i < (n + 1) * plan.topk; ++i) {
    const auto local = static_cast<uint32_t>(plan.slot.experts[i]);
    lowest = local < lowest ? local : lowest;
  }
  return wave_of(lowest, plan.experts);
}

// Copies this worker's rows of a wave to all their grouped rows. Lanes look for them side by side.
template <class Worker>
COMMLIB_HD void unpack_wave(Worker& w, const UnpackPlan& plan, int wave) {
  if (!plan.out_rows) return;  // they are there
  const Span part = w.share(plan.unique_rows());
  for (int64_t first = part.begin; first < part.end; first += w.lanes()) {
    const int64_t mine = first + w.lane();
    const bool now = mine < part.end && wave_of_row(plan, mine) == wave;
    for (uint64_t left = w.any_bits(static_cast<uint64_t>(now) << w.lane()); left; left &= left - 1) {
      unpack_row(w, plan, first + lowest_bit(left));
    }
  }
}

// Sends and unpacks all waves. A worker unpacks as soon as a wave has arrived, whether or not it has sent
// everything, and sends as long as none has: a late rank does not hold up what others send.
//
// of_routes: [tokens][width], written and read by the worker that sends the token. unpacked(wave): called by
// each worker when it has its part of the wave in place.
template <class Worker, class Unpacked>
COMMLIB_HD bool move_in_waves(Worker& w, const SendPlan& send, const UnpackPlan& unpack, uint8_t* of_routes,
                              const PeerTable& peers, const OpId& id, Unpacked unpacked) {
  plan_waves(w, send, of_routes);
  send_metadata_ahead(w, send, peers);
  Sending at{0, w.index()};
  for (int wave = 0; wave < kWaves;) {
    const bool ok = wave_has_arrived(w, peers, wave, id.epoch);
    if (!ok && at.wave < kWaves) {
      send_some(w, send, peers, of_routes, id, &at);
      continue;
    }
    if (!ok && !await_arrivals(w, peers, peers.all(), wave, id.epoch)) return false;
    if (wave == 0) prepare_unpacking(w, unpack);
    unpack_wave(w, unpack, wave);
    w.flush();
    unpacked(wave++);
  }
  return true;
}

}  // namespace commlib
