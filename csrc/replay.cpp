// Replays a call of the library without Python: what its backend did the first time, tensors put in their places.
//
//   slots = inputs;  for every step:  allocate | launch a kernel | call a PyTorch operation;  outputs = slots as views
//
// A plan belongs to one class of calls: every size, stride, dtype, device and 16-byte alignment of the inputs, every
// number and flag, and which gradients are wanted. `fused_peft/backends/replay.py` makes plans and says what a class has
// none for; there the call goes to Python, as it does the first time. `linear` is the differentiable call itself.

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include "driver.h"

namespace py = pybind11;
using at::Tensor;
using Tensors = std::vector<Tensor>;
using Key = std::vector<int64_t>;

namespace {

using fused_peft::driver;

template <class... What>
void check(fused_peft::Status wrong, const What&... what) {
    TORCH_CHECK(!wrong, what..., " failed: ", wrong);
}

// ---- plans

struct Ref {  // a slot, or a view of it: offset in elements from where the slot's tensor starts
    int64_t slot;
    bool whole;
    std::vector<int64_t> sizes, strides;
    int64_t offset;

    Tensor of(const Tensors& slots) const {
        const Tensor& t = slots[slot];
        return whole ? t : t.as_strided(sizes, strides, t.storage_offset() + offset);
    }
};

struct TensorMap {  // CUtensorMap of a matrix: all but its address
    int dtype, swizzle;
    uint64_t sizes[2], row_bytes[2];
    uint32_t box[2];
};

struct Parameter {
    uint32_t at;  // in the kernel's parameters
    int64_t slot, offset;  // bytes from where the slot's tensor starts
    int map;  // index of a tensor map, -1: a pointer
};

using Function = fused_peft::Status (*)(const void*);  // of one struct; csrc/host.cpp's

struct Step {
    int64_t out = -1;  // the slot that it fills
    std::vector<int64_t> last;  // slots that no later step reads
    // an allocation
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
    bool contiguous = false;
    // a kernel
    void* function = nullptr;
    std::shared_ptr<py::object> kernel;  // Triton's, which unloads the function when it goes
    std::string name;
    unsigned grid[3] = {1, 1, 1}, threads = 0, shared = 0;
    std::vector<char> bytes;
    std::vector<uint32_t> starts;  // of each parameter in bytes
    std::vector<Parameter> parameters;
    std::vector<TensorMap> maps;
    // a function in C that launches what it is given: the struct in ``bytes``, its pointers in ``parameters``
    Function host = nullptr;
    uint32_t stream_at = 0;
    // a PyTorch operation, or a function of Python on tensors
    c10::optional<c10::OperatorHandle> operation;
    std::vector<c10::IValue> arguments;
    std::vector<std::pair<size_t, Ref>> tensors;
    int64_t results = 0;  // into slots out, out + 1, ...
    std::shared_ptr<py::object> function_of_python;
};

struct Plan {
    int64_t slots;
    std::vector<Step> steps;
    std::vector<c10::optional<Ref>> outputs;

    explicit Plan(int64_t inputs) : slots(inputs) {}
};

constexpr size_t MOST = 4096;  // bytes of a kernel's parameters that CUDA takes

void launch(const Step& step, const Tensors& slots, void* stream) {
    alignas(64) char buffer[MOST];
    void* pointers[256];
    std::memcpy(buffer, step.bytes.data(), step.bytes.size());
    for (const Parameter& p : step.parameters) {
        char* data = static_cast<char*>(slots[p.slot].data_ptr()) + p.offset;
        if (p.map < 0) {
            std::memcpy(buffer + p.at, &data, sizeof(data));
        } else {
            const TensorMap& m = step.maps[p.map];
            const uint32_t ones[2] = {1, 1};
            const int result = driver.encode(buffer + p.at, m.dtype, 2, data, m.sizes, m.row_bytes, m.box, ones, 0,
                                             m.swizzle, 2 /* L2 promotion: 128 bytes */, 0);
            check(driver.said(result), "a tensor map for ", step.name);
        }
    }
    for (size_t i = 0; i < step.starts.size(); ++i) pointers[i] = buffer + step.starts[i];
    check(driver.said(driver.launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1,
                                    step.shared, stream, pointers, nullptr)),
          "the launch of ", step.name);
}

