// What a warp does with rows: copies, sums, weighs, zeros.
//
// Rows go through a ring of shared memory that belongs to the warp: the bulk copy engine fills its stages and
// empties them while the warp goes on. One kernel uses either sum or the others, so each lays the ring out as
// it likes. Where there is no such engine, each lane has several loads under way at once. Rows are shorter
// than 2 GiB.
#pragma once

#include "cuda/worker.cuh"

namespace commlib::cuda {

constexpr int kPieceBytes = kWarpLanes * 16;  // 16 bytes a lane
constexpr int kPlainLoads = 4;
constexpr int kLongestChunk = kSumPieces * kPieceBytes;  // of a row in a sum

// The ring in multicast: how many stages, and how many chunks are loaded ahead of the one that is stored. A
// stage is loaded again when the stores of its last chunk have read it, up to kSendPending chunks later.
constexpr int kSendStages = 4;
constexpr int kSendAhead = 2;
constexpr int kSendPending = kSendStages - kSendAhead - 1;
static_assert(kSendStages <= WarpShared::kBarriers && kSendPending >= 0);

__device__ inline bool WarpWorker::all_aligned(uintptr_t bits) const {
  return __all_sync(kAllLanes, bits % 16 == 0);
}

__device__ inline void WarpWorker::zero(std::byte* dst, int64_t bytes) const {
  if ((reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(bytes)) % 16 == 0) {
    for (int64_t i = lane_ * 16; i < bytes; i += kPieceBytes) ptx::store_global(dst + i, ptx::Vec16{});
    return;
  }
  for (int64_t i = lane_; i < bytes; i += kWarpLanes) dst[i] = std::byte{0};
}

// One element at a time.
template <class T>
__device__ inline void WarpWorker::element_multicast(List<Target> to, const std::byte* src,
                                                     int64_t bytes) const {
  for (int64_t i = lane_; i < bytes / static_cast<int64_t>(sizeof(T)); i += kWarpLanes) {
    const T v = reinterpret_cast<const T*>(src)[i];
    for (int j = 0; j < to.count; ++j) reinterpret_cast<T*>(to.items[j])[i] = v;
  }
}

__device__ inline void WarpWorker::multicast(List<Target> to, const std::byte* src, int64_t bytes) {
  const Target mine = lane_ < to.count ? to.items[lane_] : nullptr;  // at most topk, which is a warp's lanes
  const auto bits =
      reinterpret_cast<uintptr_t>(mine) | reinterpret_cast<uintptr_t>(src) | static_cast<uintptr_t>(bytes);
  const bool aligned = all_aligned(bits);
  const bool of_pairs = __all_sync(kAllLanes, bits % 2 == 0);
  if (to.count == 0) return;
  if (!aligned) {
    of_pairs ? element_multicast<uint16_t>(to, src, bytes) : element_multicast<uint8_t>(to, src, bytes);
  } else if constexpr (ptx::kHasBulkCopies) {
    bulk_multicast(mine, src, bytes);
  } else {
    plain_multicast(to, src, bytes);
  }
}

// Lane 0 loads chunks of the row ahead; each lane stores them to its own target. When a chunk is loaded, all
// but each lane's newest kSendPending groups of stores must have read their stages.
__device__ inline void WarpWorker::bulk_multicast(Target mine, const std::byte* src, int64_t bytes) {
  const int stage_bytes = op_.ring_bytes / kSendStages;
  Turn ahead = turn_;
  int64_t loaded = 0;
  const auto load_next = [&] {
    const int64_t n = bytes - loaded < stage_bytes ? bytes - loaded : stage_bytes;
    ptx::bulk_wait_read<kSendPending>();
    __syncwarp();
    if (lane_ == 0) load_into_ring(ahead.stage, stage_bytes, src + loaded, n);
    ahead.next(kSendStages);
    loaded += n;
  };
  for (int i = 0; i < kSendAhead && loaded < bytes; ++i) load_next();
  for (int64_t sent = 0; sent < bytes; sent += stage_bytes) {
    if (loaded < bytes) load_next();
    const int64_t n = bytes - sent < stage_bytes ? bytes - sent : stage_bytes;
    await_ring(turn_);
    if (mine)
      ptx::bulk_store(mine + sent, shared_.ring + turn_.stage * stage_bytes, static_cast<uint32_t>(n));
    ptx::bulk_commit();
    turn_.next(kSendStages);
  }
}

__device__ inline void WarpWorker::plain_multicast(List<Target> to, const std::byte* src,
                                                   int64_t bytes) const {
  for (int64_t at = lane_ * 16; at < bytes; at += kPlainLoads * kPieceBytes) {
    ptx::Vec16 v[kPlainLoads];
#pragma unroll
    for (int u = 0; u < kPlainLoads; ++u) {
      const int64_t i = at + u * kPieceBytes;
      v[u] = ptx::load_global(src + (i < bytes ? i : 0));  // past the end: anything, but no branch
    }
    for (int j = 0; j < to.count; ++j) {
#pragma unroll
      for (int u = 0; u < kPlainLoads; ++u) {
        const int64_t i = at + u * kPieceBytes;
        if (i < bytes) ptx::store_global(to.items[j] + i, v[u]);
      }
    }
  }
}

__device__ inline void WarpWorker::weigh(DType t, std::byte* dst, const Term& term, const std::byte* y,
                                         int64_t elements, std::byte* dot) {
  switch (t) {
    case DType::bf16:
      return weigh_as<Bf16>(dst, term, y, elements, dot);
    case DType::f16:
      return weigh_as<Half>(dst, term, y, elements, dot);
    case DType::f32:
      return weigh_as<float>(dst, term, y, elements, dot);
    case DType::f64:
      return weigh_as<double>(dst, term, y, elements, dot);
  }
}

// A lane has every 32nd 16 bytes, however they come: so the product has the same bits on every device.
template <class T>
__device__ void WarpWorker::weigh_as(std::byte* dst, const Term& term, const std::byte* y, int64_t elements,
                                     std::byte* dot) {
  using Acc = Accumulator<T>;
  constexpr int kElements = Weighed16<T>::kElements;
  const int bytes = static_cast<int>(elements) * static_cast<int>(sizeof(T));
  const Acc weight = *reinterpret_cast<const Acc*>(term.weight);
  Acc sum = 0;
  if (!all_aligned(reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(term.row) |
                   reinterpret_cast<uintptr_t>(y) | static_cast<uintptr_t>(bytes))) {
    for (int64_t i = lane_ * kElements; i < elements; i += kWarpLanes * kElements) {
      weigh_elements(reinterpret_cast<T*>(dst) + i, reinterpret_cast<const T*>(term.row) + i,
                     reinterpret_cast<const T*>(y) + i, elements - i, weight, &sum);
    }
  } else if constexpr (ptx::kHasBulkCopies) {
    sum = bulk_weigh<T>(dst, term, y, bytes);
  } else {
    for (int i = lane_ * 16; i < bytes; i += kPieceBytes) {
      const ptx::Vec16 row = ptx::load_global(term.row + i), of_y = ptx::load_global(y + i);
      ptx::store_global(dst + i, weigh16<T>(row, of_y, weight, &sum));
    }
  }
  for (int step = kWarpLanes / 2; step > 0; step /= 2) sum += __shfl_sync(kAllLanes, sum, lane_ ^ step);
  if (lane_ == 0) *reinterpret_cast<Acc*>(dot) = sum;
}

// A chunk of the row and the same chunk of y come through two stages of multicast's ring, one after the
// other, while the chunk before is weighed. Returns the lane's part of the product.
template <class T>
__device__ Accumulator<T> WarpWorker::bulk_weigh(std::byte* dst, const Term& term, const std::byte* y,
                                                 int bytes) {
  static_assert(kSendStages % 2 == 0);
  const auto weight = *reinterpret_cast<const Accumulator<T>*>(term.weight);
  const int stage_bytes = op_.ring_bytes / kSendStages;
  const int chunk = stage_bytes / kPieceBytes * kPieceBytes;
  Turn ahead = turn_;
  int loaded = 0;
  const auto load = [&](const std::byte* src) {
    const int n = bytes - loaded < chunk ? bytes - loaded : chunk;
    if (lane_ == 0) load_into_ring(ahead.stage, stage_bytes, src + loaded, n);
    ahead.next(kSendStages);
  };
  const auto load_both = [&] {
    load(term.row);
    load(y);
    loaded += chunk;
  };
  const auto next_stage = [&] {
    const std::byte* stage = shared_.ring + turn_.stage * stage_bytes + lane_ * 16;
    await_ring(turn_);
    turn_.next(kSendStages);
    return stage;
  };
  ptx::bulk_wait_read<0>();  // what the warp has sent has left the ring
  __syncwarp();
  for (int i = 0; i < kSendStages / 2 && loaded < bytes; ++i) load_both();
  Accumulator<T> sum = 0;
  for (int at = 0; at < bytes; at += chunk) {
    const std::byte *row = next_stage(), *of_y = next_stage();
    const int n = (bytes - at < chunk ? bytes - at : chunk) - lane_ * 16;
    std::byte* to = dst + at + lane_ * 16;
    for (int i = 0; i < n; i += kPieceBytes) {
      ptx::store_global(to + i,
                        weigh16<T>(ptx::load_shared(row + i), ptx::load_shared(of_y + i), weight, &sum));
    }
    __syncwarp();  // all lanes have read the stages
    if (loaded < bytes) load_both();
  }
  return sum;
}

enum class Summing { unweighted, weighted, parts };

// A lane's pieces of a sum: as many as fit a stage of the ring, or half, where registers hold parts as well.
// One kernel may take sums of either kind in turn, so the ring has the same stages for both.
template <class T, int kMost, Summing kHow>
class LaneSums {
 public:
  static constexpr int kPieces = kHow == Summing::parts ? kMost / 2 : kMost;
  static constexpr int kStageBytes = kMost * kPieceBytes;

