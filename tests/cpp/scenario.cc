#include "scenario.h"

#include <algorithm>
#include <cmath>

#include "base/scalar_types.h"

namespace commlib::testing {
namespace {

template <class Body>
void with_type(DType type, Body body) {
  switch (type) {
    case DType::bf16:
      return body(Bf16{});
    case DType::f16:
      return body(Half{});
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
  }
}

template <class T>
T random_value(Random& random) {
  T value;
  narrow(random.between_minus_one_and_one(), &value);
  return value;
}

template <class T>
Buffer random_values(int64_t count, int64_t shift, Random& random) {
  Buffer buffer(count * static_cast<int64_t>(sizeof(T)), shift);
  for (int64_t i = 0; i < count; ++i) buffer.as<T>()[i] = random_value<T>(random);
  return buffer;
}

// Rows that rank p receives, and their experts.
void receive_rows(Scenario& s, int p) {
  const Placement placement = s.placement();
  const int64_t first = placement.first_expert(p), end = placement.first_expert(p + 1);
  const int topk = s.config.topk;
  RankCase& to = s.ranks[p];
  to.rows_per_expert.assign(end - first, 0);
  for (int source = 0; source < static_cast<int>(s.ranks.size()); ++source) {
    RankCase& from = s.ranks[source];
    for (int64_t t = 0; t < from.tokens; ++t) {
      const int64_t* ids = from.topk_idx.data() + t * topk;
      const auto mine = [&](int64_t e) { return e >= first && e < end; };
      if (std::none_of(ids, ids + topk, mine)) continue;
      if (s.asked.drop && static_cast<int64_t>(to.rows.size()) == s.config.capacity) {
        ++from.dropped;
        continue;
      }
      to.rows.push_back({source, t});
      for (int k = 0; k < topk; ++k) {
        to.ids.push_back(mine(ids[k]) ? ids[k] - first : -1);
        if (mine(ids[k])) ++to.rows_per_expert[ids[k] - first];
      }
    }
  }
}

// Where the rows lie in the result of rank p.
void lay_out(RankCase& r, int topk) {
  const auto experts = static_cast<int64_t>(r.rows_per_expert.size());
  r.results = static_cast<int64_t>(r.rows.size());
  if (r.grouped) {
    r.offsets.assign(1, 0);
    r.expand_to.assign(r.ids.size(), -1);
    for (int64_t e = 0; e < experts; ++e) {
      int64_t next = r.offsets[e];
      for (size_t i = 0; i < r.ids.size(); ++i) {
        if (r.ids[i] == e) r.expand_to[i] = next++;
      }
      while (next % r.align != 0) ++next;
      r.offsets.push_back(next);
    }
    r.results = r.offsets[experts];
  }
  r.source.assign(2 * r.results, -1);
  for (size_t i = 0; i < r.ids.size(); ++i) {
    const auto n = static_cast<int64_t>(i) / topk;
    const int64_t to = r.grouped ? r.expand_to[i] : n;
    if (to < 0) continue;
    r.source[2 * to] = r.rows[n].source;
    r.source[2 * to + 1] = r.rows[n].token;
  }
}

// What the dispatch unpacks: rows, and weights of the experts here; zeros in padding and for others'
// experts.
void unpack(Scenario& s, RankCase& to) {
  const int64_t row = s.row_bytes(), wb = s.weight_bytes();
  const int topk = s.config.topk;
  to.received = Buffer(to.results * row);
  to.received_weights = Buffer(to.results * wb * (to.grouped ? 1 : topk));
  std::memset(to.received.data(), 0, to.received.bytes());
  std::memset(to.received_weights.data(), 0, to.received_weights.bytes());
  for (size_t i = 0; i < to.ids.size(); ++i) {
    const auto n = static_cast<int64_t>(i) / topk;
    const Origin& from = to.rows[n];
    const RankCase& sender = s.ranks[from.source];
    const int64_t at = to.grouped ? to.expand_to[i] : n;
    if (at >= 0)
      std::memcpy(to.received.data() + at * row, sender.x.data() + from.token * sender.x_stride, row);
    if (to.ids[i] < 0) continue;
    const int64_t weight = to.grouped ? at : static_cast<int64_t>(i);
    std::memcpy(to.received_weights.data() + weight * wb,
                sender.weights.data() + (from.token * topk + static_cast<int64_t>(i) % topk) * wb, wb);
  }
}

// What the gradient of the combine weighs, of the rows received; zeros in padding.
template <class T, class Acc>
void weigh(const Scenario& s, RankCase& r) {
  r.weighed = Buffer(r.received.bytes());
  r.dots.assign(r.results, 0);
  r.dot_magnitudes.assign(r.results, 0);
  for (int64_t i = 0; i < r.results; ++i) {
    const bool padding = r.source[2 * i] < 0;
    long double dot = 0, magnitude = 0;
    for (int64_t at = i * s.config.hidden; at < (i + 1) * s.config.hidden; ++at) {
      const Acc row = widen(r.received.as<T>()[at]);
      narrow(padding ? 0 : r.y_weights.as<Acc>()[i] * row, r.weighed.as<T>() + at);
      const long double product = static_cast<long double>(row) * widen(r.y.as<T>()[at]);
      dot += product;
      magnitude += std::fabs(product);
    }
    r.dots[i] = static_cast<double>(dot);
    r.dot_magnitudes[i] = static_cast<double>(magnitude);
  }
}

// Element h of the row that `from` holds for its unique row n: summed over its grouped rows, weighted,
// rounded once.
template <class T, class Acc>
T staged(const Scenario& s, const RankCase& from, int64_t n, int64_t h, double* exact, double* magnitude) {
  Acc sum = 0;
  const auto add = [&](int64_t i) {
    const Acc value = widen(from.y.as<T>()[i * s.config.hidden + h]);
    const Acc weight = from.weighted ? from.y_weights.as<Acc>()[i] : Acc{1};
    sum += weight * value;
    *exact += static_cast<double>(weight) * static_cast<double>(value);
    *magnitude += std::fabs(static_cast<double>(weight) * static_cast<double>(value));
  };
  if (!from.grouped) add(n);
  for (int k = 0; from.grouped && k < s.config.topk; ++k) {
    const int64_t place = from.expand_to[n * s.config.topk + k];
    if (place >= 0) add(place);
  }
  T rounded;
  narrow(sum, &rounded);
  return rounded;
}

// In which sum, rounded once, a row of rank q comes to rank p; 0: by itself.
int sums_of(const Config& config, int p, int q) {
  if (config.net.node_of.empty() || !config.net.hierarchical ||
      config.net.node_of[p] == config.net.node_of[q])
    return 0;
  return 1 + config.net.node_of[q];
}

// The combine at rank p: rows of all ranks in ascending order, the bias last, one rounding; rows of another
// node are summed there, and take the place of the first of them. The reference is itself checked: it must be
// near the exact sum.
template <class T, class Acc>
void sum_up(Scenario& s, int p) {
  RankCase& r = s.ranks[p];
  const int64_t hidden = s.config.hidden;
  const int topk = s.config.topk;
  const double step = sizeof(T) == 8                 ? 0x1p-52
                      : sizeof(T) == 4               ? 0x1p-23
                      : s.config.dtype == DType::f16 ? 0x1p-10
                                                     : 0x1p-7;
  r.out = Buffer(r.tokens * s.row_bytes());
  r.out_weights = Buffer(r.tokens * topk * s.weight_bytes());
  std::memset(r.out_weights.data(), 0, r.out_weights.bytes());
  for (int64_t t = 0; t < r.tokens; ++t) {
    std::vector<std::pair<const RankCase*, int64_t>> parts;
    std::vector<int> sums;  // of each part
    for (size_t q = 0; q < s.ranks.size(); ++q) {
      const RankCase& from = s.ranks[q];
      for (size_t n = 0; n < from.rows.size(); ++n) {
        if (from.rows[n].source == p && from.rows[n].token == t)
          parts.push_back({&from, static_cast<int64_t>(n)}),
              sums.push_back(sums_of(s.config, p, static_cast<int>(q)));
      }
    }
    for (int64_t h = 0; h < hidden; ++h) {
      Acc sum = 0;
      double exact = 0, magnitude = 0;
      for (size_t i = 0; i < parts.size(); ++i) {
        if (sums[i] && std::find(sums.begin(), sums.begin() + i, sums[i]) != sums.begin() + i) continue;
        Acc part = 0;
        for (size_t j = i; j < parts.size(); ++j) {
          if (j != i && (!sums[i] || sums[j] != sums[i])) continue;
          part += widen(staged<T, Acc>(s, *parts[j].first, parts[j].second, h, &exact, &magnitude));
        }
        T rounded;
        narrow(part, &rounded);
        sum += widen(rounded);
      }
      if (r.biased) {
        const Acc bias = widen(r.bias.as<T>()[t * hidden + h]);
        sum += bias;
        exact += static_cast<double>(bias);
        magnitude += std::fabs(static_cast<double>(bias));
      }
      T* out = r.out.as<T>() + t * hidden + h;
      narrow(sum, out);
      check(std::fabs(static_cast<double>(widen(*out)) - exact) <= 4 * step * magnitude + 1e-7,
            "the reference's own sum is near the exact one");
    }
    for (const auto& [from, n] : parts) {
      const Buffer& grads = from->weight_grads;
      for (int k = 0; k < topk; ++k) {
        const int64_t i = n * topk + k;
        if (from->ids[i] < 0) continue;
        r.out_weights.as<Acc>()[t * topk + k] = grads.as<Acc>()[from->grouped ? from->expand_to[i] : i];
      }
    }
  }
}

template <class T>
void fill(Scenario& s, Random& random) {
  using Acc = decltype(widen(T{}));
  const int64_t hidden = s.config.hidden;
  const int topk = s.config.topk;
  for (RankCase& r : s.ranks) {
    const int64_t stride = hidden + (random.one_in(3) ? 5 : 0);  // rows need not lie side by side
    r.x_stride = stride * static_cast<int64_t>(sizeof(T));
    r.x = random_values<T>(r.tokens * stride, random.one_in(2) ? 0 : sizeof(T), random);
    r.weights = random_values<Acc>(r.tokens * topk, 0, random);
    r.weighted = random.one_in(2);
    r.biased = random.one_in(2);
    r.y = random_values<T>(r.results * hidden, random.one_in(2) ? 0 : sizeof(T), random);
    r.y_weights = random_values<Acc>(r.results, 0, random);
    r.weight_grads = random_values<Acc>(r.grouped ? r.results : r.results * topk, 0, random);
    r.bias = random_values<T>(r.tokens * hidden, 0, random);
  }
  for (RankCase& r : s.ranks) unpack(s, r), weigh<T, Acc>(s, r);
  for (size_t p = 0; p < s.ranks.size(); ++p) sum_up<T, Acc>(s, static_cast<int>(p));
}

void fill_values(Scenario& s, Random& random) {
  with_type(s.config.dtype, [&](auto zero) { fill<decltype(zero)>(s, random); });
}

}  // namespace

Buffer::Buffer(int64_t bytes, int64_t shift) : bytes_(bytes), shift_(shift) {
  const auto size = static_cast<size_t>(bytes + shift);
  memory_.reset(static_cast<std::byte*>(allocate(size)));
  std::memset(memory_.get(), 0xa5, size);
}

Int64s random_routing(const Config& config, int64_t tokens, Random& random) {
  Int64s ids;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int64_t> experts(config.experts);
    for (int64_t e = 0; e < config.experts; ++e) experts[e] = e;
    for (int k = 0; k < config.topk; ++k) {
      if (experts.empty() || random.one_in(5)) {
        ids.push_back(-1);
        continue;
      }
      const auto chosen = experts.begin() + random.below(static_cast<int64_t>(experts.size()));
      ids.push_back(*chosen);
      experts.erase(chosen);
    }
  }
  return ids;
}

