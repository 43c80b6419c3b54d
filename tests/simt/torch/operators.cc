// PyTorch's operators on the simulated GPU: those of the CPU, done at once by the thread that calls them,
// when its stream has come there. What they write lands in device memory later, in the order of the stream:
// other streams see it when they have waited for it, and not before by chance. What is captured in a graph is
// done once for the sizes of its results, and again, to the same places, each time the graph runs.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/expand_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "simt/runtime/cudart.h"
#include "simt/runtime/host_work.h"
#include "simt/torch/device.h"

namespace standin {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::IValue;

constexpr c10::DispatchKeySet kKeys{c10::DispatchKey::CUDA};

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator(), kKeys, dtype);
}

size_t bytes_of(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size());
}

// The same memory, for the host.
Tensor on_host(const Tensor& t) {
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(),
                       t.options().device(at::kCPU));
}

// -- what an operator writes

// Elements of equal sizes, however they lie.
struct Layout {
  std::vector<int64_t> sizes, to, from;  // strides of both, in elements
  size_t width;

  Layout(const Tensor& t, const Tensor& f)
      : sizes(f.sizes().vec()), to(t.strides().vec()), from(f.strides().vec()), width(f.element_size()) {}

  void copy(std::byte* t, const std::byte* f, size_t dim = 0) const {
    if (dim == sizes.size()) {
      std::memcpy(t, f, width);
    } else if (dim + 1 == sizes.size() && to[dim] == 1 && from[dim] == 1) {
      std::memcpy(t, f, width * sizes[dim]);
    } else {
      const auto step = static_cast<int64_t>(width);
      for (int64_t i = 0; i < sizes[dim]; ++i)
        copy(t + i * to[dim] * step, f + i * from[dim] * step, dim + 1);
    }
  }
};

// Memory of the device for `result`, which is the host's. It holds no tensor of the device: works of streams
// free none, because that queues more work.
struct Landing {
  std::byte* to;
  Tensor result;
  Layout layout;
  bool alike;

  Landing(const Tensor& place, Tensor r)
      : to(static_cast<std::byte*>(place.mutable_data_ptr())),
        result(std::move(r)),
        layout(place, result),
        alike(result.is_non_overlapping_and_dense() && result.strides() == place.strides()) {}

  void operator()() const {
    if (result.numel() == 0) return;
    const auto* from = static_cast<const std::byte*>(result.const_data_ptr());
    alike ? static_cast<void>(std::memcpy(to, from, bytes_of(result))) : layout.copy(to, from);
  }
};

bool is_captured() { return simt::is_captured(current_stream()); }

void check_may_be_captured(bool may, const std::string& name) {
  TORCH_CHECK(may || !is_captured(), "CUDA error: operation not permitted when stream is capturing (", name,
              ")");
}

// Between two places on the device nothing has to be known now: as on a GPU, the stream does it when it gets
// there, and the host goes on.
bool copied_later(const Tensor& to, const Tensor& from) {
  if (!to.is_cuda() || !from.is_cuda() || to.dtype() != from.dtype()) return false;
  const Tensor source = from.expand(to.sizes());
  if (source.numel() == 0) return true;
  simt::put_off(current_stream(), [t = static_cast<std::byte*>(to.mutable_data_ptr()),
                                   f = static_cast<const std::byte*>(source.const_data_ptr()),
                                   layout = Layout(to, source)] { layout.copy(t, f); });
  return true;
}

// A tensor that the operator writes: its copy on the host, with the same gaps between elements.
struct Written {
  Tensor place, copy;

  explicit Written(const Tensor& t) : place(t) {
    copy = at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
    if (t.numel() > 0) std::memcpy(copy.mutable_data_ptr(), t.const_data_ptr(), bytes_of(t));
  }
  void resize() const {
    if (copy.sizes() != place.sizes()) {  // an `out` that was too small
      place.unsafeGetTensorImpl()->set_storage_keep_dtype(
          empty_strided(copy.sizes(), copy.strides(), copy.scalar_type()).storage());
      place.unsafeGetTensorImpl()->set_storage_offset(0);
    }
    if (copy.sizes() != place.sizes() || copy.strides() != place.strides()) {
      place.unsafeGetTensorImpl()->set_sizes_and_strides(copy.sizes(), copy.strides());
    }
  }
};