  // Of row j. `weights`: of all rows, read unless they have none.
  __device__ void add(const ptx::Vec16 (&row)[kPieces], List<Term> terms, const std::byte* weights, int j) {
    if constexpr (kHow == Summing::unweighted) {
#pragma unroll
      for (int u = 0; u < kPieces; ++u) sums_[u].add(row[u]);
      return;
    }
    const auto weight = reinterpret_cast<const Accumulator<T>*>(weights)[j];
    if constexpr (kHow == Summing::parts) {
      // A whole term is its own last part: it is rounded already, and its weight is 1.
      return add_part(row, weight, terms.items[j].kind != TermKind::part);
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) sums_[u].add(row[u], weight);
  }

  // Stores those that lie before `end`; the first is at `at`.
  __device__ void store(std::byte* dst, int at, int end) const {
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int i = at + u * kPieceBytes;
      if (i < end) ptx::store_global(dst + i, sums_[u].rounded());
    }
  }

 private:
  __device__ void add_part(const ptx::Vec16 (&row)[kPieces], Accumulator<T> weight, bool last) {
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      parts_[u].add(row[u], weight);
      if (!last) continue;
      sums_[u].add(parts_[u].rounded());
      parts_[u] = {};
    }
  }

  Sum16<T> sums_[kPieces];
  Sum16<T> parts_[kHow == Summing::parts ? kPieces : 1];
};