void complete(Scenario& s, Random& random) {
  for (size_t p = 0; p < s.ranks.size(); ++p) receive_rows(s, static_cast<int>(p));
  for (RankCase& r : s.ranks) lay_out(r, s.config.topk);
  fill_values(s, random);
}

Scenario random_scenario(const Config& config, int ranks, const Asked& asked, Random& random) {
  Scenario s{config, asked, {}};
  const bool none_group = random.one_in(3);
  for (int p = 0; p < ranks; ++p) {
    RankCase r;
    r.tokens = random.one_in(6) ? 0 : random.below(config.max_tokens + 1);
    r.topk_idx = random_routing(config, r.tokens, random);
    const bool chooses = config.grouped_rows > 0 ? !none_group : random.one_in(2);
    r.grouped = asked.waves || (asked.may_group && chooses);
    r.align = r.grouped ? 1 + random.below(8) : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  return s;
}

Scenario with_other_values(const Scenario& s, Random& random) {
  return with_other_values(s, random, s.config);
}

Scenario with_other_values(const Scenario& s, Random& random, const Config& config) {
  Scenario other{config, s.asked, {}};
  for (const RankCase& r : s.ranks) {
    RankCase same;
    same.tokens = r.tokens;
    same.topk_idx = r.topk_idx;
    same.grouped = r.grouped;
    same.align = r.align;
    other.ranks.push_back(std::move(same));
  }
  complete(other, random);
  return other;
}

}  // namespace commlib::testing