// -- one call of an operator

class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), schema_(op.schema()) {}

  void run(torch::jit::Stack* stack) {
    catch_up_with_current_stream();
    const size_t count = schema_.arguments().size();
    given_.assign(stack->end() - count, stack->end());
    call(stack);
    const size_t results = schema_.returns().size();
    for (size_t i = 0; i < results; ++i) {
      IValue& result = (*stack)[stack->size() - results + i];
      result = returned(result, schema_.returns()[i].alias_info());
    }
    for (const Written& w : written_) {
      w.resize();
      landings_.emplace_back(w.place, w.copy);
    }
    is_captured() ? capture() : land_all_later();
  }

 private:
  struct Captured {
    c10::OperatorHandle op;
    std::vector<IValue> given;
    std::vector<Tensor> places;
  };

  // On the host, what was given is on top of the stack; then what it returns.
  void call(torch::jit::Stack* stack) {
    const size_t count = given_.size();
    for (size_t i = 0; i < count; ++i) {
      const auto* alias = schema_.arguments()[i].alias_info();
      (*stack)[stack->size() - count + i] = translated(given_[i], alias && alias->isWrite());
    }
    op_.callBoxed(stack);
  }

  void land_all_later() const {
    for (const auto& [place, result] : landings_) simt::put_off(current_stream(), Landing(place, result));
  }

  // What it has made of what there is now is good for nothing but what follows in the same capture; what it
  // would have changed stays as it is.
  void capture() const {
    const auto kept = std::make_shared<Captured>(Captured{op_, given_, {}});
    const size_t made = landings_.size() - written_.size();
    for (size_t i = 0; i < landings_.size(); ++i) {
      const auto& [place, result] = landings_[i];
      if (i < made) Landing(place, result)();
      kept->places.push_back(place);
    }
    if (landings_.empty()) return;
    simt::keep_with_capture(current_stream(), kept);
    simt::put_off(current_stream(), [captured = kept.get()] {
      Call again(captured->op);
      again.given_ = captured->given;
      again.land_again(captured->places);
    });
  }

  void land_again(const std::vector<Tensor>& places) {
    torch::jit::Stack stack = given_;
    call(&stack);
    size_t next = 0;
    const auto put = [&](const Tensor& result) { Landing(places[next++], result)(); };
    for (size_t i = 0; i < stack.size(); ++i) {
      if (schema_.returns()[i].alias_info()) continue;
      if (stack[i].isTensor() && stack[i].toTensor().defined()) put(stack[i].toTensor());
      if (!stack[i].isTensorList()) continue;
      for (const Tensor& t : stack[i].toTensorVector()) put(t);
    }
    for (const Written& w : written_) put(w.copy);
  }

  IValue translated(const IValue& value, bool writes) {
    if (value.isTensor()) return host_tensor(value.toTensor(), writes);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(host_tensor(t, writes));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
        list.push_back(t ? std::optional<Tensor>(host_tensor(*t, writes)) : t);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(at::kCPU);
    return value;
  }

  Tensor host_tensor(const Tensor& t, bool writes) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      check_may_be_on_host(t);
      return t;
    }
    if (!writes) return views_.emplace_back(t, on_host(t)).second;
    written_.emplace_back(t);
    return written_.back().copy;
  }

  // Copies and indices may be on the host, and numbers.
  void check_may_be_on_host(const Tensor& t) const {
    const std::string& name = schema_.name();
    if (t.dim() == 0 || name == "aten::copy_" || name.find("index") != std::string::npos) return;
    TORCH_CHECK(false,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                t.device(), "! (in ", name, ")");
  }

  IValue returned(const IValue& result, const c10::AliasInfo* alias) {
    if (alias && alias->isWrite()) return as_given(*alias);
    if (result.isTensor()) return device_tensor(result.toTensor(), alias);
    check_may_be_captured(result.isTensorList(), schema_.name());  // the host would wait for it
    if (!result.isTensorList()) return result;
    c10::List<Tensor> list;
    for (const Tensor& t : result.toTensorVector()) list.push_back(device_tensor(t, alias));
    return list;
  }

  IValue as_given(const c10::AliasInfo& alias) const {
    for (size_t i = 0; i < given_.size(); ++i) {
      const auto* of = schema_.arguments()[i].alias_info();
      if (of && of->beforeSets() == alias.beforeSets()) return given_[i];
    }
    TORCH_CHECK(false, schema_.name(), " returns what it was not given");
  }

  Tensor device_tensor(const Tensor& t, const c10::AliasInfo* alias) {
    if (!t.defined()) return t;
    if (alias) return view_on_device(t);
    Tensor made = empty_strided(t.sizes(), t.strides(), t.scalar_type());
    landings_.emplace_back(made, t);
    return made;
  }

  Tensor view_on_device(const Tensor& t) const {
    for (const auto& [device, host] : views_) {
      if (host.storage().data() != t.storage().data()) continue;
      const auto shift = static_cast<const std::byte*>(t.const_data_ptr()) -
                         static_cast<const std::byte*>(device.storage().data());
      return at::native::as_strided_tensorimpl(device, t.sizes(), t.strides(),
                                               shift / static_cast<int64_t>(t.element_size()));
    }
    TORCH_CHECK(false, schema_.name(), " returns a view of what it was not given");
  }

  const c10::OperatorHandle op_;
  const c10::FunctionSchema& schema_;
  std::vector<IValue> given_;
  std::vector<std::pair<Tensor, Tensor>> views_;
  std::vector<std::pair<Tensor, Tensor>> landings_;  // where, and what
  std::vector<Written> written_;
};