// Whether any term has a weight, or is a part; if so, all weights' values are in shared memory, and terms
// without one have 1, which changes no bit of a number.
template <class T>
__device__ bool WarpWorker::gather_weights(List<Term> terms, bool parts) const {
  using Acc = Accumulator<T>;
  bool weighted = parts;
  for (int j = lane_; j < terms.count; j += kWarpLanes) weighted |= terms.items[j].weight != nullptr;
  if (!__any_sync(kAllLanes, weighted)) return false;
  for (int j = lane_; j < terms.count; j += kWarpLanes) {
    const std::byte* weight = terms.items[j].weight;
    reinterpret_cast<Acc*>(shared_.weights)[j] = weight ? *reinterpret_cast<const Acc*>(weight) : Acc{1};
  }
  __syncwarp();  // all lanes have left the previous sum, because this list has replaced its list
  return true;
}

template <class T, int kUnroll, bool kParts>
__device__ void WarpWorker::sum(std::byte* dst, List<Term> terms, int64_t elements) {
  const int bytes = static_cast<int>(elements) * static_cast<int>(sizeof(T));
  uintptr_t bits = reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(bytes);
  bool parts = false;
  for (int j = lane_; j < terms.count; j += kWarpLanes) {
    bits |= reinterpret_cast<uintptr_t>(terms.items[j].row);
    parts |= terms.items[j].kind != TermKind::whole;
  }
  if (!all_aligned(bits)) {
    for (int64_t i = lane_; i < elements; i += kWarpLanes) {
      reinterpret_cast<T*>(dst)[i] = sum_element<T>(terms, i);
    }
    return;
  }
  parts = __any_sync(kAllLanes, parts);
  const bool weighted = gather_weights<T>(terms, parts);
  if constexpr (kParts) {
    if (parts) return sum_as<LaneSums<T, kUnroll, Summing::parts>>(dst, terms, bytes);
  }
  if (weighted) return sum_as<LaneSums<T, kUnroll, Summing::weighted>>(dst, terms, bytes);
  sum_as<LaneSums<T, kUnroll, Summing::unweighted>>(dst, terms, bytes);
}

