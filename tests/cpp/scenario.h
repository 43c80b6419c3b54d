// One dispatch and one combine on all ranks: what each rank puts in, and what it must get out, computed in
// the plainest way by one thread.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "backend/communicator.h"
#include "check.h"
#include "memory.h"

namespace commlib::testing {

// Exactly `bytes` bytes, so that AddressSanitizer sees one too many; `shift` bytes past a cache line. Filled
// with a pattern, so that bytes left unwritten are seen.
class Buffer {
 public:
  explicit Buffer(int64_t bytes = 0, int64_t shift = 0);

  std::byte* data() const { return memory_.get() + shift_; }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { release(p); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t bytes_;
  int64_t shift_;
};

struct Origin {
  int source;
  int64_t token;
};

struct RankCase {
  // Put in.
  int64_t tokens = 0;
  Int64s topk_idx;    // [tokens][topk]
  Buffer x, weights;  // [tokens] rows, x_stride bytes apart; [tokens][topk]
  int64_t x_stride = 0;
  bool grouped = false;  // layout="expert"
  int64_t align = 1;
  Buffer y, y_weights;  // a row, and where weighted a weight, for each row received
  bool weighted = false;
  Buffer weight_grads;  // [rows][topk], or [grouped rows]
  Buffer bias;          // [tokens] rows
  bool biased = false;

  // Got out of the dispatch.
  std::vector<Origin> rows;  // unique, by source, then token
  Int64s rows_per_expert, offsets;
  Int64s expand_to;     // [rows][topk]: grouped row; empty unless grouped
  Int64s ids;           // [rows][topk]: local expert
  int64_t results = 0;  // rows of the result: unique or grouped
  int64_t dropped = 0;  // of this rank's (token, rank) pairs
  Buffer received, received_weights;
  Int64s source;  // [results][2]

  // Got out of the gradient of the combine, if x is that of its sums: the gradient of y, and of its weights
  // in exact arithmetic, as are the products' magnitudes.
  Buffer weighed;
  std::vector<double> dots, dot_magnitudes;

  // Got out of the combine.
  Buffer out, out_weights;
};

struct Asked {
  bool weights = true;       // ride along with the dispatch
  bool weight_grads = true;  // ride back with the combine
  bool may_group = true;     // each rank chooses its layout, or all do where grouped rows lie in slots; else
                             // layout="rank"
  bool drop = false;         // rows at or past capacity
  bool waves = false;        // all ranks group, and rows come in waves
  bool bounded = false;      // the host learns no sizes; groups, if any, may not drop
};

struct Scenario {
  Config config;  // of any rank
  Asked asked;
  std::vector<RankCase> ranks;

  Placement placement() const { return {config.experts, static_cast<int64_t>(ranks.size())}; }
  int64_t row_bytes() const { return config.hidden * size_of(config.dtype); }
  int64_t weight_bytes() const { return accumulator_size(config.dtype); }
};

// Random in everything: tokens (none on some ranks), routing (with empty places), layouts, values.
Scenario random_scenario(const Config& config, int ranks, const Asked& asked, Random& random);
// [tokens][topk], with empty places.
Int64s random_routing(const Config& config, int64_t tokens, Random& random);
// The same with a routing and layouts that the caller has filled in: tokens, topk_idx, grouped, align.
void complete(Scenario& scenario, Random& random);
// The same routing, other values; and rows of another type and width, if `config` says so.
Scenario with_other_values(const Scenario& scenario, Random& random);
Scenario with_other_values(const Scenario& scenario, Random& random, const Config& config);

}  // namespace commlib::testing
