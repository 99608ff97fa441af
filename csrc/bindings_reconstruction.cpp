// reconstruction: from addresses and sizes to its call.

#include "bindings.h"

namespace ssl_fast {
namespace {

Prepared<Reconstruction> reconstruction(int kind, int dtype, int target_dtype, std::int64_t n,
                                        const std::tuple<float, float>& target_line,
                                        float parameter, std::int64_t mask_span,
                                        std::int64_t period,
                                        const std::tuple<double, float>& factors, int threads,
                                        const py::dict& addresses) {
    constexpr int KINDS = static_cast<int>(Kind::bce_with_logits) + 1, BYTES = 3;
    if (kind < 0 || kind >= KINDS)
        throw std::invalid_argument("kind must be 0 to 5, got " + std::to_string(kind));
    if (n < 0) throw std::invalid_argument("n must be at least 0, got " + std::to_string(n));
    check_dtype(dtype);
    if (target_dtype != BYTES) check_dtype(target_dtype, "target_dtype");
    check_threads(threads);
    Reconstruction call{};
    call.kind = static_cast<Kind>(kind);
    call.dtype = static_cast<Dtype>(dtype);
    call.bytes = target_dtype == BYTES;
    call.target_dtype = call.bytes ? Dtype::float32 : static_cast<Dtype>(target_dtype);
    call.n = n;
    call.target_scale = std::get<0>(target_line);
    call.target_shift = std::get<1>(target_line);
    call.parameter = parameter;
    call.mask_span = mask_span;
    call.period = period;
    call.factor = std::get<0>(factors);
    call.grad_factor = std::get<1>(factors);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("input", call.input);
    arrays.take("target", call.target);
    arrays.take("weight", call.weight);
    arrays.take("mask", call.mask);
    arrays.take("pos_weight", call.pos_weight);
    arrays.take("value", call.value);
    arrays.take("losses", call.losses);
    arrays.take("grad", call.grad);
    arrays.take("outside", call.outside);
    arrays.finish();
    if (n > 0) {
        require(call.input, "input");
        require(call.target, "target");
    }
    if (call.mask != nullptr && (mask_span < 1 || n % mask_span != 0))
        throw std::invalid_argument("mask_span must divide n = " + std::to_string(n) + ", got " +
                                    std::to_string(mask_span));
    if (call.pos_weight != nullptr && (period < 1 || n % period != 0))
        throw std::invalid_argument("period must divide n = " + std::to_string(n) + ", got " +
                                    std::to_string(period));
    return {call, active_isa().reconstruction};
}

}  // namespace

void bind_reconstruction(py::module_& module) {
    bind_prepared_with_cuda<Reconstruction>(module, "Reconstruction");
    module.def("reconstruction", &reconstruction);
}

}  // namespace ssl_fast
