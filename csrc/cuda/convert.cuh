// How a warp converts a row on the way: the rule of protocol/quantize.h, by lanes.
//
// Chunks of the row come through the ring as in multicast. In between the warp converts each where it lies:
// what comes out is shorter, so a piece is written when it and all before it have been read.
#pragma once

#include "cuda/worker_rows.cuh"

namespace commlib::cuda {

__device__ inline uint32_t greater_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The greatest of the values of `lanes` neighbouring lanes, a power of two.
__device__ inline uint32_t greatest_of(uint32_t value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const int other = static_cast<int>(threadIdx.x % kWarpLanes) ^ step;
    value = greater_of(value, __shfl_sync(kAllLanes, value, other));
  }
  return value;
}

// 16 bytes of a row of T.
template <class T>
struct Converted16 {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  float values[kElements];

  __device__ explicit Converted16(const ptx::Vec16& row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = widened(element_of(row, i, T{}));
  }
  __device__ uint32_t greatest() const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) found = greater_of(found, magnitude_of(values[i]));
    return found;
  }
  // kElements bytes, at most half of the 16.
  __device__ void store(std::byte* to, float factor, bool integers) const {
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      uint32_t word = 0;
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const float low = values[i + k] * factor, high = values[i + k + 1] * factor;
        const uint32_t two =
            integers ? ToInt8::of(low) | ToInt8::of(high) << 8 : ptx::e4m3x2_of_floats(low, high);
        word |= two << 8 * k;
      }
      *reinterpret_cast<uint32_t*>(to + i) = word;
    }
  }
};

// A row's scales, gathered by lanes until a warp's width of them goes to all targets at once.
class ScaleWriter {
 public:
  __device__ ScaleWriter(List<ConvertedTarget> to, const Conversion& how, int lane)
      : to_(to),
        blocks_(static_cast<int>(how.elements / how.block())),
        powers_(how.scales_are_powers()),
        lane_(lane) {}

  // Of the next `count` blocks, which divide a warp's width; each lane has that of block lane % count.
  __device__ void put(uint32_t scale, int count) {
    if (lane_ / count == next_ % kWarpLanes / count) held_ = scale;
    next_ += count;
    if (next_ % kWarpLanes == 0 || next_ >= blocks_) write();
  }

 private:
  __device__ void write() const {
    const int block = (next_ - 1) / kWarpLanes * kWarpLanes + lane_;
    if (block >= blocks_) return;
    for (int j = 0; j < to_.count; ++j) {
      std::byte* scales = to_.items[j].scales;
      if (powers_) {
        scales[block] = static_cast<std::byte>(held_);
      } else {
        reinterpret_cast<uint32_t*>(scales)[block] = held_;
      }
    }
  }

  List<ConvertedTarget> to_;
  int blocks_;
  bool powers_;
  int lane_;
  int next_ = 0;
  uint32_t held_ = 0;
};

// Converts rows as it sends them, with a kernel of its own: the others have their registers for what lives
// longer. Between nodes there is none to spare, so rows are converted before they are given.
class ConvertingWorker : public WarpWorker {
 public:
  using WarpWorker::WarpWorker;
  static constexpr bool kConverts = true;
  __device__ void convert(List<ConvertedTarget> to, const Conversion& how, const std::byte* src);

 private:
  template <class T>
  __device__ void convert_from(List<ConvertedTarget> to, const Conversion& how, const std::byte* src);
  template <class T>
  __device__ void convert_chunk(std::byte* chunk, int n, const Conversion& how, const BlockScale& whole,
                                ScaleWriter& scales) const;
  template <class T>
  __device__ void bulk_convert(List<ConvertedTarget> to, const Conversion& how, const std::byte* src,
                               const BlockScale& whole);
  template <class T>
  __device__ void element_convert(List<ConvertedTarget> to, const Conversion& how, const std::byte* src,
                                  const BlockScale& whole) const;
  template <class T>
  __device__ uint32_t greatest_element(const T* row, int n) const;
};

// Converts n bytes of T in place. whole: the scale of the whole row, where its elements share one.
template <class T>
__device__ void ConvertingWorker::convert_chunk(std::byte* chunk, int n, const Conversion& how,
                                                const BlockScale& whole, ScaleWriter& scales) const {
  const bool integers = how.to_integers();
  const int lanes_of_block = integers ? kWarpLanes : static_cast<int>(how.block() * sizeof(T)) / 16;
  const int blocks = kWarpLanes / lanes_of_block;
  for (int at = 0; at < n; at += kPieceBytes) {
    const bool mine = at + lane_ * 16 < n;
    const Converted16<T> values(ptx::load_shared(chunk + (mine ? at + lane_ * 16 : at)));
    BlockScale scale = whole;
    if (!integers) {
      scale =
          scale_of(greatest_of(values.greatest(), lanes_of_block), ToE4m3::kMost, how.scales_are_powers());
      scales.put(__shfl_sync(kAllLanes, scale.stored, lane_ % blocks * lanes_of_block), blocks);
    }
    __syncwarp();  // all lanes have read the piece
    if (mine) {
      values.store(chunk + at / static_cast<int>(sizeof(T)) + lane_ * Converted16<T>::kElements, scale.factor,
                   integers);
    }
  }
}

