// The gradient of a combine with weights: rows are weighed, and multiplied by y, as they are unpacked.
#include "operations.h"
#include "suite.h"

namespace commlib::testing {
namespace {

void weigh_once(const Config& config, const Asked& asked, Random& random) {
  const Scenario first = random_scenario(config, config.size, asked, random);
  const Scenario second = with_other_values(first, random);
  in_ranks(config, config.size, [&](Rank& self) {
    Manner manner = random_manner(self.random);
    const DispatchedPtr d = start_dispatch(self, first, manner);
    check_dispatch(*d);
    manner.zero_copy = false;
    const Weighed one = start_weighing(self, *d, first, manner);
    const DispatchedPtr between = start_redispatch(self, *d, second, manner);
    const Weighed two = start_weighing(self, *d, second, manner);
    check_weighing(one);
    check_redispatch(*between);
    check_weighing(two);
  });
}

// Layouts and padding differ by rank at random; values ride along with some.
void rows_are_weighed_while_other_operations_are_under_way() {
  Random random(160);
  for (int i = 0; i < rounds(24); ++i) {
    Config config = small_config(1 + i % 4);
    config.slots = 4;
    config.num_sms = 1 + static_cast<int>(random.below(3));
    config.topk = 1 + static_cast<int>(random.below(4));
    Asked asked;
    asked.weights = random.one_in(2);
    weigh_once(config, asked, random);
  }
}

void every_vector_path_weighs_every_dtype_and_width() {
  Random random(161);
  for (const std::string& name : vector_paths()) {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (const int64_t hidden : {1, 31, 96, 160, 2080, 5000}) {
        Config config = small_config(2);
        config.slots = 4;
        config.vector_ops = name;
        config.dtype = static_cast<DType>(dtype);
        config.hidden = hidden;
        config.topk = 3;
        weigh_once(config, {}, random);
      }
    }
  }
}

void rows_of_another_type_and_width_are_weighed_as_what_they_are() {
  Random random(162);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const int64_t hidden : {64, 7}) {
      Config config = small_config(3);
      config.hidden = 64;
      config.dtype = DType::f32;
      const Scenario own = random_scenario(config, 3, {}, random);
      Config other = config;
      other.dtype = dtype;
      other.hidden = hidden;
      const Scenario s = with_other_values(own, random, other);
      in_ranks(config, 3, [&](Rank& self) {
        const DispatchedPtr d = start_dispatch(self, own, {});
        check_dispatch(*d);
        Manner manner;
        manner.says_format = true;
        check_weighing(start_weighing(self, *d, s, manner));
      });
    }
  }
}

void rows_that_the_weights_do_not_fit_are_refused() {
  Random random(163);
  Config config = small_config(2);
  config.dtype = DType::f64;
  const Scenario own = random_scenario(config, 2, {}, random);
  Config other = config;
  other.dtype = DType::f32;
  const Scenario s = with_other_values(own, random, other);
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, own, {});
    check_dispatch(*d);
    Manner manner;
    manner.says_format = true;
    check_throws<std::invalid_argument>([&] { start_weighing(self, *d, s, manner); }, "fp32 rows");
    check_round_trip(self, own, own, {});
  });
}

const Suite suite({
    {"rows_are_weighed_while_other_operations_are_under_way",
     rows_are_weighed_while_other_operations_are_under_way},
    {"every_vector_path_weighs_every_dtype_and_width", every_vector_path_weighs_every_dtype_and_width},
    {"rows_of_another_type_and_width_are_weighed_as_what_they_are",
     rows_of_another_type_and_width_are_weighed_as_what_they_are},
    {"rows_that_the_weights_do_not_fit_are_refused", rows_that_the_weights_do_not_fit_are_refused},
});

}  // namespace
}  // namespace commlib::testing