template <class Sums>
__device__ void WarpWorker::sum_as(std::byte* dst, List<Term> terms, int bytes) {
  if constexpr (ptx::kHasBulkCopies) {
    bulk_sum<Sums>(dst, terms, bytes);
  } else {
    plain_sum<Sums>(dst, terms, bytes);
  }
}

// Chunks of all rows come through the ring in the order in which they are added: chunk 0 of each row, chunk 1
// of each row, ... Lane 0 keeps every free stage loading. For a row's last chunk the whole stage is added,
// whatever lies past the row's end, which is not stored: so no lane checks of each piece whether it is there.
template <class Sums>
__device__ void WarpWorker::bulk_sum(std::byte* dst, List<Term> terms, int bytes) {
  constexpr int kChunk = Sums::kPieces * kPieceBytes, kStage = Sums::kStageBytes;
  const int stages = WarpShared::sum_stages(op_.ring_bytes, kStage);
  Turn ahead = turn_;
  int load_at = 0, load_row = 0;
  const auto load_next = [&](int stage) {
    const int n = bytes - load_at < kChunk ? bytes - load_at : kChunk;
    if (lane_ == 0) load_into_ring(stage, kStage, terms.items[load_row].row + load_at, n);
    if (++load_row < terms.count) return;
    load_row = 0;
    load_at += kChunk;
  };
  for (int i = 0; i < stages && load_at < bytes && terms.count > 0; ++i) {
    load_next(ahead.stage);
    ahead.next(stages);
  }
  for (int at = 0; at < bytes; at += kChunk) {
    Sums sums;
    for (int j = 0; j < terms.count; ++j) {
      const std::byte* stage = shared_.ring + turn_.stage * kStage + lane_ * 16;
      await_ring(turn_);
      ptx::Vec16 row[Sums::kPieces];
#pragma unroll
      for (int u = 0; u < Sums::kPieces; ++u) row[u] = ptx::load_shared(stage + u * kPieceBytes);
      sums.add(row, terms, shared_.weights, j);
      __syncwarp();  // all lanes have read the stage
      if (load_at < bytes) load_next(turn_.stage);
      turn_.next(stages);
    }
    sums.store(dst, at + lane_ * 16, bytes);
  }
}

template <class Sums>
__device__ void WarpWorker::plain_sum(std::byte* dst, List<Term> terms, int bytes) const {
  for (int at = lane_ * 16; at < bytes; at += Sums::kPieces * kPieceBytes) {
    Sums sums;
    for (int j = 0; j < terms.count; ++j) {
      ptx::Vec16 row[Sums::kPieces];
#pragma unroll
      for (int u = 0; u < Sums::kPieces; ++u) {
        const int i = at + u * kPieceBytes;
        row[u] = ptx::load_global(terms.items[j].row + (i < bytes ? i : 0));  // past the end: not stored
      }
      sums.add(row, terms, shared_.weights, j);
    }
    sums.store(dst, at, bytes);
  }
}

}  // namespace commlib::cuda