template <class T>
__device__ void ConvertingWorker::bulk_convert(List<ConvertedTarget> to, const Conversion& how,
                                               const std::byte* src, const BlockScale& whole) {
  constexpr int kSize = sizeof(T);
  const Target mine = lane_ < to.count ? to.items[lane_].row : nullptr;
  const int stage_bytes = op_.ring_bytes / kSendStages;
  const int chunk = stage_bytes / kPieceBytes * kPieceBytes;
  const int bytes = static_cast<int>(how.elements) * kSize;
  ScaleWriter scales(to, how, lane_);
  Turn ahead = turn_;
  int loaded = 0;
  const auto load_next = [&] {
    const int n = bytes - loaded < chunk ? bytes - loaded : chunk;
    ptx::bulk_wait_read<kSendPending>();
    __syncwarp();
    if (lane_ == 0) load_into_ring(ahead.stage, stage_bytes, src + loaded, n);
    ahead.next(kSendStages);
    loaded += n;
  };
  for (int i = 0; i < kSendAhead && loaded < bytes; ++i) load_next();
  for (int at = 0; at < bytes; at += chunk) {
    if (loaded < bytes) load_next();
    const int n = bytes - at < chunk ? bytes - at : chunk;
    std::byte* stage = shared_.ring + turn_.stage * stage_bytes;
    await_ring(turn_);
    convert_chunk<T>(stage, n, how, whole, scales);
    ptx::fence_proxy_async();  // bulk copies see what this lane has written
    __syncwarp();
    if (mine) ptx::bulk_store(mine + at / kSize, stage, static_cast<uint32_t>(n / kSize));
    ptx::bulk_commit();
    turn_.next(kSendStages);
  }
}

// One element at a time, wherever it lies.
template <class T>
__device__ void ConvertingWorker::element_convert(List<ConvertedTarget> to, const Conversion& how,
                                                  const std::byte* src, const BlockScale& whole) const {
  const T* row = reinterpret_cast<const T*>(src);
  const int block = static_cast<int>(how.block());
  ScaleWriter scales(to, how, lane_);
  for (int first = 0; first < how.elements; first += block) {
    BlockScale scale = whole;
    if (!how.to_integers()) {
      scale = scale_of(greatest_element(row + first, block), ToE4m3::kMost, how.scales_are_powers());
      scales.put(scale.stored, 1);
    }
    for (int i = first + lane_; i < first + block; i += kWarpLanes) {
      const float v = widened(row[i]) * scale.factor;
      const auto byte = static_cast<std::byte>(how.to_integers() ? ToInt8::of(v) : ToE4m3::of(v));
      for (int j = 0; j < to.count; ++j) to.items[j].row[i] = byte;
    }
  }
}

// The greatest magnitude of n elements.
template <class T>
__device__ uint32_t ConvertingWorker::greatest_element(const T* row, int n) const {
  uint32_t found = 0;
  for (int i = lane_; i < n; i += kWarpLanes) found = greater_of(found, magnitude_of(widened(row[i])));
  return greatest_of(found, kWarpLanes);
}

template <class T>
__device__ void ConvertingWorker::convert_from(List<ConvertedTarget> to, const Conversion& how,
                                               const std::byte* src) {
  BlockScale whole{};
  if (how.to_integers()) {
    const int elements = static_cast<int>(how.elements);
    whole = scale_of(greatest_element(reinterpret_cast<const T*>(src), elements), ToInt8::kMost, false);
    if (lane_ < to.count) *reinterpret_cast<uint32_t*>(to.items[lane_].scales) = whole.stored;
  }
  const Target mine = lane_ < to.count ? to.items[lane_].row : nullptr;
  if constexpr (ptx::kHasBulkCopies) {
    if (all_aligned(reinterpret_cast<uintptr_t>(mine) | reinterpret_cast<uintptr_t>(src) |
                    static_cast<uintptr_t>(how.elements))) {
      return bulk_convert<T>(to, how, src, whole);
    }
  }
  element_convert<T>(to, how, src, whole);
}

__device__ inline void ConvertingWorker::convert(List<ConvertedTarget> to, const Conversion& how,
                                                 const std::byte* src) {
  if (to.count == 0) return;
  switch (how.from) {
    case DType::bf16:
      return convert_from<Bf16>(to, how, src);
    case DType::f16:
      return convert_from<Half>(to, how, src);
    case DType::f32:
    case DType::f64:  // never: see Conversion
      return convert_from<float>(to, how, src);
  }
}

}  // namespace commlib::cuda