void start(const Step& step, const Tensors& slots, void* stream) {
    alignas(64) char buffer[MOST];
    std::memcpy(buffer, step.bytes.data(), step.bytes.size());
    for (const Parameter& p : step.parameters) {
        char* data = static_cast<char*>(slots[p.slot].data_ptr()) + p.offset;
        std::memcpy(buffer + p.at, &data, sizeof(data));
    }
    std::memcpy(buffer + step.stream_at, &stream, sizeof(stream));
    check(step.host(buffer), "the launch of ", step.name);
}

void call(const Step& step, Tensors& slots) {
    if (step.function_of_python) {
        py::gil_scoped_acquire gil;
        py::list given;
        for (const auto& [_, ref] : step.tensors) given.append(ref.of(slots));
        (*step.function_of_python)(*given);
        return;
    }
    torch::jit::Stack stack(step.arguments);
    for (const auto& [at, ref] : step.tensors) stack[at] = ref.of(slots);
    step.operation->callBoxed(stack);
    for (int64_t i = 0; i < step.results; ++i) slots[step.out + i] = std::move(stack[i]).toTensor();
}

// The outputs of a plan; inputs must be of its class. Runs below autograd and autocast.
Tensors run(const Plan& plan, const Tensors& inputs) {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    c10::OptionalDeviceGuard guard;
    void* stream = nullptr;
    const Tensor* on = nullptr;
    for (const Tensor& t : inputs)
        if (t.defined() && (on = &t)) break;
    if (on && on->is_cuda()) {
        guard.reset_device(on->device());
        check(driver.bind(on->device().index()), "binding the CUDA context");
        const c10::impl::VirtualGuardImpl of_device(c10::DeviceType::CUDA);
        stream = of_device.getStreamNativeHandle(of_device.getStream(on->device()));
    }
    Tensors slots(inputs);
    slots.resize(plan.slots);
    for (const Step& step : plan.steps) {
        if (step.function)
            launch(step, slots, stream);
        else if (step.host)
            start(step, slots, stream);
        else if (step.operation || step.function_of_python)
            call(step, slots);
        else
            slots[step.out] = step.contiguous ? at::empty(step.sizes, step.options)
                                              : at::empty_strided(step.sizes, step.strides, step.options);
        for (int64_t slot : step.last) slots[slot].reset();
    }
    Tensors outputs;
    outputs.reserve(plan.outputs.size());
    for (const auto& ref : plan.outputs) outputs.push_back(ref ? ref->of(slots) : Tensor());
    return outputs;
}

// ---- classes of calls

struct Hash {
    size_t operator()(const Key& key) const {
        uint64_t h = 0x9E3779B97F4A7C15;
        for (int64_t n : key) h = (h ^ static_cast<uint64_t>(n)) * 0xFF51AFD7ED558CCD, h ^= h >> 32;
        return h;
    }
};

struct Wanted {  // what backward needs
    bool x = false, T = false;
    int64_t backend = 0;  // which one forward was computed by
};

struct Class {  // of calls: how often one was seen, and its plan once it has one
    int seen = 0;
    bool refused = false;  // it was watched, and has none
    std::shared_ptr<const Plan> plan;
    Wanted wanted;
};

std::mutex mutex;
constexpr size_t MOST_CLASSES = 8192;
auto& classes = *new std::unordered_map<Key, Class, Hash>;  // never destroyed: Python is gone by then
py::object& python = *new py::object;  // (kind, tensors, rest, need, whether to make a plan) -> (outputs, plan or None, *Wanted)

bool add(Key& key, const Tensor& t) {
    if (!t.defined()) {
        key.push_back(-1);
        return true;
    }
    const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
    using K = c10::DispatchKey;
    if (impl.key_set().has_any(c10::DispatchKeySet({K::Python, K::Negative, K::Conjugate, K::ZeroTensor, K::Functionalize,
                                                     K::FuncTorchBatched, K::FuncTorchGradWrapper})) ||
        t.layout() != at::kStrided || !(t.is_cuda() || t.is_cpu()))
        return false;
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    key.push_back(static_cast<int64_t>(sizes.size()) << 32 | static_cast<int64_t>(t.scalar_type()) << 16 |
                  static_cast<int64_t>(t.device().type()) << 8 | aligned);
    key.push_back(t.device().index());
    key.insert(key.end(), sizes.begin(), sizes.end());
    key.insert(key.end(), strides.begin(), strides.end());
    return true;
}

