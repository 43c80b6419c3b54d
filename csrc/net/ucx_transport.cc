#if __has_include(<ucp/api/ucp.h>)
#include "net/ucx_transport.h"

#include <poll.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "base/event_count.h"
#include "net/ucx_library.h"

namespace commlib {
namespace {

constexpr unsigned kMessageId = 1;

void check(ucs_status_t status, const char* what) {
  if (status == UCS_OK) return;
  throw std::runtime_error(std::string("UCX: ") + what + ": " + ucx().ucs_status_string(status));
}

class UcxTransport final : public Transport {
 public:
  UcxTransport(int size, UcxOptions options);
  ~UcxTransport() override;

  std::string address() override;
  void connect(const std::vector<std::string>& addresses, Receiver& receiver) override;
  bool reaches_gpu_memory() const override { return reaches_gpu_memory_; }
  void use_memory(std::byte* data, size_t bytes) override;
  void send(int to, const Header& header, const std::byte* data) override;
  bool progress() override { return lib_.ucp_worker_progress(worker_) != 0; }
  void sleep(int wake, int milliseconds) override;
  void close(double seconds, const std::function<bool(int peer)>& has_departed) override;

 private:
  struct Peer {
    UcxTransport* self;
    int rank;
    ucp_ep_h ep = nullptr;
    bool at_once = false;  // messages go without asking first
    bool failed = false;
  };
  // A chunk that comes later than its message.
  struct Fetch {
    UcxTransport* self;
    Post post;
  };

  static ucs_status_t on_message(void* self, const void* header, size_t header_bytes, void* data,
                                 size_t bytes, const ucp_am_recv_param_t* param);
  static void on_fetched(void* request, ucs_status_t status, size_t bytes, void* fetch);
  static void on_sent(void* request, ucs_status_t, void*) { ucx().ucp_request_free(request); }
  static void on_error(void* peer, ucp_ep_h, ucs_status_t status);

  bool rings_on_gpu() const { return options_.device_memory && reaches_gpu_memory_; }
  ucs_status_t receive(const Post& post, void* data, size_t bytes, bool later);
  ucs_status_t fetch(const Post& post, std::byte* to, void* data, size_t bytes);
  void open(Peer& peer, const std::string& address);
  bool only_tcp(ucp_ep_h ep) const;
  void fail(Peer& peer, ucs_status_t status);

  const UcxLibrary& lib_;
  const UcxOptions options_;
  std::vector<Peer> peers_;
  Receiver* receiver_ = nullptr;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_mem_h memory_ = nullptr;
  int events_ = -1;
  bool reaches_gpu_memory_ = false;
};

UcxTransport::UcxTransport(int size, UcxOptions options) : lib_(ucx()), options_(options), peers_(size) {
  ucp_config_t* config = nullptr;
  check(lib_.ucp_config_read(nullptr, nullptr, &config), "reading its settings");
  // A silent link is the business of commlib's deadline, which the user sets.
  if (!std::getenv("UCX_TCP_KEEPIDLE")) lib_.ucp_config_modify(config, "TCP_KEEPIDLE", "inf");
  if (!std::getenv("UCX_KEEPALIVE_INTERVAL")) lib_.ucp_config_modify(config, "KEEPALIVE_INTERVAL", "inf");
  // Otherwise UCX listens on every interface that it may use.
  if (options.loopback && !std::getenv("UCX_NET_DEVICES"))
    lib_.ucp_config_modify(config, "NET_DEVICES", "lo");
  ucp_params_t params{};
  params.field_mask =
      UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.estimated_num_eps = static_cast<size_t>(size);
  const ucs_status_t status = lib_.ucp_init_version(UCP_API_MAJOR, 13, &params, config, &context_);
  lib_.ucp_config_release(config);
  check(status, "starting");
  ucp_context_attr_t can{};
  can.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  check(lib_.ucp_context_query(context_, &can), "asking for the kinds of memory that it knows");
  reaches_gpu_memory_ = can.memory_types >> UCS_MEMORY_TYPE_CUDA & 1;
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  check(lib_.ucp_worker_create(context_, &worker, &worker_), "making a worker");
  check(lib_.ucp_worker_get_efd(worker_, &events_), "getting its event descriptor");
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = on_message;
  handler.arg = this;
  check(lib_.ucp_worker_set_am_recv_handler(worker_, &handler), "setting a handler");
}

UcxTransport::~UcxTransport() {
  close(0, [](int) { return true; });
  if (memory_) lib_.ucp_mem_unmap(context_, memory_);
  if (worker_) lib_.ucp_worker_destroy(worker_);
  if (context_) lib_.ucp_cleanup(context_);
}

std::string UcxTransport::address() {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  check(lib_.ucp_worker_get_address(worker_, &address, &bytes), "asking for its address");
  std::string copy(reinterpret_cast<const char*>(address), bytes);
  lib_.ucp_worker_release_address(worker_, address);
  return copy;
}

void UcxTransport::connect(const std::vector<std::string>& addresses, Receiver& receiver) {
  receiver_ = &receiver;
  for (size_t p = 0; p < addresses.size(); ++p) {
    peers_[p].self = this;
    peers_[p].rank = static_cast<int>(p);
    if (!addresses[p].empty()) open(peers_[p], addresses[p]);
  }
}

void UcxTransport::open(Peer& peer, const std::string& address) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {on_error, &peer};
  const std::string what = "connecting to rank " + std::to_string(peer.rank);
  check(lib_.ucp_ep_create(worker_, &params, &peer.ep), what.c_str());
  peer.at_once = !rings_on_gpu() && only_tcp(peer.ep);
}

// Over TCP a message that asks first costs two more turns of both sides' threads, and saves nothing.
bool UcxTransport::only_tcp(ucp_ep_h ep) const {
  ucp_transport_entry_t entries[16];
  ucp_ep_attr_t attr{};
  attr.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attr.transports = {entries, 16, sizeof entries[0]};
  if (lib_.ucp_ep_query(ep, &attr) != UCS_OK) return false;
  for (unsigned i = 0; i < attr.transports.num_entries; ++i) {
    if (std::strcmp(entries[i].transport_name, "tcp") != 0) return false;
  }
  return true;
}

void UcxTransport::use_memory(std::byte* data, size_t bytes) {
  if (bytes == 0) return;
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  params.address = data;
  params.length = bytes;
  check(lib_.ucp_mem_map(context_, &params, &memory_), "registering memory");
}

void UcxTransport::send(int to, const Header& header, const std::byte* data) {
  Peer& peer = peers_[to];
  if (!peer.ep || peer.failed) return;
  const Post& post = header.post;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK;
  param.flags = UCP_AM_SEND_FLAG_COPY_HEADER;
  if (peer.at_once || post.kind != PostKind::chunk) param.flags |= UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = on_sent;
  if (post.kind == PostKind::chunk) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = memory_;
  }
  const ucs_status_ptr_t request =
      lib_.ucp_am_send_nbx(peer.ep, kMessageId, &header, sizeof header, data, post.bytes, &param);
  if (UCS_PTR_IS_ERR(request)) fail(peer, UCS_PTR_STATUS(request));
}

