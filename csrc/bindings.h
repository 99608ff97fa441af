#pragma once
// What the bindings of all ops share: addresses from Python, and calls that run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "core/cuda.h"
#include "core/isa.h"
#include "core/memory.h"
#include "core/team.h"

namespace ssl_fast {
namespace py = pybind11;

template <class T = void>
T* pointer(const py::object& address) {
    return address.is_none() ? nullptr : reinterpret_cast<T*>(address.cast<std::uintptr_t>());
}

inline void check_dtype(int dtype, const char* name = "dtype") {
    if (dtype < 0 || dtype > 2)
        throw std::invalid_argument(std::string(name) +
                                    " must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                    std::to_string(dtype));
}
inline void check_threads(int threads) {
    if (threads < 1)
        throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}
// A pointer that the call needs whatever else it is asked for.
inline void require(const void* field, const char* name) {
    if (field == nullptr) throw std::invalid_argument(std::string(name) + " is missing");
}

template <class Call>
struct Job {
    const Call* call;
    const Kernels<Call>* kernels;
};

template <class Call>
void run(const Call& call, const Kernels<Call>& kernels) {
    py::gil_scoped_release release;
    Job<Call> job{&call, &kernels};
    run_team(
        call.threads,
        [](Team* team, void* context) {
            const auto* job = static_cast<Job<Call>*>(context);
            job->kernels->run(*job->call, team);
        },
        &job);
}

// Built once, asked for its workspace, then run: the ISA is fixed in between.
template <class Call>
class Prepared {
  public:
    Prepared(const Call& call, const Kernels<Call>* kernels) : call_(call), kernels_(kernels) {}
    std::size_t workspace_bytes() const { return kernels_->workspace_bytes(call_) + 64; }
    void run(std::uintptr_t workspace) {
        call_.workspace = reinterpret_cast<void*>((workspace + 63) / 64 * 64);
        advise_huge_pages(workspace, workspace_bytes());
        ssl_fast::run(call_, *kernels_);
    }

    // The same on a GPU, for the ops of core/cuda.h; the caller has made the device the current
    // one.
    std::size_t device_workspace_bytes() const { return cuda::workspace_bytes(call_); }
    void run_on_device(std::uintptr_t workspace, std::uintptr_t stream) {
        call_.workspace = reinterpret_cast<void*>(workspace);
        py::gil_scoped_release release;
        const int error = cuda::run(call_, reinterpret_cast<void*>(stream));
        if (error != 0) throw std::runtime_error(cuda::message_of(error));
    }

  private:
    Call call_;
    const Kernels<Call>* kernels_;
};

// Fills a call's pointers from addresses by name; what is missing stays null.
class Arrays {
  public:
    explicit Arrays(const py::dict& addresses) : addresses_(addresses) {}
    template <class T>
    void take(const char* name, T*& field) {
        if (!addresses_.contains(name)) return;
        field = pointer<T>(addresses_[name]);
        ++taken_;
    }
    // An address that nothing asked for is a caller's mistake.
    void finish() const {
        if (taken_ != addresses_.size())
            throw std::invalid_argument("arrays holds " + std::to_string(addresses_.size()) +
                                        " names, of which this call knows " +
                                        std::to_string(taken_));
    }

  private:
    const py::dict& addresses_;
    std::size_t taken_ = 0;
};

template <class Call>
py::class_<Prepared<Call>> bind_prepared(py::module_& module, const char* name) {
    return py::class_<Prepared<Call>>(module, name, py::module_local())
        .def("workspace_bytes", &Prepared<Call>::workspace_bytes)
        .def("run", &Prepared<Call>::run, py::arg("workspace"));
}
// An op that has a CUDA kernel, where those were built.
template <class Call>
void bind_prepared_with_cuda(py::module_& module, const char* name) {
    auto prepared = bind_prepared<Call>(module, name);
#if defined(SSL_FAST_HAVE_CUDA)
    prepared.def("device_workspace_bytes", &Prepared<Call>::device_workspace_bytes)
        .def("run_on_device", &Prepared<Call>::run_on_device, py::arg("workspace"),
             py::arg("stream"));
#endif
}

// The ops of bindings_clustering.cpp.
void bind_clustering(py::module_& module);
// The op of bindings_linear.cpp.
void bind_linear(py::module_& module);
// The ops of bindings_mae.cpp.
void bind_mae(py::module_& module);
// The op of bindings_reconstruction.cpp.
void bind_reconstruction(py::module_& module);

}  // namespace ssl_fast
