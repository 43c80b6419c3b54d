// Chunks and frames: how the two ends of a channel fill and empty it.
#pragma once

#include "protocol/internode/endpoints.h"
#include "protocol/plan.h"
#include "protocol/slot.h"

namespace commlib {

struct ChunkHeader {
  uint32_t frames;
  uint32_t last;  // nothing follows in this operation
  uint32_t tag;   // of the operation
  uint32_t padding[13];
};

// One token's part of a chunk. Which fields it has depends on what the chunk is for.
struct FrameLayout {
  int32_t rows_at;      // int32 [served]: its row at each rank that the gateway serves, in order; -1: none
  int32_t experts_at;   // int32 [topk]: global ids
  int32_t ordinals_at;  // int32 [topk]: see SendPlan
  int32_t weights_at;   // [topk]
  int32_t row_at;
  int32_t scales_at;
  int32_t bytes;

  COMMLIB_HD static FrameLayout of(int64_t served, int64_t experts, int64_t ordinals, int64_t weight_bytes,
                                   int64_t row_bytes, int64_t scale_bytes = 0) {
    constexpr int64_t kRowsAt = 4;  // the token comes first
    const int64_t experts_at = kRowsAt + 4 * served;
    const int64_t ordinals_at = experts_at + 4 * experts;
    const int64_t weights_at = align_up(ordinals_at + 4 * ordinals, 8);
    const int64_t row_at = align_up(weights_at + weight_bytes, kFrameAlign);
    const int64_t scales_at = row_at + align_up(row_bytes, kFrameAlign);
    return {static_cast<int32_t>(kRowsAt),
            static_cast<int32_t>(experts_at),
            static_cast<int32_t>(ordinals_at),
            static_cast<int32_t>(weights_at),
            static_cast<int32_t>(row_at),
            static_cast<int32_t>(scales_at),
            static_cast<int32_t>(scales_at + align_up(scale_bytes, kFrameAlign))};
  }
  COMMLIB_HD int64_t per_chunk(const ChannelShape& shape) const {
    return (shape.chunk_bytes - static_cast<int64_t>(sizeof(ChunkHeader))) / bytes;
  }
};

struct Frame {
  std::byte* at;
  const FrameLayout& layout;

  COMMLIB_HD int32_t* token() const { return reinterpret_cast<int32_t*>(at); }
  COMMLIB_HD int32_t* rows() const { return reinterpret_cast<int32_t*>(at + layout.rows_at); }
  COMMLIB_HD int32_t* experts() const { return reinterpret_cast<int32_t*>(at + layout.experts_at); }
  COMMLIB_HD int32_t* ordinals() const { return reinterpret_cast<int32_t*>(at + layout.ordinals_at); }
  COMMLIB_HD std::byte* weights() const { return at + layout.weights_at; }
  COMMLIB_HD std::byte* row() const { return at + layout.row_at; }
  COMMLIB_HD std::byte* scales() const { return at + layout.scales_at; }
};

// One queue's end of a channel, in one operation.
struct QueueEnd {
  const Internode& internode;
  const ChannelEnd& end;
  Direction direction;
  int queue;
  uint64_t epoch;

  COMMLIB_HD QueueState& state() const { return end.queues[queue]; }
  COMMLIB_HD uint64_t* word(uint64_t chunk) const {
    return end.words + internode.shape.position(queue, chunk);
  }
  COMMLIB_HD std::byte* chunk() const {
    return end.ring + internode.shape.position(queue, state().chunks) * internode.shape.chunk_bytes;
  }
  COMMLIB_HD const ChunkHeader& header() const { return *reinterpret_cast<const ChunkHeader*>(chunk()); }
  COMMLIB_HD Frame frame(const FrameLayout& layout, int64_t i) const {
    return {chunk() + sizeof(ChunkHeader) + i * layout.bytes, layout};
  }
  COMMLIB_HD bool finished() const { return state().finished == epoch; }

