#include "first_tests.h"

#include <cstring>

#include "cpp/operations.h"
#include "cuda/device_heap.h"
#include "cuda/driver.h"
#include "cuda/launch.h"

namespace commlib::testing {
namespace {

void kernels_are_loaded_and_one_block_fits() {
  const cuda::LaunchShape shape = cuda::prepare_kernels(0, 1, nullptr);
  check(shape.shared_bytes > cuda::facts_of(0).shared_per_sm / 2, "a block has an SM for itself");
}

// To the device, within it and back, for memory of one kind.
void check_copies(std::byte* device, const char* what) {
  const Buffer first(100'000), back(100'000);
  for (int64_t i = 0; i < first.bytes(); ++i) first.data()[i] = static_cast<std::byte>(i * 7);
  copy_bytes(device, first.data(), 100'000);
  copy_bytes(device + 100'000, device, 100'000);
  copy_bytes(back.data(), device + 100'000, 100'000);
  check(std::memcmp(first.data(), back.data(), 100'000) == 0, what);
}

void tensors_are_where_the_device_reaches_them() {
  const Buffer tensor(1000);
  cudaPointerAttributes facts;
  cuda::check(cudaPointerGetAttributes(&facts, tensor.data()), "cudaPointerGetAttributes");
  check(facts.devicePointer == tensor.data() && facts.hostPointer == tensor.data(),
        "device and host use one address");
}

void heaps_are_made_in_each_way() {
  for (const auto share : {cuda::Share::none, cuda::Share::fd}) {
    if (share == cuda::Share::fd && !cuda::facts_of(0).shares_fds) continue;
    const auto region = cuda::DeviceRegion::create(0, 200'000, share);
    check_copies(region->data(), "what is copied there comes back");
  }
}

// Every token has all its experts.
Scenario full_scenario(const Config& config, int ranks, int64_t tokens, bool grouped, Random& random) {
  Scenario s{config, {}, {}};
  for (int p = 0; p < ranks; ++p) {
    RankCase r;
    r.tokens = tokens;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t first = random.below(config.experts);
      for (int k = 0; k < config.topk; ++k) r.topk_idx.push_back((first + k) % config.experts);
    }
    r.grouped = grouped;
    r.align = grouped ? 4 : 1;
    s.ranks.push_back(std::move(r));
  }
  complete(s, random);
  return s;
}

// The first half of a dispatch: routes and counts.
void check_plan(Rank& self, const Scenario& s) {
  const RankCase& r = s.ranks[self.rank];
  const RoutingRoom room(s, self.rank);
  const auto pending = self.comm->begin_dispatch(room.view, true, false, false);
  check_equal(pending->rows, static_cast<int64_t>(r.rows.size()), "rows received");
  settle(*self.comm);
  check(room.rows_per_expert == r.rows_per_expert, "counts are right for each expert");
  self.meet();
}

void plans(int ranks, int blocks) {
  Random random(400);
  Config config = small_config(ranks);
  config.num_sms = blocks;
  const Scenario s = full_scenario(config, ranks, 8, false, random);
  in_ranks(config, ranks, [&](Rank& self) { check_plan(self, s); });
}

void one_rank_plans() { plans(1, 1); }
void blocks_of_a_grid_meet() {
  for (const int blocks : {2, 3, 8, 32}) plans(1, std::min(blocks, cuda::facts_of(0).sms));
}
void all_blocks_that_fit_meet() { plans(1, cuda::facts_of(0).sms); }
void two_ranks_plan() { plans(2, 1); }

void dispatches(int ranks, bool grouped) {
  Random random(401);
  const Config config = small_config(ranks);
  const Scenario s = full_scenario(config, ranks, 8, grouped, random);
  in_ranks(config, ranks, [&](Rank& self) { check_dispatch(*start_dispatch(self, s, {})); });
}

void one_rank_dispatches() { dispatches(1, false); }
void one_rank_dispatches_into_groups() { dispatches(1, true); }
void two_ranks_dispatch() { dispatches(2, false); }

// Dispatch, the same along the known routing, and combine; in both layouts.
void round_trips(Config config, int ranks, int64_t tokens, const Manner& manner = {}) {
  Random random(402);
  config.max_tokens = tokens;
  config.capacity = ranks * tokens;
  for (const bool grouped : {false, true}) {
    const Scenario s = full_scenario(config, ranks, tokens, grouped, random);
    const Scenario other = with_other_values(s, random);
    in_ranks(config, ranks, [&](Rank& self) { check_round_trip(self, s, other, manner); });
  }
}

void one_rank_goes_there_and_back() { round_trips(small_config(1), 1, 8); }

void rows_of(int64_t hidden, DType dtype, int ranks) {
  Config config = small_config(ranks);
  config.hidden = hidden;
  config.dtype = dtype;
  config.num_sms = 2;
  round_trips(config, ranks, 40);
}

void rows_of_16_bytes_are_copied_in_bulk() { rows_of(4, DType::f32, 1); }
void rows_of_3072_bytes_are_copied_in_bulk() { rows_of(1536, DType::bf16, 1); }
void rows_of_14336_bytes_are_copied_in_bulk() { rows_of(7168, DType::bf16, 1); }
void rows_of_odd_sizes_are_not_copied_in_bulk() {
  for (const int64_t hidden : {1, 31, 1537}) rows_of(hidden, DType::bf16, 1);
}
void every_dtype_is_summed() {
  for (const DType t : {DType::f32, DType::bf16, DType::f16, DType::f64}) rows_of(160, t, 1);
}

void two_ranks_go_there_and_back() { round_trips(small_config(2), 2, 8); }
void two_ranks_with_long_rows() { rows_of(7168, DType::bf16, 2); }

void rows_are_used_where_they_arrive() {
  Manner manner;
  manner.zero_copy = true;
  manner.combine = RowsOf::receive_slot;
  Config config = small_config(2);
  config.slots = 3;  // two results stay in theirs
  round_trips(config, 2, 8, manner);
}
void rows_are_written_into_a_lent_slot() {
  Manner manner;
  manner.combine = RowsOf::lent_slot;
  round_trips(small_config(2), 2, 8, manner);
}

void two_ranks_in_waves() {
  Random random(403);
  Config config = small_config(2);
  config.experts = 16;
  Scenario s = full_scenario(config, 2, 8, true, random);
  s.asked.waves = true;
  in_ranks(config, 2, [&](Rank& self) {
    const DispatchedPtr d = start_dispatch(self, s, {});
    const auto experts = static_cast<int64_t>(d->room.rows_per_expert.size());
    for (int64_t e = 0; e < experts; ++e) check_expert(self, *d, e);
    check_dispatch(*d);
  });
}

void four_ranks_go_there_and_back() {
  Config config = small_config(4);
  config.num_sms = 4;
  round_trips(config, 4, 100);
}
void eight_ranks_go_there_and_back() {
  Config config = small_config(8);
  config.num_sms = 4;
  config.topk = 6;
  round_trips(config, 8, 100);
}

}  // namespace

const std::vector<Test>& first_tests() {
  static const std::vector<Test> tests{
      {"kernels_are_loaded_and_one_block_fits", kernels_are_loaded_and_one_block_fits},
      {"tensors_are_where_the_device_reaches_them", tensors_are_where_the_device_reaches_them},
      {"heaps_are_made_in_each_way", heaps_are_made_in_each_way},
      {"one_rank_plans", one_rank_plans},
      {"blocks_of_a_grid_meet", blocks_of_a_grid_meet},
      {"all_blocks_that_fit_meet", all_blocks_that_fit_meet},
      {"one_rank_dispatches", one_rank_dispatches},
      {"one_rank_dispatches_into_groups", one_rank_dispatches_into_groups},
      {"one_rank_goes_there_and_back", one_rank_goes_there_and_back},
      {"rows_of_16_bytes_are_copied_in_bulk", rows_of_16_bytes_are_copied_in_bulk},
      {"rows_of_3072_bytes_are_copied_in_bulk", rows_of_3072_bytes_are_copied_in_bulk},
      {"rows_of_14336_bytes_are_copied_in_bulk", rows_of_14336_bytes_are_copied_in_bulk},
      {"rows_of_odd_sizes_are_not_copied_in_bulk", rows_of_odd_sizes_are_not_copied_in_bulk},
      {"every_dtype_is_summed", every_dtype_is_summed},
      {"two_ranks_plan", two_ranks_plan},
      {"two_ranks_dispatch", two_ranks_dispatch},
      {"two_ranks_go_there_and_back", two_ranks_go_there_and_back},
      {"two_ranks_with_long_rows", two_ranks_with_long_rows},
      {"rows_are_used_where_they_arrive", rows_are_used_where_they_arrive},
      {"rows_are_written_into_a_lent_slot", rows_are_written_into_a_lent_slot},
      {"two_ranks_in_waves", two_ranks_in_waves},
      {"four_ranks_go_there_and_back", four_ranks_go_there_and_back},
      {"eight_ranks_go_there_and_back", eight_ranks_go_there_and_back},
  };
  return tests;
}

}  // namespace commlib::testing
