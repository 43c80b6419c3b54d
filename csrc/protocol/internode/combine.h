// Combine from other nodes. A source asks each gateway for its tokens, with their rows at the ranks that the
// gateway serves; the gateway sums those rows, in ascending order of rank, with one rounding, and one row for
// each (token, node) comes back. Answers come in order of token, so the source sums a token as soon as the
// next answer of each gateway that it needs is there, in the order in which its routes name the gateways.
#pragma once

#include "protocol/combine.h"
#include "protocol/failure.h"
#include "protocol/internode/channel.h"

namespace commlib {

// A queue's part in one combine.
struct CombineQueue : InternodeQueue {
  const PullPlan& plan;
  FrameLayout request, answer;
  bool with_weights;  // weight gradients ride back; on all ranks alike
};

COMMLIB_HD FrameLayout request_layout(const PullPlan& plan, const Internode& internode, bool with_weights) {
  return FrameLayout::of(internode.served_most, with_weights ? plan.topk : 0, 0, 0, 0);
}
COMMLIB_HD FrameLayout answer_layout(const PullPlan& plan, bool with_weights) {
  return FrameLayout::of(0, 0, 0, with_weights ? plan.topk * plan.layout.weight_bytes : 0,
                         plan.layout.row_bytes);
}

template <class Worker>
COMMLIB_HD bool ask_gateway(Worker& w, const CombineQueue& c, int g) {
  const PullPlan& plan = c.plan;
  const uint64_t serves = c.internode.gateway[g].serves;
  return send_frames(w, c.to_gateway(g), c.request, plan.routes, plan.width, plan.tokens, serves,
                     [&](const Frame& frame, int64_t t) {
                       write_rows(w, frame, plan.routes + t * plan.width, plan.width, t, serves,
                                  c.internode.served_most);
                       if (c.with_weights)
                         write_experts(w, frame, plan.topk_idx + t * plan.topk, plan.topk, plan.placement);
                     });
}

// -- the gateway's part

template <class Worker>
COMMLIB_HD void answer_weights(Worker& w, const CombineQueue& c, const Frame& asked, const Frame& answer) {
  const PullPlan& plan = c.plan;
  const int64_t wb = plan.layout.weight_bytes;
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    const int32_t e = asked.experts()[k];
    const int p = e < 0 ? c.peers.rank : plan.placement.owner(e);
    const int32_t row =
        e < 0 || !has(c.internode.served, p) ? -1 : asked.rows()[index_in(c.internode.served, p)];
    const std::byte* from =
        row < 0 ? nullptr : slot_of(plan, c.peers, p).weights + (int64_t{row} * plan.topk + k) * wb;
    w.copy_scalar(answer.weights() + k * wb, from, wb);
  }
}

template <class Worker>
COMMLIB_HD void answer_frame(Worker& w, const CombineQueue& c, const Frame& asked, const Frame& answer) {
  const PullPlan& plan = c.plan;
  if (w.lane() == 0) *answer.token() = *asked.token();
  if (c.with_weights) answer_weights(w, c, asked, answer);
  const auto rows = w.template list<Term>(count_bits(c.internode.served), [&](int i) -> Term {
    const int32_t row = asked.rows()[i];
    if (row < 0) return {nullptr, nullptr};
    return {slot_of(plan, c.peers, rank_at(c.internode.served, i)).rows + row * plan.layout.row_bytes,
            nullptr};
  });
  w.reduce(plan.dtype, answer.row(), rows, plan.hidden);
}

COMMLIB_HD bool request_fits(const CombineQueue& c, const Frame& frame) {
  const PullPlan& plan = c.plan;
  return places_fit(frame, plan.layout, c.internode) &&
         (!c.with_weights || all_in(frame.experts(), plan.topk, -1, plan.placement.experts));
}

