// A simulated accelerator: the device "sim" of device.py, on torch's key for out-of-tree devices.
//
// Its memory is host memory and its kernels are the CPU's, so its numbers are real. What it adds is
// what a GPU adds: operands must be on one device, memory has an end, reading a value waits for the
// device, and every operator, copy and wait is counted.
//
// An operator that reaches the device counts as one launch. Views and allocations count as none.
// Operators of several kernels (a sort, a cumulative sum, foreach over many tensors) count as one,
// so counts are a lower bound of what CUDA launches.

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
using torch::jit::Stack;

constexpr auto kSim = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSim, 0);

// ---- counters and limits ------------------------------------------------------------------------

using Counts = c10::Dict<std::string, int64_t>;

// The autograd engine runs the backward in a thread of its own, hence the lock.
struct State {
  std::mutex lock;
  Counts launches;  // by operator, without overload: "mm", "add"
  Counts waits;     // by reason: "item", "copy to the host", "nonzero"
  Counts copies;    // "h2d", "h2d bytes", "h2d blocking", "d2h", "d2h bytes"
  int64_t used = 0, peak = 0, limit = -1;  // bytes; -1: no limit
  bool plain_error = false;  // running out of memory comes as cuBLAS says it
  bool float64 = true;       // whether the device has it
};

State& state() {
  static State* made = new State;  // never destroyed: tensors outlive static objects
  return *made;
}

void add(Counts counts, const std::string& key, int64_t n = 1) {
  std::lock_guard<std::mutex> hold(state().lock);
  auto found = counts.find(key);
  counts.insert_or_assign(key, n + (found == counts.end() ? 0 : found->value()));
}

void count_launch(const std::string& name) { add(state().launches, name); }
void count_wait(const std::string& reason) { add(state().waits, reason); }

void count_copy(const std::string& way, int64_t bytes) {
  add(state().copies, way);
  add(state().copies, way + " bytes", bytes);
}

// ---- memory -------------------------------------------------------------------------------------

constexpr size_t kHeader = 64;  // before each block: its size; keeps the alignment

struct SimAllocator final : at::Allocator {
  static void release(void* data) {
    if (data == nullptr) return;
    auto* block = static_cast<char*>(data) - kHeader;
    std::lock_guard<std::mutex> hold(state().lock);
    state().used -= *reinterpret_cast<int64_t*>(block);
    std::free(block);
  }

  static void reserve(int64_t size) {
    auto& s = state();
    std::lock_guard<std::mutex> hold(s.lock);
    if (s.limit >= 0 && s.used + size > s.limit) {
      TORCH_CHECK(!s.plain_error,
          "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`");
      C10_THROW_ERROR(OutOfMemoryError, c10::str("sim out of memory. Tried to allocate ", size,
          " bytes; ", s.used, " of ", s.limit, " are in use."));
    }
    s.used += size;
    s.peak = std::max(s.peak, s.used);
  }

  at::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, kDevice};
    reserve(static_cast<int64_t>(size));
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, kHeader, size + kHeader) == 0, "the host is out of memory");
    *static_cast<int64_t*>(block) = static_cast<int64_t>(size);
    void* data = static_cast<char*>(block) + kHeader;
    return {data, data, &release, kDevice};
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

SimAllocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(state().float64 || (dtype != at::kDouble && dtype != at::kComplexDouble),
      "Cannot convert a sim Tensor to float64 dtype as the device doesn't support float64.");
}

// A tensor over the same memory that the CPU's kernels take.
Tensor on_host(const Tensor& x) {
  if (!x.defined() || x.device().type() != kSim) return x;
  auto options = x.options().device(at::kCPU).requires_grad(false);
  // one without elements may be an output that the kernel is going to resize
  if (x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), options);
}