struct Found {
    std::shared_ptr<const Plan> plan;
    bool make = false;
    Wanted wanted;
};

Found look_up(const Key& key) {
    std::unordered_map<Key, Class, Hash> old;  // goes after the lock: a plan's end may wait for Python
    std::lock_guard<std::mutex> lock(mutex);
    if (classes.size() >= MOST_CLASSES) classes.swap(old);
    Class& c = classes[key];
    return {c.plan, ++c.seen > 1 && !c.plan && !c.refused, c.wanted};
}

enum Kind : int64_t { FORWARD, BACKWARD, NORM };  // of core.ops; of others nothing is known here

struct Numbers {  // the operands that are no tensors
    double s = 1, p = 0;
    int64_t h = 0, flags = 0, backend = 0;
};

// What Python computes, and the plan that it makes of it.
Tensors in_python(Kind kind, const Key& key, bool make, const Tensors& inputs, const Numbers& n, const std::vector<bool>& need,
                  Wanted* wanted = nullptr) {
    py::gil_scoped_acquire gil;
    py::list given;
    for (const Tensor& t : inputs) given.append(t.defined() ? py::cast(t) : py::none());
    py::tuple answer;
    try {
        answer = python(static_cast<int64_t>(kind), given, n.s, n.p, n.h, n.flags, n.backend, need, make);
    } catch (py::error_already_set& e) {  // as autograd's threads carry what Python raises
        e.restore();
        python_error raised;
        raised.persist();
        throw raised;
    }
    Tensors outputs;
    for (py::handle t : py::list(answer[0])) outputs.push_back(t.is_none() ? Tensor() : py::cast<Tensor>(t));
    const Wanted w{py::cast<bool>(answer[2]), py::cast<bool>(answer[3]), py::cast<int64_t>(answer[4])};
    if (wanted) *wanted = w;
    std::lock_guard<std::mutex> lock(mutex);
    Class& c = classes[key];
    c.wanted = w;
    if (!answer[1].is_none()) c.plan = py::cast<std::shared_ptr<Plan>>(answer[1]);
    if (make) c.refused = !c.plan;
    return outputs;
}

bool key_of(Key& key, Kind kind, const Tensors& inputs, const Numbers& n, const std::vector<bool>& need) {
    key.reserve(16 + 6 * inputs.size());
    int64_t wanted = 0, s, p;
    for (bool w : need) wanted = wanted << 1 | w;
    std::memcpy(&s, &n.s, sizeof(s));
    std::memcpy(&p, &n.p, sizeof(p));
    for (int64_t number : {static_cast<int64_t>(kind), s, p, n.h, n.flags, n.backend, wanted}) key.push_back(number);
    for (const Tensor& t : inputs)
        if (!add(key, t)) return false;
    return true;
}

// ---- the differentiable call

enum Operand { X, W, C, BIAS, D_IN, D_OUT, A, A_BIAS, G, B, SEED, OPERANDS };  // as core.operands lists them

struct Asked {  // one call of `linear`
    Tensors inputs;
    Numbers numbers;
    std::vector<bool> need;
    Key key;
    Found found;
};

