// Dispatch to other nodes. Each queue's worker is source and gateway at once, and never waits as one while it
// could work as the other: so no two ranks can wait for each other.
#pragma once

#include "protocol/dispatch.h"
#include "protocol/failure.h"
#include "protocol/internode/channel.h"

namespace commlib {

COMMLIB_HD FrameLayout dispatch_layout(const SendPlan& plan, const Internode& internode, bool with_weights) {
  return FrameLayout::of(internode.served_most, plan.is_fresh() || with_weights ? plan.topk : 0,
                         plan.is_fresh() ? plan.topk : 0,
                         with_weights ? plan.topk * plan.layout.weight_bytes : 0, plan.layout.row_bytes,
                         plan.layout.scale_bytes);
}

// A queue's part in one dispatch.
struct DispatchQueue : InternodeQueue {
  const SendPlan& plan;
  FrameLayout layout;
  bool with_weights;  // on all ranks alike, also where there are no tokens
};

COMMLIB_HD DispatchQueue dispatch_queue(const SendPlan& plan, const PeerTable& peers, const OpId& id,
                                        int queue) {
  const Internode& internode = *peers.internode;
  const bool with_weights = id.call.has(kCallHasWeights);
  return {{peers, internode, queue, id.epoch},
          plan,
          dispatch_layout(plan, internode, with_weights),
          with_weights};
}

template <class Worker>
COMMLIB_HD void write_token_metadata(Worker& w, const DispatchQueue& d, const Frame& frame, int64_t t) {
  const SendPlan& plan = d.plan;
  const int64_t at = t * plan.topk, wb = plan.layout.weight_bytes;
  if (plan.is_fresh() || d.with_weights)
    write_experts(w, frame, plan.topk_idx + at, plan.topk, plan.placement);
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    if (plan.is_fresh()) frame.ordinals()[k] = plan.ordinals[at + k];
    if (d.with_weights) w.copy_scalar(frame.weights() + k * wb, plan.weights + (at + k) * wb, wb);
  }
}

template <class Worker>
COMMLIB_HD bool send_to_gateway(Worker& w, const DispatchQueue& d, int g) {
  const SendPlan& plan = d.plan;
  const Gateway& gateway = d.internode.gateway[g];
  return send_frames(w, d.to_gateway(g), d.layout, plan.routes, plan.width, plan.tokens, gateway.serves,
                     [&](const Frame& frame, int64_t t) {
                       write_rows(w, frame, plan.routes + t * plan.width, plan.width, t, gateway.serves,
                                  d.internode.served_most);
                       write_token_metadata(w, d, frame, t);
                       copy_token(w, plan, t, 1, [&](int, const RowArray& array) -> Target {
                         return array.at == 0 ? frame.row() : frame.scales();
                       });
                     });
}

// Passes one token's row on to the ranks of this node that want it.
template <class Worker>
COMMLIB_HD void pass_row_on(Worker& w, const DispatchQueue& d, const Frame& frame) {
  const SendPlan& plan = d.plan;
  const int served = count_bits(d.internode.served);
  const TokenMetadata<int32_t> of{*frame.token(), frame.experts(), frame.ordinals(),
                                  d.with_weights ? frame.weights() : nullptr};
  for (int i = 0; (plan.is_fresh() || d.with_weights) && i < served; ++i) {
    const int32_t row = frame.rows()[i];
    if (row < 0) continue;
    write_row_metadata(w, plan, d.peers, rank_at(d.internode.served, i), row, of);
  }
  copy_row(w, plan.layout, frame.row(), frame.scales(), served, [&](int i, const RowArray& array) -> Target {
    const int32_t row = frame.rows()[i];
    if (row < 0) return nullptr;
    return place_in_slot(plan, d.peers, rank_at(d.internode.served, i), row, array);
  });
}