Tensor on_device(const Tensor& x) {
  if (!x.defined() || x.device().type() == kSim) return x;
  auto made = at::empty_strided(x.sizes(), x.strides(), x.options().device(kDevice));
  on_host(made).copy_(x);
  return made;
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

// ---- views --------------------------------------------------------------------------------------

Tensor as_strided(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  auto start = offset ? std::make_optional(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& x, c10::SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize(
    const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(Tensor& x, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(x, std::move(source), offset.expect_int(),
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// ---- copies -------------------------------------------------------------------------------------

Tensor copy_between(const Tensor& from, const Tensor& to, bool non_blocking) {
  bool out = from.device().type() == kSim, in = to.device().type() == kSim;
  if (out && in) {
    count_launch("copy");
  } else if (in) {
    count_copy("h2d", static_cast<int64_t>(from.nbytes()));
    if (!non_blocking) add(state().copies, "h2d blocking");
  } else {
    count_copy("d2h", static_cast<int64_t>(from.nbytes()));
    if (!non_blocking) count_wait("copy to the host");
  }
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_between(from, to, false);
}

at::Scalar item(const Tensor& x) {
  count_wait("item");
  return on_host(x).item();
}

// ---- every other operator: the CPU's kernel on the same memory ----------------------------------

// What CUDA's kernel cannot do without the host knowing a value.
const std::set<std::string> kWaits = {"nonzero", "masked_select", "equal", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"};

// "aten::add_.Tensor" -> "add"
std::string plain_name(const c10::OperatorHandle& op) {
  auto name = op.schema().operator_name().name;
  name = name.substr(name.find("::") + 2);
  if (name.size() > 1 && name.back() == '_') name.pop_back();
  return name;
}

// One call: its tensors replaced by tensors on the host, its results by tensors on the device.
class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), stack_(stack), name_(plain_name(op)), start_(stack->size() - arguments().size()),
        given_(stack->begin() + static_cast<int64_t>(start_), stack->end()) {
    reads_index_ = name_ == "index";
    writes_index_ = name_ == "_index_put_impl" || name_ == "index_put";
  }

  void run() {
    for (size_t i = 0; i < given_.size(); i++) stack_->at(start_ + i) = lower(given_[i], i);
    TORCH_CHECK(!(on_sim_ && on_cpu_), "Expected all tensors to be on the same device, but found "
        "at least two devices, sim:0 and cpu! (when checking arguments of ", op_.schema().name(),
        ")");
    count_launch(name_);
    if (kWaits.count(name_)) count_wait(name_);
    auto lowered = std::vector<c10::IValue>(
        stack_->begin() + static_cast<int64_t>(start_), stack_->end());
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    finish_outputs(lowered);
    auto& returns = op_.schema().returns();
    for (size_t i = 0; i < returns.size(); i++) {
      auto& value = stack_->at(start_ + i);
      value = raise(value, returns[i]);
    }
  }

 private:
  const std::vector<c10::Argument>& arguments() const { return op_.schema().arguments(); }

  static bool writes(const c10::Argument& argument) {
    return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  }

  // Indices may be on the host; a mask takes a nonzero. Where "index" gets either, torch has made
  // and counted the copy and the nonzero before.
  void count_index(const Tensor& x) {
    if (!writes_index_) return;
    if (x.device().is_cpu()) {
      count_copy("h2d", static_cast<int64_t>(x.nbytes()));
      add(state().copies, "h2d blocking");
    }
    if (x.scalar_type() != at::kBool && x.scalar_type() != at::kByte) return;
    count_launch("nonzero");
    count_wait("nonzero");
  }

  Tensor lower(const Tensor& x, bool index) {
    if (!x.defined()) return x;
    if (index) {
      count_index(x);
    } else if (x.device().type() == kSim) {
      on_sim_ = true;
    } else if (x.dim() > 0) {  // a number in a tensor travels as an argument of the kernel
      on_cpu_ = true;
    }
    return on_host(x);
  }

  c10::IValue lower(const c10::IValue& value, size_t at) {
    bool index = (reads_index_ || writes_index_) && arguments()[at].name() == "indices";
    if (value.isTensor()) return lower(value.toTensor(), index);
    if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& x : value.toTensorVector()) all.push_back(lower(x, index));
      return all;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const std::optional<Tensor>& x : value.toOptionalTensorVector())
        all.push_back(x ? std::make_optional(lower(*x, index)) : std::nullopt);
      return all;
    }
    if (value.isDevice() && value.toDevice().type() == kSim) return c10::Device(at::kCPU);
    return value;
  }

  // Outputs that were empty now have a size, in memory of the host.
  void finish_outputs(const std::vector<c10::IValue>& lowered) {
    for (size_t i = 0; i < given_.size(); i++) {
      if (!writes(arguments()[i]) || !given_[i].isTensor()) continue;
      const Tensor& to = given_[i].toTensor();
      const Tensor& from = lowered[i].toTensor();
      if (!to.defined() || to.device().type() != kSim || to.sizes() == from.sizes()) continue;
      to.resize_(from.sizes());
      on_host(to).copy_(from);
    }
  }

  c10::IValue raise(const c10::IValue& value, const c10::Argument& type) {
    if (auto* alias = type.alias_info()) {
      TORCH_CHECK(alias->isWrite(), "sim: no view ", op_.schema());
      for (size_t i = 0; i < given_.size(); i++) {
        auto* other = arguments()[i].alias_info();
        if (other != nullptr && other->beforeSets() == alias->beforeSets()) return given_[i];
      }
    }
    if (value.isTensor()) return on_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& x : value.toTensorVector()) all.push_back(on_device(x));
      return all;
    }
    return value;
  }

  const c10::OperatorHandle& op_;
  Stack* stack_;
  std::string name_;
  size_t start_;
  std::vector<c10::IValue> given_;
  bool reads_index_ = false, writes_index_ = false, on_sim_ = false, on_cpu_ = false;
};