struct Linear : torch::autograd::Function<Linear> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList /* the inputs that are there */, Asked& a) {
        Wanted wanted = a.found.wanted;
        Tensors made = a.found.plan ? run(*a.found.plan, a.inputs)
                                    : in_python(FORWARD, a.key, a.found.make, a.inputs, a.numbers, a.need, &wanted);
        int64_t there = 0;
        for (size_t i = 0; i < OPERANDS; ++i) there |= static_cast<int64_t>(a.inputs[i].defined()) << i;
        Tensors kept = a.inputs;
        if (!wanted.x) kept[X] = Tensor();
        kept[C] = Tensor();
        // of the bias backward needs the dtype alone
        kept[BIAS] = a.need[BIAS] ? at::empty({0}, kept[BIAS].options().requires_grad(false)) : Tensor();
        kept.push_back(wanted.T ? made[1] : Tensor());
        kept.push_back(made[2]);
        ctx->save_for_backward(std::move(kept));
        ctx->set_materialize_grads(false);
        const Numbers& n = a.numbers;
        ctx->saved_data["s"] = n.s, ctx->saved_data["p"] = n.p;
        ctx->saved_data["numbers"] = wanted.backend << 16 | n.h << 8 | n.flags, ctx->saved_data["there"] = there;
        return made[0];
    }

    static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors grads) {
        const Tensor& dy = grads[0];
        const int64_t there = ctx->saved_data["there"].toInt(), numbers = ctx->saved_data["numbers"].toInt();
        std::vector<bool> need(OPERANDS);
        size_t edges = 0;
        for (size_t i = 0; i < OPERANDS; ++i) need[i] = there >> i & 1 && ctx->needs_input_grad(edges++);
        if (!dy.defined()) return Tensors(edges + 1);
        const bool twice = at::GradMode::is_enabled() && dy.requires_grad();
        Tensors found_grads;
        {
            at::NoGradGuard no_grad;
            Tensors inputs = ctx->get_saved_variables();
            inputs.push_back(dy);
            const Numbers n{ctx->saved_data["s"].toDouble(), ctx->saved_data["p"].toDouble(), numbers >> 8 & 255, numbers & 255,
                            numbers >> 16};
            Key key;
            Found found;
            if (key_of(key, BACKWARD, inputs, n, need)) found = look_up(key);
            found_grads = found.plan ? run(*found.plan, inputs) : in_python(BACKWARD, key, found.make, inputs, n, need);
        }
        if (twice) {  // only what requires a gradient gets the node that raises
            for (Tensor& t : found_grads)
                if (t.defined()) t = t.detach().set_requires_grad(true);
            found_grads = torch::autograd::DelayedError(
                "trying to differentiate twice a function that was marked with @once_differentiable",
                static_cast<int64_t>(found_grads.size()))(std::move(found_grads));
        }
        Tensors results;
        for (size_t i = 0; i < OPERANDS; ++i)
            if (there >> i & 1) results.push_back(std::move(found_grads[i]));
        results.emplace_back();  // of Asked
        return results;
    }
};

Tensor tensor_of(PyObject* o) {
    if (o == Py_None) return {};
    TORCH_CHECK_TYPE(THPVariable_Check(o), "an operand is no tensor but ", Py_TYPE(o)->tp_name);
    return THPVariable_Unpack(o);
}

// linear(x, w, c, bias, d_in, d_out, A, a, G, B, seed, s, p, h, flags) -> y, or None where Python must do it
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK(count == OPERANDS + 4, "linear takes ", OPERANDS + 4, " arguments");
    Asked a;
    a.inputs.resize(OPERANDS), a.need.resize(OPERANDS);
    Tensors there;
    bool any = false;
    const bool grad = at::GradMode::is_enabled();
    for (int i = 0; i < OPERANDS; ++i) {
        Tensor t = tensor_of(args[i]);
        if (!t.defined()) continue;
        any |= a.need[i] = grad && t.requires_grad();
        there.push_back(t);
        a.inputs[i] = std::move(t);
    }
    a.numbers = {PyFloat_AsDouble(args[OPERANDS]), PyFloat_AsDouble(args[OPERANDS + 1]),
                 PyLong_AsLongLong(args[OPERANDS + 2]), PyLong_AsLongLong(args[OPERANDS + 3])};
    if (PyErr_Occurred()) return nullptr;
    if (!key_of(a.key, FORWARD, a.inputs, a.numbers, a.need)) Py_RETURN_NONE;
    a.found = look_up(a.key);
    if (any) return THPVariable_Wrap(Linear::apply(at::TensorList(there), a));
    Tensors made = a.found.plan ? run(*a.found.plan, a.inputs)
                                : in_python(FORWARD, a.key, a.found.make, a.inputs, a.numbers, a.need);
    return THPVariable_Wrap(made[0]);
    END_HANDLE_TH_ERRORS
}

// norm(W, squared, A, B, s, flags) -> ‖W + s·B A‖ per row, or None where Python must do it
PyObject* norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK(count == 6, "norm takes 6 arguments");
    Tensors inputs{tensor_of(args[0]), tensor_of(args[1]), tensor_of(args[2]), tensor_of(args[3])};
    const Numbers n{PyFloat_AsDouble(args[4]), 0, 0, PyLong_AsLongLong(args[5])};
    if (PyErr_Occurred()) return nullptr;
    at::NoGradGuard no_grad;
    Key key;
    if (!key_of(key, NORM, inputs, n, {})) Py_RETURN_NONE;
    const Found found = look_up(key);
    Tensors made = found.plan ? run(*found.plan, inputs) : in_python(NORM, key, found.make, inputs, n, {});
    return THPVariable_Wrap(made[0]);
    END_HANDLE_TH_ERRORS
}

