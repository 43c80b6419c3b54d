// Which GPU reaches which memory: the NVLink domain, and peers, on made-up devices.
#include <cstring>

#include "cpp/backend.h"
#include "cpp/check.h"
#include "cpp/suite.h"
#include "cuda/device_heap.h"
#include "cuda/driver.h"
#include "cuda/nvml.h"
#include "simt/runtime/cudart.h"
#include "simt/runtime/driver.h"

namespace commlib::testing {
namespace {

// A switch of the simulated machine, as long as this lives.
class Set {
 public:
  Set(bool* which, bool value) : which_(which), before_(*which) { *which = value; }
  ~Set() { *which_ = before_; }

 private:
  bool* which_;
  bool before_;
};

// Judged by the attribute alone, two hosts became one node.
void fabric_memory_is_what_can_be_made_not_what_the_device_says() {
  const auto machine = make_machine();
  int says = 0;
  cuda::driver().device_get_attribute(&says, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, 0);
  check_equal(says, 1, "the device's word");
  check(!cuda::makes_fabric_memory(0), "without nvidia-imex there is none");
  const Set imex(&simt::has_imex, true);
  check(cuda::makes_fabric_memory(0), "with nvidia-imex there is");
  check_equal(cuda::facts_of(0).domain, std::string(), "the domain of a GPU that NVML does not know");
}

cuda::FabricInfo registered() {
  cuda::FabricInfo info{};
  info.cluster[0] = 0xab;
  info.cluster[15] = 1;
  info.clique = 7;
  info.state = cuda::kFabricCompleted;
  return info;
}

void a_domain_is_a_cluster_and_a_clique() {
  const cuda::FabricInfo info = registered();
  check_equal(cuda::domain_key(info), std::string("ab000000000000000000000000000001/7"), "the key");
  cuda::FabricInfo other = info;
  other.health = 5;
  check_equal(cuda::domain_key(other), cuda::domain_key(info), "the key of a less healthy GPU");
  other.clique = 8;
  check(cuda::domain_key(other) != cuda::domain_key(info), "another clique is another domain");
  other = info;
  other.cluster[15] = 2;
  check(cuda::domain_key(other) != cuda::domain_key(info), "another cluster is another domain");
}

void a_gpu_that_is_not_registered_is_in_no_domain() {
  const std::string none;
  for (unsigned char state : {0, 1, 2}) {  // not supported, not started, in progress
    cuda::FabricInfo info = registered();
    info.state = state;
    check_equal(cuda::domain_key(info), none, "before the registration is completed");
  }
  cuda::FabricInfo info = registered();
  info.status = 999;
  check_equal(cuda::domain_key(info), none, "after it has failed");
  info = registered();
  std::memset(info.cluster, 0, sizeof info.cluster);
  check_equal(cuda::domain_key(info), none, "with links on its own host alone");
}

void gpus_that_cannot_reach_each_others_memory_are_refused() {
  const auto machine = make_machine();
  cuda::require_peer_access(0, 1);
  const Set reach(&simt::peers_reach_each_other, false);
  cuda::require_peer_access(0, 0);
  const auto error =
      check_throws<std::runtime_error>([] { cuda::require_peer_access(0, 1); }, "peers out of reach");
  check_contains(error.what(), "GPU 0 cannot reach the memory of GPU 1", "the text");
  const std::string mine = cuda::facts_of(0).uuid;
  check_equal(cuda::device_with(mine), 0, "the device of a UUID");
  cuda::require_peer_access(1, std::string(32, 'f'));  // not visible here: nothing is known
  check_throws<std::runtime_error>([&] { cuda::require_peer_access(1, mine); }, "by UUID");
}

const Suite suite({
    {"fabric_memory_is_what_can_be_made_not_what_the_device_says",
     fabric_memory_is_what_can_be_made_not_what_the_device_says},
    {"a_domain_is_a_cluster_and_a_clique", a_domain_is_a_cluster_and_a_clique},
    {"a_gpu_that_is_not_registered_is_in_no_domain", a_gpu_that_is_not_registered_is_in_no_domain},
    {"gpus_that_cannot_reach_each_others_memory_are_refused",
     gpus_that_cannot_reach_each_others_memory_are_refused},
});

}  // namespace
}  // namespace commlib::testing
