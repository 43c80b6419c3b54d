// Operations, as this rank issues them: which slot, which number, what a backend is to run.
#include <algorithm>

#include "backend/communicator.h"

namespace commlib {
namespace {

Call call_of(OpKind op, bool has_weights, uint8_t caller, const RowFormat& format, int flags = 0) {
  flags |= (has_weights ? kCallHasWeights : 0) | (format.is_own() ? 0 : kCallSaysFormat);
  return {op, 0, static_cast<uint8_t>(flags), caller};
}

// What the caller may read, and change, in place of the routing's own; where no stream orders that.
std::function<void()> copy_of(const RoutePlan& routing, const Received& received) {
  if (!received.groups) return nullptr;
  return [from = routing.rows_per_expert, to = received.groups, words = received.groups_words] {
    std::copy_n(from, words, to);
  };
}

std::optional<RoutePlan> unchecked(const RoutePlan& routing) {
  return routing.totals ? std::optional(routing) : std::nullopt;
}

}  // namespace

// The operation has its number, so the others wait for it: they need not where it could not be started.
template <class Execute>
auto Communicator::issued(Execute execute) -> decltype(execute()) {
  try {
    return execute();
  } catch (const CommFailure&) {  // of the operation, which it has reported
    throw;
  } catch (const std::exception& e) {
    // What is captured has no number yet.
    if (!is_captured()) {
      give_up("rank " + std::to_string(config_.rank) + " could not start an operation: " + e.what());
    }
    throw;
  }
}

std::unique_ptr<PendingDispatch> Communicator::begin_dispatch(const RoutePlan& routing, bool has_weights,
                                                              bool drop, bool in_waves, bool grouped_in_slot,
                                                              uint8_t caller, const RowFormat& format) {
  const Issue issue(*this);
  check_ready();
  if (is_captured()) {
    throw std::runtime_error(
        "a dispatch cannot be captured in a CUDA graph where the host reads how many rows come: capture one "
        "with bounded=True, or what follows it, with its handle");
  }
  layout_of(format);
  keep_near();
  plan_after_plans();
  auto pending = std::make_unique<PendingDispatch>();
  pending->lease = take_slot();
  const bool groups = uses_places(routing);
  const int flags = (drop ? kCallDrops : 0) | (in_waves ? kCallInWaves : 0) | (groups ? kCallGroups : 0) |
                    (groups && grouped_in_slot ? kCallSlotIsGrouped : 0);
  pending->id =
      next_op(call_of(OpKind::dispatch, has_weights, caller, format, flags), *pending->lease, format);
  const PlanReport& report = pending->plan =
      issued([&] { return execute_plan(pending->id, plan_op(routing, *pending->lease, drop)); });
  if (report.status == PlanStatus::bad_id) {
    --epoch_;  // no rank has heard of it
    throw std::invalid_argument(what_is_bad(report.bad_index, report.bad_id));
  }
  if (report.status == PlanStatus::overflow) raise_overflow(report.fullest, report.fullest_rows);
  pending->rows = report.rows;
  pending->results = routing.offsets ? report.grouped_rows : pending->rows;
  pending->grouped_in_slot = report.grouped_in_slot;
  begin_turn(*pending);
  return pending;
}

Ticket Communicator::dispatch_bounded(const Rows& rows, const RoutePlan& routing, const Received& received,
                                      bool drop, bool async, std::shared_ptr<SlotLease>* lease, Held held,
                                      uint8_t caller) {
  const Issue issue(*this);
  check_ready();
  layout_of(rows.format);
  const bool groups = uses_places(routing), grouped = groups && received.rows_in_slot;
  if (routing.is_grouped() && received.rows_in_slot) check_room_for_groups(routing, routing.results);
  keep_near();
  auto slot = take_slot();
  RowsOp op = rows_op(rows, routing, received, *slot);
  op.send.ordinals = slot->slot().sent_ordinals;
  op.unpack.fresh = true;
  const PlanOp plan = plan_op(routing, *slot, drop);
  const int flags = kCallBounded | (drop ? kCallDrops : 0) | (groups ? kCallGroups : 0) |
                    (grouped ? kCallSlotIsGrouped : 0);
  const OpId id =
      next_op(call_of(OpKind::dispatch, rows.has_weights, caller, rows.format, flags), *slot, rows.format);
  if (received.rows_in_slot) *lease = slot;
  return issued([&] {
    return execute_bounded(id, plan, op,
                           {async, std::move(held), std::move(slot), {}, copy_of(routing, received)});
  });
}

// A plan runs ahead of operations issued earlier, and publishes its call before theirs. That call may be at
// most a ring of calls ahead, so now and then a plan comes after all of them.
void Communicator::keep_near() {
  constexpr uint64_t kAhead = kCallRing / 2;
  if (is_captured() || epoch_ - near_epoch_ < kAhead) return;  // a graph's plans come after all before them
  near_epoch_ = epoch_;
  plan_after_all();
}

Ticket Communicator::finish_dispatch(PendingDispatch& pending, const Rows& rows, const RoutePlan& routing,
                                     const Received& received, bool async, Held held) {
  const Issue issue(*this, Issue::Of::pending_dispatch);
  Rows sent = rows;
  sent.format = RowFormat::from_word(pending.id.format);
  RowsOp op = rows_op(sent, routing, received, *pending.lease);
  op.send.ordinals = pending.lease->slot().sent_ordinals;
  op.unpack.fresh = true;
  auto lease = received.rows_in_slot ? pending.lease : std::move(pending.lease);
  const Ticket ticket =
      issued([&] { return execute_rows(pending.id, op, {async, std::move(held), std::move(lease)}); });
  end_turn(pending);
  return ticket;
}

Ticket Communicator::redispatch(const Rows& rows, const RoutePlan& routing, const Received& received,
                                bool async, std::shared_ptr<SlotLease>* lease, Held held, uint8_t caller) {
  const Issue issue(*this);
  check_ready();
  if (!routing.totals) check_routes(routing);
  layout_of(rows.format);
  const bool grouped = routing.is_grouped() && received.rows_in_slot;
  if (grouped) check_room_for_groups(routing, received.count);
  if (received.weighing.y) check_sum_of(received.weighing.dtype);
  auto slot = take_slot();
  RowsOp op = rows_op(rows, routing, received, *slot);
  const int flags = grouped ? kCallSlotIsGrouped : 0;
  const OpId id =
      next_op(call_of(OpKind::redispatch, rows.has_weights, caller, rows.format, flags), *slot, rows.format);
  if (received.rows_in_slot) *lease = slot;
  return issued(
      [&] { return execute_rows(id, op, {async, std::move(held), std::move(slot), unchecked(routing)}); });
}

Ticket Communicator::combine(const CombineInput& input, const RoutePlan& routing, std::byte* out,
                             std::byte* out_weights, bool async, Held held, uint8_t caller) {
  const Issue issue(*this);
  check_ready();
  if (!routing.totals) check_routes(routing);
  check_out(out);
  if (!input.format.is_own()) check_sum_of(input.dtype);
  CombineSlot slot = combine_slot(input, routing, layout_of(input.format));
  CombineOp op{};
  op.local_sum = local_sum_plan(input, routing, slot);
  op.pull = pull_plan(input, routing, op.local_sum, out, out_weights);
  op.users_rows = slot.users_rows;
  op.in_place = slot.in_place;
  const int flags = slot.in_place && routing.is_grouped() ? kCallSlotIsGrouped : 0;
  const OpId id = next_op(call_of(OpKind::combine, input.has_weight_grads, caller, input.format, flags),
                          *slot.lease, input.format);
  return issued([&] {
    return execute_combine(id, op, {async, std::move(held), std::move(slot.lease), unchecked(routing)});
  });
}

std::shared_ptr<SlotLease> Communicator::lend_slot(bool once) {
  const Issue issue(*this);
  check_ready();
  auto lease = take_slot();
  await_pulls({OpKind::combine, static_cast<uint8_t>(lease->index())}, lease);
  if (once) lease->lend();
  return lease;
}

OpId Communicator::next_op(Call call, const SlotLease& lease, const RowFormat& format) {
  call.slot = static_cast<uint8_t>(lease.index());
  return {call, is_captured() ? 0 : ++epoch_, format.is_own() ? 0 : format.word()};
}

std::shared_ptr<SlotLease> Communicator::take_slot() {
  const uint64_t capture = capture_id();
  auto lease = slots_->take(capture);
  if (!lease) {
    if (!capture) drain_unless_interrupted();  // operations under way give theirs back
    collect_slots();
    lease = slots_->take(capture);
  }
  if (lease) {
    prepare_slot(*lease);
    return lease;
  }
  throw SlotError("all " + std::to_string(config_.slots) +
                  " slots are in use by zero-copy results, lent buffers or CUDA graphs: release a handle "
                  "(handle.release(), or let its tensors go), or make the communicator with more slots");
}

std::string Communicator::what_is_bad(int64_t index, int64_t id) const {
  return "topk_idx[" + std::to_string(index / config_.topk) + ", " + std::to_string(index % config_.topk) +
         "] is " + std::to_string(id) + "; expert ids lie in [0, " + std::to_string(config_.experts) +
         "), and -1 leaves a place empty";
}

void Communicator::raise_overflow(int64_t rank, int64_t rows) const {
  throw CapacityError("rank " + std::to_string(rank) + " would receive " + std::to_string(rows) +
                          " rows, and capacity is " + std::to_string(config_.capacity) +
                          "; nothing was sent. Raise capacity, or dispatch with overflow=\"drop\"",
                      rank, rows);
}

void Communicator::raise_trouble() {
  const auto trouble = take_trouble();
  if (!trouble) return;
  const std::string rank = "rank " + std::to_string(config_.rank);
  if (trouble->status == PlanStatus::bad_id) {
    throw std::invalid_argument("in an earlier, bounded dispatch of " + rank + ", " +
                                what_is_bad(trouble->bad_index, trouble->bad_id) + ". It was left out");
  }
  throw CapacityError(rank + " had no room for " + std::to_string(trouble->dropped) + " of the " +
                          std::to_string(trouble->rows) +
                          " rows that came in an earlier, bounded dispatch: they were left out. Give it more "
                          "(capacity, max_grouped_rows, rows_per_expert), or dispatch with overflow=\"drop\"",
                      config_.rank, trouble->rows);
}

void Communicator::check_ready() {
  check_health();
  raise_trouble();
}

void Communicator::check_out(const std::byte* out) const {
  if (!slots_->holds(out)) return;
  throw std::invalid_argument(
      "out lies in the communicator's own memory (a combine_buffer, or a result that was not copied), from "
      "which other ranks may still read: give another tensor");
}

SlotLayout Communicator::layout_of(const RowFormat& format) const {
  if (format.is_own()) return layout_;
  const bool sound =
      format.bytes > 0 && format.scale_bytes >= 0 && format.scale_bytes < int64_t{1} << RowFormat::kScaleBits;
  if (sound && layout_.has_room_for(format)) return layout_.with(format);
  const std::string scales =
      format.scale_bytes ? " and scales of " + std::to_string(format.scale_bytes) : std::string();
  throw std::invalid_argument("rows of " + std::to_string(format.bytes) + " bytes" + scales +
                              " have no room where this communicator has " +
                              std::to_string(layout_.room_bytes) +
                              " for each: convert them, or make one with a wider hidden or dtype");
}

void Communicator::check_sum_of(DType dtype) const {
  if (accumulator_size(dtype) == layout_.weight_bytes) return;
  throw std::invalid_argument(
      "sums are taken in float64 for float64 rows only, and weights have that type: "
      "make a communicator with dtype=float64 for such rows, and another for others");
}

Communicator::CombineSlot Communicator::combine_slot(const CombineInput& input, const RoutePlan& routing,
                                                     const SlotLayout& layout) {
  // Rows that already lie in a slot, in their order, are pulled from there.
  const bool in_order = (routing.is_grouped() ? uses_places(routing) : !input.weights) &&
                        input.stride == layout.row_bytes &&
                        input.count <= (routing.is_grouped() ? layout.grouped_rows : layout.room());
  auto lease = in_order && input.y ? slots_->find(input.y) : nullptr;
  if (!lease || input.y != lease->slot().rows) return {take_slot(), false, false};
  if (lease->lent() && is_captured() && !slots_->is_reserved(lease->index(), capture_id())) {
    throw SlotError(
        "this combine_buffer was lent before the capture of a CUDA graph, and is good for one combine: ask "
        "for it within the capture, so that each run of the graph waits until it may be written");
  }
  lease->use();
  const bool users_rows = !lease->lent();
  return {std::move(lease), true, users_rows};
}

void Communicator::check_room_for_groups(const RoutePlan& routing, int64_t rows) const {
  if (uses_places(routing) && rows <= layout_.grouped_rows) return;
  throw std::invalid_argument(std::to_string(rows) +
                              " rows grouped by expert have no room in a slot, which is for " +
                              std::to_string(layout_.grouped_rows));
}

PlanOp Communicator::plan_op(const RoutePlan& routing, const SlotLease& lease, bool drop) const {
  PlanOp op{};
  op.routing = {routing.topk_idx, routing.tokens, config_.topk, width_, placement_, nullptr};
  op.routes = routing.routes;
  op.ordinals = lease.slot().sent_ordinals;
  op.group_firsts = lease.slot().group_firsts;
  op.rows_per_expert = routing.rows_per_expert;
  op.offsets = routing.offsets;
  op.shape = routing.shape;
  op.record = lease.slot().record;
  op.groups = uses_places(routing);
  op.places = routing.places;
  op.grouped_rows = layout_.grouped_rows;
  op.capacity = config_.capacity;
  op.totals = routing.totals;
  op.most_rows = routing.most_rows;
  op.padded = routing.padded;
  op.drop = drop;
  return op;
}

RowsOp Communicator::rows_op(const Rows& rows, const RoutePlan& routing, const Received& received,
                             const SlotLease& lease) const {
  RowsOp op{};
  op.send = send_plan(rows, routing);
  op.unpack = unpack_plan(routing, received, lease);
  op.unpack.layout = op.send.layout;
  return op;
}

SendPlan Communicator::send_plan(const Rows& rows, const RoutePlan& routing) const {
  SendPlan plan{};
  plan.tokens = rows.count;
  plan.topk = config_.topk;
  plan.width = width_;
  plan.x = rows.x;
  plan.x_stride = rows.stride;
  plan.scales = rows.scales;
  plan.scales_stride = rows.scales_stride;
  plan.conversion = rows.conversion;
  plan.routes = routing.routes;
  plan.places = uses_places(routing) ? routing.places : nullptr;
  plan.topk_idx = routing.topk_idx;
  plan.weights = rows.weights;
  plan.placement = placement_;
  plan.layout = layout_.with(rows.format);
  return plan;
}

UnpackPlan Communicator::unpack_plan(const RoutePlan& routing, const Received& received,
                                     const SlotLease& lease) const {
  UnpackPlan plan{};
  plan.topk = config_.topk;
  plan.slot = lease.slot();
  plan.layout = layout_;
  plan.rows = routing.rows;
  plan.totals = routing.totals;
  plan.results = routing.results;
  plan.zero_rest = received.zero_rest;
  plan.fixed_groups = routing.shape.fixed != 0;
  plan.expand_to = routing.expand_to;
  plan.offsets = routing.offsets;
  plan.rows_per_expert = routing.rows_per_expert;
  plan.experts = placement_.count(config_.rank);
  plan.out_rows = received.rows;
  plan.out_scales = received.scales;
  plan.out_weights = received.weights;
  plan.out_topk_idx = received.topk_idx;
  plan.out_source = received.source;
  plan.weighing = received.weighing;
  return plan;
}

LocalSumPlan Communicator::local_sum_plan(const CombineInput& input, const RoutePlan& routing,
                                          const CombineSlot& slot) const {
  LocalSumPlan plan{};
  plan.layout = layout_.with(input.format);
  plan.dtype = input.format.is_own() ? config_.dtype : input.dtype;
  plan.hidden = plan.layout.row_bytes / size_of(plan.dtype);
  plan.topk = config_.topk;
  plan.rows = routing.rows;
  plan.totals = routing.totals;
  plan.y = slot.in_place ? nullptr : input.y;
  plan.grouped_rows = slot.in_place && routing.is_grouped() ? input.count : 0;
  plan.y_stride = input.stride;
  plan.expand_to = routing.expand_to;
  plan.weights = input.weights;
  plan.weight_grads = input.weight_grads;
  plan.slot = slot.lease->slot();
  return plan;
}

PullPlan Communicator::pull_plan(const CombineInput& input, const RoutePlan& routing,
                                 const LocalSumPlan& local_sum, std::byte* out,
                                 std::byte* out_weights) const {
  PullPlan plan{};
  plan.layout = local_sum.layout;
  plan.dtype = local_sum.dtype;
  plan.hidden = local_sum.hidden;
  plan.tokens = routing.tokens;
  plan.topk = config_.topk;
  plan.width = width_;
  plan.routes = routing.routes;
  plan.places = uses_places(routing) ? routing.places : nullptr;
  plan.topk_idx = routing.topk_idx;
  plan.out = out;
  plan.bias = input.bias;
  plan.bias_stride = input.bias_stride;
  plan.out_weights = out_weights;
  if (routing.is_grouped() ? uses_places(routing) : !local_sum.weights) plan.own_y = local_sum.y;
  plan.own_stride = local_sum.y_stride;
  plan.own_weights = local_sum.weights;
  plan.own_grouped = plan.own_y && routing.is_grouped() ? bit_of(config_.rank) : 0;
  plan.placement = placement_;
  return plan;
}

}  // namespace commlib