// What an op of torch.compile's graphs returns, or None where Python must do it.
py::object run_op(int64_t kind, const std::vector<c10::optional<Tensor>>& tensors, double s, double p, int64_t h, int64_t flags,
                  const std::vector<bool>& need) {
    Tensors inputs;
    for (const auto& t : tensors) inputs.push_back(t ? *t : Tensor());
    const Numbers n{s, p, h, flags, 0};
    at::NoGradGuard no_grad;
    Key key;
    if (!key_of(key, static_cast<Kind>(kind), inputs, n, need)) return py::none();
    const Found found = look_up(key);
    Tensors made = found.plan ? run(*found.plan, inputs) : in_python(static_cast<Kind>(kind), key, found.make, inputs, n, need);
    py::list outputs;
    for (const Tensor& t : made) outputs.append(t.defined() ? py::cast(t) : py::none());
    return outputs;
}

// ---- how Python builds a plan

std::shared_ptr<py::object> held(py::object object) {
    return {new py::object(std::move(object)), [](py::object* held) {
                py::gil_scoped_acquire gil;  // a plan may go where no Python runs
                delete held;
            }};
}

int64_t add_empty(Plan& plan, std::vector<int64_t> sizes, std::vector<int64_t> strides, bool contiguous, const Tensor& like) {
    Step step;
    step.out = plan.slots++;
    step.sizes = std::move(sizes), step.strides = std::move(strides);
    step.contiguous = contiguous, step.options = like.options().requires_grad(false);
    plan.steps.push_back(std::move(step));
    return plan.slots - 1;
}

// arguments in the schema's order, a Ref for each tensor; the first of the slots that the results go to
int64_t add_operation(Plan& plan, const std::string& name, const std::string& overload, py::list arguments, bool in_place) {
    Step step;
    step.operation = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& schema = step.operation->schema();
    for (size_t i = 0; i < arguments.size(); ++i) {
        py::object value = arguments[i];
        if (py::isinstance<Ref>(value)) {
            step.tensors.emplace_back(i, py::cast<Ref>(value));
            step.arguments.emplace_back();
        } else if (schema.arguments()[i].type()->kind() == c10::TypeKind::TensorType && !value.is_none()) {
            step.arguments.emplace_back(at::native::wrapped_scalar_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar()));
        } else {
            step.arguments.push_back(torch::jit::toIValue(value, schema.arguments()[i].type()));
        }
    }
    if (!in_place) {
        step.results = static_cast<int64_t>(schema.returns().size());
        step.out = plan.slots;
        plan.slots += step.results;
    }
    plan.steps.push_back(std::move(step));
    return plan.slots - step.results;
}

void add_function(Plan& plan, py::object function, std::vector<Ref> tensors) {
    Step step;
    step.function_of_python = held(std::move(function));
    for (Ref& t : tensors) step.tensors.emplace_back(0, std::move(t));
    plan.steps.push_back(std::move(step));
}

