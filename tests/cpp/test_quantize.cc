// Rows converted on their way: every receiver has the bytes of the rule, applied to one element at a time.
#include <cstring>

#include "operations.h"
#include "protocol/quantize.h"
#include "suite.h"

namespace commlib::testing {
namespace {

using Bytes = std::vector<std::byte>;
constexpr int kMostElements = 384;

// A token's row: numbers of a block's usual range, or any bits there are.
template <class T>
std::vector<T> row_of(int rank, int64_t token, const Conversion& how) {
  Random random(1000 * rank + token);
  const bool any_bits = token % 3 == 0;
  std::vector<T> row(how.elements);
  for (T& element : row) {
    const uint64_t bits = random.next();
    narrow(static_cast<float>(static_cast<int64_t>(bits % 4001) - 2000) / 64, &element);
    if (any_bits) std::memcpy(&element, &bits, sizeof element);
  }
  return row;
}

// The row, then its scales.
template <class T>
Bytes converted(const std::vector<T>& row, const Conversion& how) {
  Bytes bytes(how.row_bytes() + how.scale_bytes());
  std::byte* scale_at = bytes.data() + how.row_bytes();
  const float most = how.to_integers() ? ToInt8::kMost : ToE4m3::kMost;
  for (int64_t first = 0; first < how.elements; first += how.block()) {
    uint32_t greatest = 0;
    for (int64_t i = first; i < first + how.block(); ++i)
      greatest = std::max(greatest, magnitude_of(widen(row[i])));
    const BlockScale scale = scale_of(greatest, most, how.scales_are_powers());
    for (int64_t i = first; i < first + how.block(); ++i) {
      const float v = widen(row[i]) * scale.factor;
      bytes[i] = static_cast<std::byte>(how.to_integers() ? ToInt8::of(v) : ToE4m3::of(v));
    }
    const int size = how.scales_are_powers() ? 1 : 4;  // the lowest byte comes first
    std::memcpy(scale_at, &scale.stored, size);
    scale_at += size;
  }
  return bytes;
}

Conversion random_conversion(Random& random) {
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  Conversion how;
  how.to = static_cast<Quantization>(1 + random.below(4));
  how.from = kTypes[random.below(3)];
  const int64_t unit = how.to_integers() ? 1 : how.block();
  how.elements = unit * (1 + random.below(kMostElements / unit));
  if (how.to_integers() && random.one_in(2)) how.elements = 16 * (1 + how.elements / 17);
  return how;
}

template <class T>
void check_converted(Rank& self, const Dispatched& known, const Conversion& how) {
  const RankCase& r = known.mine();
  // Rows lie apart, or so that a GPU's copy engine takes none of them.
  const int64_t stride = (how.elements + self.random.below(2)) * sizeof(T);
  Buffer x(r.tokens * stride);
  for (int64_t t = 0; t < r.tokens; ++t) {
    std::memcpy(x.data() + t * stride, row_of<T>(self.rank, t, how).data(), how.elements * sizeof(T));
  }
  Rows rows;
  rows.x = x.data();
  rows.stride = stride;
  rows.count = r.tokens;
  rows.format = {14, how.row_bytes(), how.scale_bytes()};
  rows.conversion = how;
  const Buffer got(r.results * how.row_bytes()), scales(r.results * how.scale_bytes());
  Received received;
  received.count = r.results;
  received.rows = const_cast<std::byte*>(got.data());
  received.scales = const_cast<std::byte*>(scales.data());
  std::shared_ptr<SlotLease> lease;
  const UnderWay under_way{self, self.comm->redispatch(rows, known.routing, received, false, &lease)};
  under_way.wait();
  for (int64_t i = 0; i < r.results; ++i) {
    const int64_t rank = known.source[2 * i], token = known.source[2 * i + 1];
    const Bytes wanted = rank < 0 ? Bytes(how.row_bytes() + how.scale_bytes())
                                  : converted(row_of<T>(static_cast<int>(rank), token, how), how);
    check_equal(std::memcmp(got.data() + i * how.row_bytes(), wanted.data(), how.row_bytes()), 0, "a row");
    check_equal(std::memcmp(scales.data() + i * how.scale_bytes(), wanted.data() + how.row_bytes(),
                            how.scale_bytes()),
                0, "its scales");
  }
}

void check_converted(Rank& self, const Dispatched& known, const Conversion& how) {
  if (how.from == DType::bf16) return check_converted<Bf16>(self, known, how);
  if (how.from == DType::f16) return check_converted<Half>(self, known, how);
  check_converted<float>(self, known, how);
}

void rows_are_converted_as_the_rule_says() {
  Random random(180);
  for (int i = 0; i < rounds(40); ++i) {
    const int ranks = 1 + static_cast<int>(random.below(4));
    Config config = small_config(ranks);
    config.hidden = kMostElements;  // of float32: there is room for any
    config.dtype = DType::f32;
    config.slots = 4;
    config.grouped_rows = random_room(random);
    config.topk = 1 + static_cast<int>(random.below(4));
    config.num_sms = 1 + static_cast<int>(random.below(3));
    if (random.one_in(3)) config.vector_ops = "plain";
    const Scenario own = random_scenario(config, ranks, {}, random);
    const Conversion first = random_conversion(random), second = random_conversion(random);
    in_ranks(config, ranks, [&](Rank& self) {
      const DispatchedPtr d = start_dispatch(self, own, random_manner(self.random));
      check_dispatch(*d);
      check_converted(self, *d, first);
      check_converted(self, *d, second);
      check_round_trip(self, own, own, random_manner(self.random));  // and rows as they are, as ever
    });
  }
}

// Longer than a GPU's ring, with more scales than a warp has lanes.
void long_rows_are_converted() {
  Random random(181);
  Config config = small_config(2);
  config.hidden = 7168;
  config.dtype = DType::bf16;
  config.slots = 4;
  const Scenario own = random_scenario(config, 2, {}, random);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, own, {});
    check_dispatch(*d);
    for (const auto to :
         {Quantization::fp8_e4m3, Quantization::fp8_e4m3_ue8m0, Quantization::mxfp8, Quantization::int8}) {
      for (const DType from : {DType::bf16, DType::f16, DType::f32})
        check_converted(self, *d, {to, from, 7168});
    }
  });
}

const Suite suite({
    {"rows_are_converted_as_the_rule_says", rows_are_converted_as_the_rule_says},
    {"long_rows_are_converted", long_rows_are_converted},
});

}  // namespace
}  // namespace commlib::testing
