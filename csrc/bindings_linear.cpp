// linear_reconstruction: from addresses, sizes and strides to its call.

#include "bindings.h"

namespace ssl_fast {
namespace {

Rows rows_of(const std::pair<std::uintptr_t, std::int64_t>& rows) {
    return {reinterpret_cast<const void*>(rows.first), rows.second};
}

Rows rows_or_none(const py::object& rows) {
    if (rows.is_none()) return {nullptr, 0};
    return rows_of(rows.cast<std::pair<std::uintptr_t, std::int64_t>>());
}

using Address = std::pair<std::uintptr_t, std::int64_t>;

Prepared<LinearReconstruction> linear_reconstruction(
    int kind, int dtype, int target_element, std::int64_t n, std::int64_t h, std::int64_t d,
    const Address& input, const Address& linear_weight, const Address& target,
    const py::object& element_weight, const py::object& element_kept, double parameter,
    double target_scale, double target_shift, int threads, const py::dict& addresses) {
    if (n < 0 || d < 0 || h < 1)
        throw std::invalid_argument("sizes must be n >= 0, h >= 1 and d >= 0, got " +
                                    std::to_string(n) + ", " + std::to_string(h) + " and " +
                                    std::to_string(d));
    if (kind < 0 || kind > static_cast<int>(Kind::bce_with_logits))
        throw std::invalid_argument("kind must be from 0 to 5, got " + std::to_string(kind));
    if (target_element < 0 || target_element > static_cast<int>(Element::uint8))
        throw std::invalid_argument("target_element must be from 0 to 3, got " +
                                    std::to_string(target_element));
    check_dtype(dtype);
    check_threads(threads);
    LinearReconstruction call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.n = n;
    call.h = h;
    call.d = d;
    call.input = rows_of(input);
    call.linear_weight = rows_of(linear_weight);
    call.kind = static_cast<Kind>(kind);
    call.parameter = static_cast<float>(parameter);
    call.target_element = static_cast<Element>(target_element);
    call.target = rows_of(target);
    call.target_scale = static_cast<float>(target_scale);
    call.target_shift = static_cast<float>(target_shift);
    call.element_weight = rows_or_none(element_weight);
    call.element_kept = rows_or_none(element_kept);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("bias", call.bias);
    arrays.take("pos_weight", call.pos_weight);
    arrays.take("row_weight", call.row_weight);
    arrays.take("row_kept", call.row_kept);
    arrays.take("loss", call.loss);
    arrays.take("losses", call.losses);
    arrays.take("grad_input", call.grad_input);
    arrays.take("grad_weight", call.grad_weight);
    arrays.take("grad_bias", call.grad_bias);
    arrays.take("outside", call.outside);
    arrays.finish();
    require(call.loss, "loss");
    require(call.outside, "outside");
    return {call, active_isa().linear_reconstruction};
}

}  // namespace

void bind_linear(py::module_& module) {
    bind_prepared<LinearReconstruction>(module, "LinearReconstruction");
    module.def("linear_reconstruction", &linear_reconstruction);
}

}  // namespace ssl_fast