// parameters: (bytes of it, alignment, None), (8, 8, Ref), or (128, 64, (Ref, dtype, swizzle, sizes, strides in bytes, box))
void add_launch(Plan& plan, const std::string& name, py::object kernel, std::vector<unsigned> grid, unsigned threads,
                unsigned shared, py::list parameters) {
    Step step;
    const auto function = py::cast<int64_t>(kernel.attr("function"));
    step.name = name, step.function = reinterpret_cast<void*>(function), step.kernel = held(std::move(kernel));
    TORCH_CHECK(function && grid.size() <= 3 && parameters.size() <= 256, "no kernel that can be launched: ", name);
    std::copy(grid.begin(), grid.end(), step.grid);
    step.threads = threads, step.shared = shared;
    for (py::handle entry : parameters) {
        py::tuple p = py::cast<py::tuple>(entry);
        const size_t align = py::cast<size_t>(p[1]);
        const size_t at = (step.bytes.size() + align - 1) / align * align;
        step.starts.push_back(static_cast<uint32_t>(at));
        if (py::isinstance<py::bytes>(p[0])) {
            const std::string value = py::cast<std::string>(p[0]);
            step.bytes.resize(at + value.size());
            std::memcpy(step.bytes.data() + at, value.data(), value.size());
            continue;
        }
        step.bytes.resize(at + py::cast<size_t>(p[0]));
        const bool map = py::isinstance<py::tuple>(p[2]);
        const Ref ref = py::cast<Ref>(map ? py::object(py::cast<py::tuple>(p[2])[0]) : py::object(p[2]));
        step.parameters.push_back({static_cast<uint32_t>(at), ref.slot, ref.offset, map ? static_cast<int>(step.maps.size()) : -1});
        if (!map) continue;
        py::tuple about = p[2];
        const auto sizes = py::cast<std::array<uint64_t, 2>>(about[3]), rows = py::cast<std::array<uint64_t, 2>>(about[4]);
        const auto box = py::cast<std::array<uint32_t, 2>>(about[5]);
        step.maps.push_back({py::cast<int>(about[1]), py::cast<int>(about[2]), {sizes[0], sizes[1]}, {rows[0], rows[1]}, {box[0], box[1]}});
    }
    TORCH_CHECK(step.bytes.size() <= MOST, name, " has ", step.bytes.size(), " bytes of parameters");
    plan.steps.push_back(std::move(step));
}

// pointers: (place in the struct, Ref)
void add_call(Plan& plan, const std::string& name, int64_t function, const std::string& bytes, uint32_t stream_at,
              const std::vector<std::pair<uint32_t, Ref>>& pointers) {
    Step step;
    step.name = name, step.host = reinterpret_cast<Function>(function), step.stream_at = stream_at;
    TORCH_CHECK(function && bytes.size() <= MOST, "no function that can be called: ", name);
    step.bytes.assign(bytes.begin(), bytes.end());
    for (const auto& [at, ref] : pointers) step.parameters.push_back({at, ref.slot, ref.offset, -1});
    plan.steps.push_back(std::move(step));
}

// The outputs, and after which step each slot that Python did not give can go.
void finish(Plan& plan, std::vector<c10::optional<Ref>> outputs, int64_t inputs) {
    plan.outputs = std::move(outputs);
    std::vector<size_t> last(plan.slots, 0);
    for (size_t i = 0; i < plan.steps.size(); ++i) {
        for (int64_t k = 0; k < std::max<int64_t>(1, plan.steps[i].results); ++k)
            if (plan.steps[i].out >= 0) last[plan.steps[i].out + k] = i;
        for (const auto& [_, ref] : plan.steps[i].tensors) last[ref.slot] = i;
        for (const Parameter& p : plan.steps[i].parameters) last[p.slot] = i;
    }
    for (const auto& ref : plan.outputs)
        if (ref) last[ref->slot] = plan.steps.size();
    for (int64_t slot = inputs; slot < plan.slots; ++slot)
        if (last[slot] < plan.steps.size()) plan.steps[last[slot]].last.push_back(slot);
}

PyMethodDef fast[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL, nullptr},
    {"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(norm)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    PyModule_AddFunctions(m.ptr(), fast);
    py::class_<Ref>(m, "Ref").def(py::init<int64_t, bool, std::vector<int64_t>, std::vector<int64_t>, int64_t>());
    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
        .def(py::init<int64_t>())
        .def("empty", add_empty)
        .def("operation", add_operation)
        .def("function", add_function)
        .def("launch", add_launch)
        .def("call", [](Plan& plan, const std::string& name, int64_t function, py::bytes bytes, uint32_t stream_at,
                        const std::vector<std::pair<uint32_t, Ref>>& pointers) {
            add_call(plan, name, function, bytes, stream_at, pointers);
        })
        .def("finish", finish)
        .def_property_readonly("steps", [](const Plan& plan) { return plan.steps.size(); });
    m.def("open", [](const std::string& library) { check(driver.open(library.c_str()), "opening the CUDA driver"); });
    m.def("start", [](py::object callback) { python = std::move(callback); });
    m.def("forget", [] {
        std::lock_guard<std::mutex> lock(mutex);
        classes.clear();
    });
    m.def("run", run_op);
    m.def("known", [] {  // classes seen, and those with a plan
        std::lock_guard<std::mutex> lock(mutex);
        size_t plans = 0;
        for (const auto& [_, c] : classes) plans += c.plan != nullptr;
        return std::make_pair(classes.size(), plans);
    });
}