ucs_status_t UcxTransport::on_message(void* self, const void* header, size_t header_bytes, void* data,
                                      size_t bytes, const ucp_am_recv_param_t* param) {
  auto* transport = static_cast<UcxTransport*>(self);
  const bool later = param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV;
  Post post;
  // Anyone who knows this rank's port may have sent it.
  if (!transport->receiver_ || !transport->receiver_->accepts(header, header_bytes, bytes, &post))
    return UCS_OK;
  return transport->receive(post, data, bytes, later);
}

ucs_status_t UcxTransport::receive(const Post& post, void* data, size_t bytes, bool later) {
  if (post.kind != PostKind::chunk) {
    if (later) {
      fail(peers_[post.peer], UCS_ERR_INVALID_PARAM);
    } else {
      receiver_->arrived(post, static_cast<const std::byte*>(data));
    }
    return UCS_OK;
  }
  std::byte* to = receiver_->place_for(post);
  if (later || rings_on_gpu()) return fetch(post, to, data, bytes);
  std::memcpy(to, data, bytes);
  receiver_->arrived(post, nullptr);
  return UCS_OK;
}

ucs_status_t UcxTransport::fetch(const Post& post, std::byte* to, void* data, size_t bytes) {
  auto* fetch = new Fetch{this, post};
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH;
  param.cb.recv_am = on_fetched;
  param.user_data = fetch;
  param.memh = memory_;
  const ucs_status_ptr_t request = lib_.ucp_am_recv_data_nbx(worker_, data, to, bytes, &param);
  if (UCS_PTR_IS_PTR(request)) return UCS_INPROGRESS;
  const ucs_status_t status = UCS_PTR_STATUS(request);
  on_fetched(nullptr, status, bytes, fetch);
  return status == UCS_OK ? UCS_INPROGRESS : UCS_OK;
}

void UcxTransport::on_fetched(void* request, ucs_status_t status, size_t, void* data) {
  const std::unique_ptr<Fetch> fetch(static_cast<Fetch*>(data));
  if (status == UCS_OK) {
    fetch->self->receiver_->arrived(fetch->post, nullptr);
  } else {
    fetch->self->fail(fetch->self->peers_[fetch->post.peer], status);
  }
  if (request) ucx().ucp_request_free(request);
}

void UcxTransport::on_error(void* data, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<Peer*>(data);
  peer->self->fail(*peer, status);
}

void UcxTransport::fail(Peer& peer, ucs_status_t status) {
  if (peer.failed) return;
  peer.failed = true;
  receiver_->lost(peer.rank, lib_.ucs_status_string(status));
}

void UcxTransport::sleep(int wake, int milliseconds) {
  if (lib_.ucp_worker_arm(worker_) != UCS_OK) return;  // there is something to do
  pollfd fds[2] = {{events_, POLLIN, 0}, {wake, POLLIN, 0}};
  poll(fds, 2, milliseconds);
}

// Flushes each connection that has not failed, all at once.
void UcxTransport::close(double seconds, const std::function<bool(int peer)>& has_departed) {
  const double deadline = monotonic_seconds() + seconds;
  std::vector<std::pair<void*, int>> closing;  // requests, and to which rank
  for (Peer& peer : peers_) {
    if (!peer.ep) continue;
    ucp_request_param_t param{};
    if (peer.failed || seconds <= 0) {
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    }
    const ucs_status_ptr_t request = lib_.ucp_ep_close_nbx(peer.ep, &param);
    if (UCS_PTR_IS_PTR(request)) closing.emplace_back(request, peer.rank);
    peer.ep = nullptr;
  }
  while (!closing.empty()) {
    lib_.ucp_worker_progress(worker_);
    const auto [request, peer] = closing.back();
    const bool done = lib_.ucp_request_check_status(request) != UCS_INPROGRESS;
    if (done || has_departed(peer) || monotonic_seconds() > deadline) {
      lib_.ucp_request_free(request);
      closing.pop_back();
    } else {
      sleep(-1, 1);
    }
  }
}

}  // namespace

std::unique_ptr<Transport> make_ucx_transport(int size, UcxOptions options) {
  return std::make_unique<UcxTransport>(size, options);
}

}  // namespace commlib
#endif