  // -- sending
  template <class Worker>
  COMMLIB_HD bool has_room(Worker& w) const {
    return w.all(state().chunks - w.read(word(0)) < static_cast<uint64_t>(internode.shape.chunks));
  }
  // Sends the chunk: all lanes have written their frames.
  template <class Worker>
  COMMLIB_HD void send(Worker& w, const FrameLayout& layout, int64_t frames, bool last,
                       int64_t cursor) const {
    if (w.lane() == 0) {
      auto* header = reinterpret_cast<ChunkHeader*>(chunk());
      *header = {static_cast<uint32_t>(frames), last ? 1u : 0u, static_cast<uint32_t>(epoch), {}};
    }
    w.flush();
    if (w.lane() == 0) {
      const auto bytes =
          static_cast<uint64_t>(static_cast<int64_t>(sizeof(ChunkHeader)) + frames * layout.bytes);
      w.post(internode.outbox,
             {PostKind::chunk, direction, static_cast<uint16_t>(queue), end.peer, state().chunks, bytes});
      ++state().chunks;
      advance(cursor, last);
    }
    w.all(true);
  }

  // -- receiving
  template <class Worker>
  COMMLIB_HD bool arrived(Worker& w) const {
    return w.all(w.read(word(state().chunks)) == state().chunks + 1);
  }
  // Whether the chunk is one of this operation, and fits(frame) holds of its frames. If not, its sender is to
  // blame, and the operation has failed.
  template <class Worker, class Fits>
  COMMLIB_HD bool check(Worker& w, const FrameLayout& layout, Fits fits) const {
    const int64_t frames = header().frames;
    bool ok = header().tag == static_cast<uint32_t>(epoch) && frames <= layout.per_chunk(internode.shape);
    for (int64_t f = w.lane(); ok && f < frames; f += w.lanes()) ok = fits(frame(layout, f));
    return w.all(ok) || refuse(w);
  }
  template <class Worker>
  COMMLIB_HD bool refuse(Worker& w) const {
    if (w.lane() == 0) w.malformed(end.peer, Phase::network);
    w.all(true);
    return false;
  }
  // Goes on to frame `cursor` of the chunk.
  template <class Worker>
  COMMLIB_HD void stay(Worker& w, int64_t cursor) const {
    w.all(true);
    if (w.lane() == 0) state().cursor = cursor;
    w.all(true);
  }
  // All frames have been read: the sender may fill the chunk again.
  template <class Worker>
  COMMLIB_HD void take(Worker& w) const {
    const bool last = header().last != 0;
    w.flush();
    if (w.lane() == 0) {
      ++state().chunks;
      advance(0, last);
      w.post(internode.outbox,
             {PostKind::taken, direction, static_cast<uint16_t>(queue), end.peer, state().chunks, 0});
    }
    w.all(true);
  }

 private:
  COMMLIB_HD void advance(int64_t cursor, bool last) const {
    state().cursor = last ? 0 : cursor;
    if (last) state().finished = epoch;
  }
};

// A worker's part of one operation between nodes: its queue of each channel.
struct InternodeQueue {
  const PeerTable& peers;
  const Internode& internode;
  int queue;
  uint64_t epoch;