// Sends one chunk of answers to a source, if it has asked and there is room.
template <class Worker>
COMMLIB_HD bool answer_source(Worker& w, const CombineQueue& c, int s) {
  const QueueEnd from = c.from_source(s), to = c.to_source(s);
  if (from.finished() || !from.arrived(w) || !to.has_room(w)) return false;
  const auto fits = [&](const Frame& frame) { return request_fits(c, frame); };
  if (from.state().cursor == 0 && !from.check(w, c.request, fits)) return false;
  const int64_t most = c.answer.per_chunk(c.internode.shape);
  const int64_t frames = from.header().frames;
  const bool last = from.header().last != 0;
  int64_t f = from.state().cursor, answers = 0;
  for (; answers < most && f < frames; ++answers, ++f) {
    answer_frame(w, c, from.frame(c.request, f), to.frame(c.answer, answers));
  }
  to.send(w, c.answer, answers, last && f == frames, 0);
  if (f == frames) {
    from.take(w);
  } else {
    from.stay(w, f);
  }
  return true;
}

// -- the source's part

// The gateways that token t waits for, as a mask.
COMMLIB_HD uint64_t gateways_of(const CombineQueue& c, const int64_t* route) {
  uint64_t gateways = 0;
  for (int j = 0; j < c.plan.width && route[j] != kNoRoute; ++j) {
    const int p = rank_of(route[j]);
    if (!c.peers.is_near(p)) gateways |= uint64_t{1} << c.internode.gateway_of[p];
  }
  return gateways;
}

// Whether the next answer of a gateway is there. Takes chunks that have no more answers.
template <class Worker>
COMMLIB_HD bool has_answer(Worker& w, const CombineQueue& c, const QueueEnd& from) {
  while (!from.finished() && from.arrived(w)) {
    if (from.state().cursor == 0 && !from.check(w, c.answer, [](const Frame&) { return true; })) return false;
    if (from.state().cursor < from.header().frames) return true;
    from.take(w);
  }
  return false;
}

// Whether that is the answer for token t: they come in order.
template <class Worker>
COMMLIB_HD bool has_answer_for(Worker& w, const CombineQueue& c, const QueueEnd& from, int64_t t) {
  return has_answer(w, c, from) &&
         (*from.frame(c.answer, from.state().cursor).token() == t || from.refuse(w));
}

// Gradients of topk_weights come with the rows of the ranks that own the experts.
template <class Worker>
COMMLIB_HD void take_weights(Worker& w, const CombineQueue& c, int64_t t) {
  const PullPlan& plan = c.plan;
  const int64_t wb = plan.layout.weight_bytes;
  for (int k = w.lane(); k < plan.topk; k += w.lanes()) {
    const int64_t e = plan.topk_idx[t * plan.topk + k];
    if (e < 0) continue;
    const int p = plan.placement.owner(e);
    // A token whose row there was dropped has no answer from it.
    if (c.peers.is_near(p) || route_to(plan.routes + t * plan.width, plan.width, bit_of(p)) == plan.width)
      continue;
    const QueueEnd from = c.from_gateway(c.internode.gateway_of[p]);
    w.copy_scalar(plan.out_weights + (t * plan.topk + k) * wb,
                  from.frame(c.answer, from.state().cursor).weights() + k * wb, wb);
  }
}

template <class Worker>
COMMLIB_HD void sum_token(Worker& w, const CombineQueue& c, int64_t t, uint64_t gateways) {
  const PullPlan& plan = c.plan;
  const int64_t* route = plan.routes + t * plan.width;
  const TokenRows near = TokenRows::in_order(route, plan.width);  // between nodes no slot is grouped
  const auto rows = w.template list<Term>(plan.width + 1, [&](int j) -> Term {
    if (j == plan.width || route[j] == kNoRoute || c.peers.is_near(rank_of(route[j])))
      return near_term(plan, c.peers, near, t, j);
    const int g = c.internode.gateway_of[rank_of(route[j])];
    if (route_to(route, plan.width, c.internode.gateway[g].serves) != j)
      return {nullptr, nullptr};  // has been added
    const QueueEnd from = c.from_gateway(g);
    return {from.frame(c.answer, from.state().cursor).row(), nullptr};
  });
  w.reduce(plan.dtype, plan.out + t * plan.layout.row_bytes, rows, plan.hidden);
  if (plan.out_weights) {
    pull_weights(w, plan, c.peers, t);
    take_weights(w, c, t);
  }
  for (; gateways; gateways &= gateways - 1) {
    const QueueEnd from = c.from_gateway(lowest_bit(gateways));
    from.stay(w, from.state().cursor + 1);
  }
}