void by_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op).run(stack); }

void copy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  constexpr size_t kArguments = 3;  // to, from, and whether the host may go on
  const Tensor to = stack->end()[-3].toTensor(), from = stack->end()[-2].toTensor();
  if (!copied_later(to, from)) {
    check_may_be_captured(to.is_cuda() && (from.is_cuda() || from.dim() == 0), "aten::copy_");
    return by_host(op, stack);
  }
  torch::jit::drop(*stack, kArguments);
  stack->emplace_back(to);
}

// -- what makes tensors and moves no data

void check_exists(const std::optional<at::Device>& device) {
  TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
}

Tensor make_empty(IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                  std::optional<at::Device> device, std::optional<bool>,
                  std::optional<at::MemoryFormat> format) {
  check_exists(device);
  return at::detail::empty_generic(sizes, &allocator(), kKeys, at::dtype_or_default(dtype), format);
}
Tensor make_empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<at::ScalarType> dtype,
                          std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  check_exists(device);
  return empty_strided(sizes, strides, at::dtype_or_default(dtype));
}
Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return at::native::set_storage_cpu_(self, source, 0, {count}, {});
}
void record_stream(Tensor& self, at::Stream stream) {
  note_use(self.storage().data_ptr(), reinterpret_cast<cudaStream_t>(stream.id()));
}

// CUDA's takes integers, too.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  if (at::isFloatingType(self.scalar_type())) return at::histc(self.cpu(), bins, min, max).to(kDevice);
  return at::histc(self.cpu().to(at::kDouble), bins, min, max).to(self.scalar_type()).to(kDevice);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", make_empty);
  m.impl("empty_strided", make_empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("record_stream", record_stream);
  m.impl("histc", histc);
  // Serves all devices, and would look for code that PyTorch for the CPU does not have.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy>());
}

}  // namespace
}  // namespace standin