COMMLIB_HD bool frame_fits(const DispatchQueue& d, const Frame& frame) {
  const SendPlan& plan = d.plan;
  if (!places_fit(frame, plan.layout, d.internode)) return false;
  if (!plan.is_fresh() && !d.with_weights) return true;
  for (int k = 0; k < plan.topk; ++k) {
    const int32_t* expert = &frame.experts()[k];
    if (!all_in(expert, 1, -1, plan.placement.experts)) return false;
    if (!plan.is_fresh() || *expert < 0) continue;
    if (!all_in(&frame.ordinals()[k], 1, 0, plan.layout.max_tokens * plan.topk)) return false;
  }
  return true;
}

// This queue has passed on all that a source has for this node. The last queue to say so tells the ranks
// served that the source's rows are in place; as in protocol/arrival.h, it has acquired what the others
// wrote.
template <class Worker>
COMMLIB_HD void arrive_for_source(Worker& w, const DispatchQueue& d, int s) {
  if (!is_last(w, &d.internode.passed_on[s], 1, d.internode.shape.queues)) return;
  publish_arrival(w, d.peers, d.internode.served, d.internode.from_source[s].peer, kLastWave, d.epoch);
}

// Passes on one chunk of a source, if it is there.
template <class Worker>
COMMLIB_HD bool pass_chunk_on(Worker& w, const DispatchQueue& d, int s) {
  const QueueEnd from = d.from_source(s);
  if (from.finished() || !from.arrived(w)) return false;
  if (!from.check(w, d.layout, [&](const Frame& frame) { return frame_fits(d, frame); })) return false;
  for (int64_t i = 0; i < from.header().frames; ++i) pass_row_on(w, d, from.frame(d.layout, i));
  from.take(w);
  if (from.finished()) arrive_for_source(w, d, s);
  return true;
}

// Does everything that can be done now; `awaited`: the ranks that the queue still needs, as a mask, none when
// it has finished.
template <class Worker>
COMMLIB_HD bool advance_dispatch(Worker& w, const DispatchQueue& d, uint64_t* awaited) {
  bool moved = false;
  *awaited = 0;
  for (int g = 0; g < d.internode.gateways; ++g) {
    moved |= send_to_gateway(w, d, g);
    if (!d.to_gateway(g).finished()) *awaited |= bit_of(d.internode.gateway[g].rank);
  }
  for (int s = 0; s < d.internode.sources; ++s) {
    moved |= pass_chunk_on(w, d, s);
    if (!d.from_source(s).finished()) *awaited |= bit_of(d.internode.from_source[s].peer);
  }
  return moved;
}

// Sends what there is room for, before anything is waited for.
template <class Worker>
COMMLIB_HD void start_internode(Worker& w, const DispatchQueue& d) {
  for (int g = 0; g < d.internode.gateways; ++g) {
    while (send_to_gateway(w, d, g)) {
    }
  }
}

template <class Worker>
COMMLIB_HD bool finish_internode(Worker& w, const DispatchQueue& d) {
  for (;;) {
    const uint64_t seen = oldest_progress(w, d.internode);
    uint64_t awaited;
    const bool moved = advance_dispatch(w, d, &awaited);
    if (awaited == 0) return true;
    if (!moved && !w.await_change(d.internode, seen, awaited)) return false;
  }
}

// The rows of one dispatch, from the ranks that have them to those that want them.
template <class Worker>
COMMLIB_HD bool move_rows(Worker& w, const SendPlan& plan, const PeerTable& peers, const OpId& id) {
  const bool internode = has_queue(w, peers);
  if (internode) start_internode(w, dispatch_queue(plan, peers, id, w.index()));
  send_rows(w, plan, peers);
  if (arrive(w, peers, id.epoch)) w.ended(id);
  const bool passed = !internode || finish_internode(w, dispatch_queue(plan, peers, id, w.index()));
  return w.once([&] { return await_arrivals(w, peers, peers.all(), kLastWave, id.epoch); }) && passed;
}

}  // namespace commlib
