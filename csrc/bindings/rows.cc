// Rows, as operations take them by address and as tensors see them.
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "base/type_names.h"

#include "bindings/bindings.h"
#include "bindings/memory.h"

namespace commlib::python {
namespace {

constexpr dlpack::DataType kBytes{dlpack::kUInt, 8, 1};

dlpack::DataType type_of(DType dtype) {
  const uint8_t code = dtype == DType::bf16 ? dlpack::kBfloat : dlpack::kFloat;
  return {code, static_cast<uint8_t>(8 * size_of(dtype)), 1};
}

struct DlpackContext {
  dlpack::ManagedTensor managed;
  std::shared_ptr<void> owner;
  int64_t shape[2];
};

py::capsule to_dlpack(const Memory& m) {
  auto* c = new DlpackContext{{}, m.owner, {m.rows, m.columns}};
  c->managed.tensor = {m.data, m.device, 2, m.type, c->shape, nullptr, 0};
  c->managed.context = c;
  c->managed.deleter = [](dlpack::ManagedTensor* t) { delete static_cast<DlpackContext*>(t->context); };
  return py::capsule(&c->managed, "dltensor", [](PyObject* capsule) {
    // A consumer renames the capsule and calls the deleter itself.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* t = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    t->deleter(t);
  });
}

Rows rows_of(Address x, int64_t stride, int64_t count, bool has_weights, Address weights, Address scales,
             int64_t scales_stride, const RowFormat& format, const Conversion& conversion) {
  return {at<std::byte>(x),      stride,        count,  has_weights, at<std::byte>(weights),
          at<std::byte>(scales), scales_stride, format, conversion};
}

RoutePlan route_plan_of(Address topk_idx, Address routes, Address places, int64_t tokens, int64_t rows,
                        Address expand_to, Address offsets, Address rows_per_expert, int64_t align,
                        int64_t fixed, Address totals, int64_t results, int64_t most_rows, int64_t padded) {
  return {at<int64_t>(topk_idx),
          at<int64_t>(routes),
          at<int64_t>(places),
          tokens,
          rows,
          at<int64_t>(expand_to),
          at<int64_t>(offsets),
          at<int64_t>(rows_per_expert),
          {align, fixed},
          at<int64_t>(totals),
          results,
          most_rows,
          padded};
}

void complete(RoutePlan& plan, int64_t rows, Address expand_to) {
  plan.rows = rows;
  plan.expand_to = at<int64_t>(expand_to);
}

Received received_of(std::optional<Address> rows, Address weights, Address topk_idx, Address source,
                     Address scales, int64_t count, const Weighing& weighing, bool zero_rest, Address groups,
                     int64_t groups_words) {
  return {at<std::byte>(rows.value_or(0)),
          !rows,
          at<std::byte>(weights),
          at<int64_t>(topk_idx),
          at<int64_t>(source),
          at<std::byte>(scales),
          count,
          weighing,
          zero_rest,
          at<int64_t>(groups),
          groups_words};
}

Weighing weighing_of(Address y, int64_t stride, Address weights, Address dots, DType dtype) {
  return {at<std::byte>(y), stride, at<std::byte>(weights), at<std::byte>(dots), dtype};
}

CombineInput combine_input_of(Address y, int64_t count, int64_t stride, Address weights,
                              bool has_weight_grads, Address weight_grads, Address bias, int64_t bias_stride,
                              const RowFormat& format, DType dtype) {
  return {at<std::byte>(y),
          count,
          stride,
          at<std::byte>(weights),
          has_weight_grads,
          at<std::byte>(weight_grads),
          at<std::byte>(bias),
          bias_stride,
          format,
          dtype};
}

void bind_operands(py::module_& m) {
  m.def(
      "type_names", [] { return std::vector<std::string>(std::begin(kTypeNames), std::end(kTypeNames)); },
      "What rows and scales may be, by number from 1.");

  py::class_<RowFormat>(m, "RowFormat", R"(The rows of one operation, and the scales beside each.

Without arguments: the communicator's own rows.)")
      .def(py::init<>())
      .def(py::init([](uint16_t type, int64_t bytes, int64_t scale_bytes) {
             return RowFormat{type, bytes, scale_bytes};
           }),
           "type"_a, "bytes"_a, "scale_bytes"_a = 0)
      .def_property_readonly("is_own", &RowFormat::is_own);

  py::enum_<Quantization>(m, "Quantization", "What rows are converted to as they are sent.")
      .value("none", Quantization::none)
      .value("fp8_e4m3", Quantization::fp8_e4m3)
      .value("fp8_e4m3_ue8m0", Quantization::fp8_e4m3_ue8m0)
      .value("mxfp8", Quantization::mxfp8)
      .value("int8", Quantization::int8);

  py::class_<Conversion>(m, "Conversion", R"(Of rows as they are sent, from so many elements of a type.

Without arguments: they go as they are.)")
      .def(py::init<>())
      .def(py::init(
               [](Quantization to, DType from, int64_t elements) { return Conversion{to, from, elements}; }),
           "to"_a, "dtype"_a, "elements"_a);

  py::class_<Rows>(m, "Rows", "The rows that a rank sends.")
      .def(py::init(&rows_of), "x"_a, "stride"_a, "count"_a, "has_weights"_a, "weights"_a, "scales"_a = 0,
           "scales_stride"_a = 0, format_arg(), py::arg_v("conversion", Conversion{}, "Conversion()"));

  py::class_<RoutePlan>(m, "RoutePlan", "What a dispatch finds, and later operations use again.")
      .def(py::init(&route_plan_of), "topk_idx"_a, "routes"_a, "places"_a, "tokens"_a, "rows"_a = 0,
           "expand_to"_a = 0, "offsets"_a = 0, "rows_per_expert"_a = 0, "align"_a = 1, "fixed"_a = 0,
           "totals"_a = 0, "results"_a = 0, "most_rows"_a = 0, "padded"_a = 0)
      .def("complete", &complete, "rows"_a, "expand_to"_a, "What a dispatch knows once counts are here.");

  py::class_<Weighing>(m, "Weighing", R"(The gradient of a combine with weights, taken as its rows come.

A row of y gets its weight times what has come for it, and its dot the product of y with what has come.)")
      .def(py::init<>())
      .def(py::init(&weighing_of), "y"_a, "stride"_a, "weights"_a, "dots"_a, "dtype"_a);

  py::class_<Received>(m, "Received", "Where received rows go. Rows None: they stay in their slot.")
      .def(py::init(&received_of), "rows"_a, "weights"_a, "topk_idx"_a = 0, "source"_a = 0, "scales"_a = 0,
           "count"_a = 0, py::arg_v("weighing", Weighing{}, "Weighing()"), "zero_rest"_a = false,
           "groups"_a = 0, "groups_words"_a = 0);

  py::class_<CombineInput>(m, "CombineInput", "The rows that a combine sums, and what goes with them.")
      .def(py::init(&combine_input_of), "y"_a, "count"_a, "stride"_a, "weights"_a, "has_weight_grads"_a,
           "weight_grads"_a, "bias"_a, "bias_stride"_a, format_arg(),
           py::arg_v("dtype", DType::bf16, "DType.bf16"));
}

void bind_memory(py::module_& m) {
  py::class_<SlotLease, std::shared_ptr<SlotLease>>(m, "SlotLease", "Holds one slot until it is destroyed.");
  py::class_<Memory>(m, "Memory", "Rows that keep their memory alive; torch.from_dlpack takes them.")
      .def("__dlpack__", [](const Memory& self, const py::kwargs&) { return to_dlpack(self); })
      .def("__dlpack_device__",
           [](const Memory& self) { return py::make_tuple(int{self.device.type}, int{self.device.id}); });
}

}  // namespace

Memory view_of(const Communicator& comm, std::shared_ptr<SlotLease> lease, int64_t rows,
               const RowFormat& format, bool scales) {
  const Config& config = comm.config();
  const SlotLayout layout = lease->layout().with(format);
  const RowArray array = scales ? layout.scales() : layout.rows();
  std::byte* data = lease->slot().rows + array.at;
  const dlpack::Device device =
      config.stream ? dlpack::Device{dlpack::kCuda, config.device} : dlpack::Device{dlpack::kHost, 0};
  if (format.is_own()) return {std::move(lease), data, rows, config.hidden, type_of(config.dtype), device};
  return {std::move(lease), data, rows, array.bytes, kBytes, device};
}

Memory new_rows(CpuCommunicator& comm, int64_t rows) {
  auto buffer = comm.new_rows(rows);
  void* data = buffer.get();
  const Config& config = comm.config();
  return {std::move(buffer), data, rows, config.hidden, type_of(config.dtype), {dlpack::kHost, 0}};
}

void bind_rows(py::module_& m) {
  bind_operands(m);
  bind_memory(m);
}

}  // namespace commlib::python
