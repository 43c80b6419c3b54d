// The functions of UCX that commlib calls, from a library loaded at run time: commlib works without UCX as
// long as all ranks share a node.
#pragma once

#include <ucp/api/ucp.h>

namespace commlib {

#define COMMLIB_UCX_FUNCTIONS(F)    \
  F(ucp_get_version_string)         \
  F(ucp_init_version)               \
  F(ucp_cleanup)                    \
  F(ucp_context_query)              \
  F(ucp_config_read)                \
  F(ucp_config_modify)              \
  F(ucp_config_release)             \
  F(ucp_worker_create)              \
  F(ucp_worker_destroy)             \
  F(ucp_worker_get_address)         \
  F(ucp_worker_release_address)     \
  F(ucp_worker_get_efd)             \
  F(ucp_worker_arm)                 \
  F(ucp_worker_progress)            \
  F(ucp_worker_set_am_recv_handler) \
  F(ucp_ep_create)                  \
  F(ucp_ep_query)                   \
  F(ucp_ep_close_nbx)               \
  F(ucp_am_send_nbx)                \
  F(ucp_am_recv_data_nbx)           \
  F(ucp_mem_map)                    \
  F(ucp_mem_unmap)                  \
  F(ucp_request_check_status)       \
  F(ucp_request_free)               \
  F(ucs_status_string)

struct UcxLibrary {
#define COMMLIB_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  COMMLIB_UCX_FUNCTIONS(COMMLIB_UCX_MEMBER)
#undef COMMLIB_UCX_MEMBER
};

// Throws std::runtime_error unless load_ucx() has been called.
const UcxLibrary& ucx();

}  // namespace commlib