void run_on_host(const c10::OperatorHandle& op, Stack* stack) { HostCall(op, stack).run(); }

// ---- fused attention, one kernel each way as on CUDA --------------------------------------------

// (batch, heads, tokens, width), of as many heads as the queries, as the CPU's kernel wants it
Tensor spread(const Tensor& x, int64_t heads) {
  auto host = on_host(x);
  if (host.size(1) != heads) host = host.repeat_interleave(heads / host.size(1), 1);
  return host.stride(-1) == 1 ? host : host.contiguous();
}

// The reverse: the gradients of the queries that shared a head, added up.
Tensor fold(const Tensor& gradient, int64_t heads) {
  return gradient.size(1) == heads ? gradient : gradient.unflatten(1, {heads, -1}).sum(2);
}

int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  bool plain = q.dim() == 4 && q.size(-1) == v.size(-1) && k.size(-2) > 0 && q.size(-2) > 0;
  return static_cast<int64_t>(plain ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>
attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
    double dropout, bool causal, bool, std::optional<double> scale) {
  count_launch("attention");
  auto mask = bias && bias->defined() ? std::make_optional(on_host(*bias)) : std::nullopt;
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(spread(q, q.size(1)),
      spread(k, q.size(1)), spread(v, q.size(1)), dropout, causal, mask, scale);
  return {on_device(out), on_device(lse), Tensor(), Tensor(), q.size(2), k.size(2), Tensor(),
      Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& g, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& bias, std::array<bool, 4>, const Tensor& out,
    const Tensor& lse, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout,
    bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  count_launch("attention_backward");
  auto heads = q.size(1);
  auto mask = bias.defined() ? std::make_optional(on_host(bias)) : std::nullopt;
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(spread(g, heads),
      spread(q, heads), spread(k, heads), spread(v, heads), on_host(out), on_host(lse), dropout,
      causal, mask, scale);
  return {on_device(dq), on_device(fold(dk, k.size(1))), on_device(fold(dv, v.size(1))), Tensor()};
}

// ---- flash attention of sequences of unequal length, as CUDA's ------------------------------------
//
// (tokens, heads, width) each; sequence i has the tokens from starts[i] to starts[i + 1]. Kernels take
// their arguments boxed, as torch adds one now and then; those used here come first in all versions.

struct Span {
  int64_t from, to;
};

std::vector<Span> spans_of(const Tensor& starts) {
  auto at = on_host(starts).to(at::kLong).contiguous();
  std::vector<Span> spans;
  for (int64_t i = 0; i + 1 < at.numel(); i++)
    spans.push_back({at.data_ptr<int64_t>()[i], at.data_ptr<int64_t>()[i + 1]});
  return spans;
}

// some tokens as a batch of one, (1, heads, tokens, width), of as many heads as the queries
Tensor sequence(const Tensor& x, Span span, int64_t heads) {
  return spread(x.slice(0, span.from, span.to).transpose(0, 1).unsqueeze(0), heads);
}

void flash_forward(const c10::OperatorHandle& op, Stack* stack) {
  auto n = op.schema().arguments().size();
  std::vector<c10::IValue> given(stack->end() - static_cast<int64_t>(n), stack->end());
  torch::jit::drop(*stack, n);
  count_launch("flash_attention");
  auto q = on_host(given[0].toTensor()), k = on_host(given[1].toTensor());
  auto v = on_host(given[2].toTensor());
  auto queries = spans_of(given[3].toTensor()), keys = spans_of(given[4].toTensor());
  auto heads = q.size(1);
  auto out = at::empty(q.sizes(), q.options());
  auto lse = at::empty({heads, q.size(0)}, q.options().dtype(at::kFloat));
  for (size_t i = 0; i < queries.size(); i++) {
    auto [own, level] = at::_scaled_dot_product_flash_attention_for_cpu(
        sequence(q, queries[i], heads), sequence(k, keys[i], heads), sequence(v, keys[i], heads),
        0.0, given[8].toBool(), std::nullopt, given[10].toOptional<double>());
    out.slice(0, queries[i].from, queries[i].to).copy_(own[0].transpose(0, 1));
    lse.slice(1, queries[i].from, queries[i].to).copy_(level[0]);
  }
  auto none = at::empty({0}, q.options().device(kDevice));
  torch::jit::push(*stack, on_device(out), on_device(lse), none, none, none);
}

void flash_backward(const c10::OperatorHandle& op, Stack* stack) {
  auto n = op.schema().arguments().size();
  std::vector<c10::IValue> given(stack->end() - static_cast<int64_t>(n), stack->end());
  torch::jit::drop(*stack, n);
  count_launch("flash_attention_backward");
  std::array<Tensor, 6> x;  // gradient, q, k, v, out, log-sum-exp
  for (size_t i = 0; i < x.size(); i++) x[i] = on_host(given[i].toTensor());
  auto [g, q, k, v, out, lse] = x;
  auto queries = spans_of(given[6].toTensor()), keys = spans_of(given[7].toTensor());
  auto heads = q.size(1), kv_heads = k.size(1);
  auto dq = at::zeros(q.sizes(), q.options());
  auto dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
  for (size_t i = 0; i < queries.size(); i++) {
    auto [a, b] = queries[i];
    auto [c, d] = keys[i];
    auto parts = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        sequence(g, queries[i], heads), sequence(q, queries[i], heads),
        sequence(k, keys[i], heads), sequence(v, keys[i], heads), sequence(out, queries[i], heads),
        lse.slice(1, a, b).unsqueeze(0), 0.0, given[11].toBool(), std::nullopt,
        given[14].toOptional<double>());
    dq.slice(0, a, b).add_(std::get<0>(parts)[0].transpose(0, 1));
    dk.slice(0, c, d).add_(fold(std::get<1>(parts), kv_heads)[0].transpose(0, 1));
    dv.slice(0, c, d).add_(fold(std::get<2>(parts), kv_heads)[0].transpose(0, 1));
  }
  torch::jit::push(*stack, on_device(dq), on_device(dk), on_device(dv));
}