  COMMLIB_HD QueueEnd to_gateway(int g) const {
    return {internode, internode.to_gateway[g], Direction::outward, queue, epoch};
  }
  COMMLIB_HD QueueEnd from_gateway(int g) const {
    return {internode, internode.from_gateway[g], Direction::homeward, queue, epoch};
  }
  COMMLIB_HD QueueEnd from_source(int s) const {
    return {internode, internode.from_source[s], Direction::outward, queue, epoch};
  }
  COMMLIB_HD QueueEnd to_source(int s) const {
    return {internode, internode.to_source[s], Direction::homeward, queue, epoch};
  }
};

// The progress as it is before any lane looks for something to do. Lanes read it one after another, and one
// that read it after the others looked must not wait for what those have missed.
template <class Worker>
COMMLIB_HD uint64_t oldest_progress(Worker& w, const Internode& internode) {
  return static_cast<uint64_t>(w.lowest(static_cast<int64_t>(w.read(internode.progress))));
}

// Whether this worker sends to other nodes, and passes on what comes from them.
template <class Worker>
COMMLIB_HD bool has_queue(Worker& w, const PeerTable& peers) {
  return Worker::kInternode && peers.internode && w.index() < peers.internode->shape.queues;
}

// -- which rows go where

// The first token from t on, and before `end`, that has a row at one of `ranks`; else `end`.
template <class Worker>
COMMLIB_HD int64_t next_token_to(Worker& w, const int64_t* routes, int width, int64_t t, int64_t end,
                                 uint64_t ranks) {
  for (; t < end; t += w.lanes()) {
    const int64_t mine = t + w.lane();
    const bool goes = mine < end && route_to(routes + mine * width, width, ranks) < width;
    const int64_t first = w.lowest(goes ? mine : INT64_MAX);
    if (first != INT64_MAX) return first;
  }
  return end;
}

// The token's rows at the ranks that a gateway serves.
template <class Worker>
COMMLIB_HD void write_rows(Worker& w, const Frame& frame, const int64_t* route, int width, int64_t token,
                           uint64_t serves, int served) {
  if (w.lane() == 0) *frame.token() = static_cast<int32_t>(token);
  for (int i = w.lane(); i < served; i += w.lanes()) frame.rows()[i] = -1;
  w.all(true);
  for (int j = w.lane(); j < width; j += w.lanes()) {
    if (route[j] == kNoRoute || !has(serves, rank_of(route[j]))) continue;
    frame.rows()[index_in(serves, rank_of(route[j]))] = static_cast<int32_t>(row_of(route[j]));
  }
}

template <class Worker>
COMMLIB_HD void write_experts(Worker& w, const Frame& frame, const int64_t* topk_idx, int topk,
                              const Placement& placement) {
  for (int k = w.lane(); k < topk; k += w.lanes()) {
    frame.experts()[k] = static_cast<int32_t>(expert_of(topk_idx[k], placement.experts));
  }
}

// What other ranks' frames say about rows is checked before it is used: a row may go to any position of the
// slot.
COMMLIB_HD bool all_in(const int32_t* values, int n, int64_t begin, int64_t end) {
  for (int i = 0; i < n; ++i) {
    if (values[i] < begin || values[i] >= end) return false;
  }
  return true;
}

COMMLIB_HD bool places_fit(const Frame& frame, const SlotLayout& layout, const Internode& internode) {
  return all_in(frame.token(), 1, 0, layout.max_tokens) &&
         all_in(frame.rows(), count_bits(internode.served), -1, layout.capacity);
}

// Sends one chunk of a source's frames for one gateway, if there is room: fill(frame, token) writes each.
// Returns whether anything was sent.
template <class Worker, class Fill>
COMMLIB_HD bool send_frames(Worker& w, const QueueEnd& to, const FrameLayout& layout, const int64_t* routes,
                            int width, int64_t tokens, uint64_t serves, Fill fill) {
  if (to.finished() || !to.has_room(w)) return false;
  const Span part = share_of(tokens, to.queue, to.internode.shape.queues);
  const int64_t begin = part.begin + to.state().cursor;
  int64_t t = next_token_to(w, routes, width, begin, part.end, serves);
  int64_t frames = 0;
  for (const int64_t most = layout.per_chunk(to.internode.shape); frames < most && t < part.end; ++frames) {
    fill(to.frame(layout, frames), t);
    t = next_token_to(w, routes, width, t + 1, part.end, serves);
  }
  to.send(w, layout, frames, t >= part.end, t - part.begin);
  return true;
}

}  // namespace commlib