// Sums tokens from *t on, as far as answers are there.
template <class Worker>
COMMLIB_HD bool sum_tokens(Worker& w, const CombineQueue& c, int64_t* t, int64_t end) {
  bool moved = false;
  for (; *t < end; ++*t) {
    const uint64_t gateways = gateways_of(c, c.plan.routes + *t * c.plan.width);
    for (uint64_t left = gateways; left; left &= left - 1) {
      if (!has_answer_for(w, c, c.from_gateway(lowest_bit(left)), *t)) return moved;
    }
    if (!gateways) continue;  // pull_rows does those
    sum_token(w, c, *t, gateways);
    moved = true;
  }
  for (int g = 0; g < c.internode.gateways; ++g)
    has_answer(w, c, c.from_gateway(g));  // a last chunk may be empty
  return moved;
}

// Does everything that can be done now; `awaited`: the ranks from which something must come for the queue to
// go on, as a mask, none when it has finished.
template <class Worker>
COMMLIB_HD bool advance_combine(Worker& w, const CombineQueue& c, int64_t* t, int64_t end,
                                uint64_t* awaited) {
  bool moved = false;
  uint64_t unfinished = 0;
  *awaited = 0;
  for (int g = 0; g < c.internode.gateways; ++g) moved |= ask_gateway(w, c, g);
  for (int s = 0; s < c.internode.sources; ++s) {
    moved |= answer_source(w, c, s);
    if (!c.from_source(s).finished()) *awaited |= bit_of(c.internode.from_source[s].peer);
  }
  moved |= sum_tokens(w, c, t, end);
  for (int g = 0; g < c.internode.gateways; ++g) {
    const QueueEnd to = c.to_gateway(g), from = c.from_gateway(g);
    if (to.finished() && from.finished()) continue;
    unfinished |= bit_of(from.end.peer);
    // An answer may be there, and wait for another gateway's for the same token: its sender has done its
    // part, may have closed since, and is not to blame.
    if (!to.finished() || !from.arrived(w)) *awaited |= bit_of(from.end.peer);
  }
  if (*awaited == 0) *awaited = unfinished;  // it came after the queue looked
  return moved;
}

COMMLIB_HD CombineQueue combine_queue(const PullPlan& plan, const PeerTable& peers, const OpId& id,
                                      int queue) {
  const Internode& internode = *peers.internode;
  const bool with_weights = id.call.has(kCallHasWeights);
  return {{peers, internode, queue, id.epoch},
          plan,
          request_layout(plan, internode, with_weights),
          answer_layout(plan, with_weights),
          with_weights};
}

// Asks for as much as there is room for, before anything is waited for.
template <class Worker>
COMMLIB_HD void start_pull(Worker& w, const PullPlan& plan, const PeerTable& peers, const OpId& id) {
  if (!has_queue(w, peers)) return;
  const CombineQueue c = combine_queue(plan, peers, id, w.index());
  for (int g = 0; g < c.internode.gateways; ++g) {
    while (ask_gateway(w, c, g)) {
    }
  }
}

// Tokens that have rows on other nodes, and what ranks there ask for.
template <class Worker>
COMMLIB_HD bool pull_internode(Worker& w, const PullPlan& plan, const PeerTable& peers, const OpId& id) {
  const CombineQueue c = combine_queue(plan, peers, id, w.index());
  const Span part = share_of(plan.tokens, c.queue, c.internode.shape.queues);
  for (int64_t t = part.begin;;) {
    const uint64_t seen = oldest_progress(w, c.internode);
    uint64_t awaited;
    const bool moved = advance_combine(w, c, &t, part.end, &awaited);
    if (awaited == 0) return true;
    if (!moved && !w.await_change(c.internode, seen, awaited)) return false;
  }
}

// All tokens: first those whose rows all lie on this node.
template <class Worker>
COMMLIB_HD bool pull_all(Worker& w, const PullPlan& plan, const PeerTable& peers, const OpId& id) {
  pull_rows(w, plan, peers);
  return !has_queue(w, peers) || pull_internode(w, plan, peers, id);
}

}  // namespace commlib