// ---- an RMS norm over the last dimension, one kernel each way as on CUDA ------------------------

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, at::IntArrayRef, const std::optional<Tensor>& w,
    std::optional<double> eps) {
  count_launch("rms_norm");
  auto wide = on_host(x).to(at::kFloat);
  auto squares = wide.square().mean(-1, true);
  auto rstd = (squares + eps.value_or(std::numeric_limits<float>::epsilon())).rsqrt();
  auto y = wide * rstd;
  if (w && w->defined()) y = y * on_host(*w).to(at::kFloat);
  return {on_device(y.to(x.scalar_type())), on_device(rstd)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const Tensor& x,
    at::IntArrayRef, const Tensor& rstd, const std::optional<Tensor>& w, std::array<bool, 2> wanted) {
  count_launch("rms_norm_backward");
  auto g = on_host(gradient).to(at::kFloat), scale = on_host(rstd).to(at::kFloat);
  auto normed = on_host(x).to(at::kFloat) * scale;
  auto weighted = w && w->defined() ? g * on_host(*w).to(at::kFloat) : g;
  auto dx = scale * (weighted - normed * (weighted * normed).mean(-1, true));
  Tensor dw;
  if (wanted[1]) dw = (g * normed).flatten(0, -2).sum(0).to(w->scalar_type());
  return {on_device(dx.to(x.scalar_type())), on_device(dw)};
}

// a product of bfloat16 matrices that is not rounded to bfloat16
Tensor mm_out_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  count_launch("mm");
  return on_device(at::mm(on_host(a).to(dtype), on_host(b).to(dtype)));
}

// ---- what torch wants to know of a device -------------------------------------------------------

// One device with one stream, on which everything is finished when the call returns.
struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(kDevice); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { count_wait("synchronize"); }
  void synchronizeStream(const c10::Stream&) const override { count_wait("synchronize"); }
  void synchronizeDevice(c10::DeviceIndex) const override { count_wait("synchronize"); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_copy_from", &copy_between);
  m.impl("_copy_from_and_resize", &copy_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  m.impl("_flash_attention_forward", torch::CppFunction::makeFromBoxedFunction<&flash_forward>());
  m.impl("_flash_attention_backward", torch::CppFunction::makeFromBoxedFunction<&flash_backward>());
  m.impl("_fused_rms_norm", &rms_norm);
  m.impl("_fused_rms_norm_backward", &rms_norm_backward);
  m.impl("mm.dtype", &mm_out_dtype);
  // elsewhere these fall apart into several operators; CUDA has a kernel for each
  auto whole = [&m](const std::string& name) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  };
  for (auto* name : {"native_layer_norm", "silu_backward"}) whole(name);
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0)
      whole(op.name + (op.overload_name.empty() ? "" : "." + op.overload_name));
}

TORCH_LIBRARY(sim, m) {
  m.def("launches() -> Dict(str, int)", [] { return state().launches.copy(); });
  m.def("waits() -> Dict(str, int)", [] { return state().waits.copy(); });
  m.def("copies() -> Dict(str, int)", [] { return state().copies.copy(); });
  m.def("used() -> int", [] { return state().used; });
  m.def("peak() -> int", [] { return state().peak; });
  m.def("forget_peak() -> ()", [] { state().peak = state().used; });
  m.def("limit() -> int", [] { return state().limit; });
  m.def("count_wait(str reason) -> ()", [](const std::string& reason) { count_wait(reason); });
  m.def("set_limit(int bytes, bool plain_error) -> ()", [](int64_t bytes, bool plain_error) {
    state().limit = bytes;
    state().plain_error = plain_error;
  });
  m.def("set_float64(bool present) -> ()", [](bool present) { state().float64 = present; });
  m.def("start() -> ()", [] { at::RegisterPrivateUse1HooksInterface(new SimHooks); });
}
