// mae, kl_divergence and l2_sp: from addresses, sizes and strides to their calls.

#include <tuple>

#include "bindings.h"

namespace ssl_fast {
namespace {

// (address, batch stride, row stride) of patches; (address, four strides, channels, patch rows,
// patch columns, columns of patches) of images.
void take_target(const py::tuple& target, Mae& call) {
    if (target.size() == 3) {
        call.target = {pointer(target[0]), target[1].cast<std::int64_t>(),
                       target[2].cast<std::int64_t>()};
        return;
    }
    if (target.size() != 9)
        throw std::invalid_argument("target must have 3 or 9 entries, got " +
                                    std::to_string(target.size()));
    const auto number = [&](int place) { return target[place].cast<std::int64_t>(); };
    call.target.data = pointer(target[0]);
    Images& images = call.images;
    for (int i = 0; i < 4; ++i) images.strides[i] = number(1 + i);
    images.channels = number(5);
    images.patch_rows = number(6);
    images.patch_columns = number(7);
    images.columns = number(8);
    if (images.channels < 1 || images.patch_rows < 1 || images.patch_columns < 1 ||
        images.columns < 1 || images.channels * images.patch_rows * images.patch_columns != call.p)
        throw std::invalid_argument(
            "the patches of the images don't have p = " + std::to_string(call.p) + " elements");
}

Prepared<Mae> mae(int dtype, int target_dtype, std::int64_t b, std::int64_t l, std::int64_t p,
                  const std::tuple<std::uintptr_t, std::int64_t, std::int64_t>& pred,
                  const py::tuple& target, bool normalize, int threads, const py::dict& addresses) {
    if (b < 0 || l < 0 || p < 1)
        throw std::invalid_argument("sizes must be b >= 0, l >= 0 and p >= 1, got " +
                                    std::to_string(b) + ", " + std::to_string(l) + " and " +
                                    std::to_string(p));
    Mae call{};
    check_dtype(dtype);
    check_dtype(target_dtype, "target_dtype");
    check_threads(threads);
    call.dtype = static_cast<Dtype>(dtype);
    call.target_dtype = static_cast<Dtype>(target_dtype);
    call.b = b;
    call.l = l;
    call.p = p;
    call.pred = {reinterpret_cast<const void*>(std::get<0>(pred)), std::get<1>(pred),
                 std::get<2>(pred)};
    take_target(target, call);
    call.normalize = normalize;
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("mask", call.mask);
    arrays.take("loss", call.loss);
    arrays.take("scale", call.scale);
    arrays.take("weight", call.weight);
    arrays.take("grad_pred", call.grad_pred);
    arrays.finish();
    if (b * l > 0) require(call.mask, "mask");
    require(call.scale, "scale");
    if (call.weight == nullptr)
        require(call.loss, "loss");
    else if (b * l > 0)
        require(call.grad_pred, "grad_pred");
    return {call, active_isa().mae};
}

Prepared<KlDivergence> kl_divergence(int dtype, std::int64_t n, int threads,
                                     const py::dict& addresses) {
    if (n < 0) throw std::invalid_argument("n must be at least 0, got " + std::to_string(n));
    KlDivergence call{};
    check_dtype(dtype);
    check_threads(threads);
    call.dtype = static_cast<Dtype>(dtype);
    call.n = n;
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("mu", call.mu);
    arrays.take("logvar", call.logvar);
    arrays.take("value", call.value);
    arrays.take("grad_logvar", call.grad_logvar);
    arrays.finish();
    if (n > 0) {
        require(call.mu, "mu");
        require(call.logvar, "logvar");
    }
    require(call.value, "value");
    return {call, active_isa().kl_divergence};
}

Prepared<L2Sp> l2_sp(int dtype, std::int64_t count, double weight, bool add, int threads,
                     const py::dict& addresses) {
    if (count < 0)
        throw std::invalid_argument("count must be at least 0, got " + std::to_string(count));
    L2Sp call{};
    check_dtype(dtype);
    check_threads(threads);
    call.dtype = static_cast<Dtype>(dtype);
    call.count = count;
    call.weight = weight;
    call.add = add;
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("sizes", call.sizes);
    arrays.take("parameters", call.parameters);
    arrays.take("anchors", call.anchors);
    arrays.take("grads", call.grads);
    arrays.take("grad_value", call.grad_value);
    arrays.take("value", call.value);
    arrays.finish();
    if (count > 0) {
        require(call.sizes, "sizes");
        require(call.parameters, "parameters");
        require(call.anchors, "anchors");
    }
    return {call, active_isa().l2_sp};
}

}  // namespace

void bind_mae(py::module_& module) {
    bind_prepared<Mae>(module, "Mae");
    bind_prepared<KlDivergence>(module, "KlDivergence");
    bind_prepared_with_cuda<L2Sp>(module, "L2Sp");
    module.def("mae", &mae);
    module.def("kl_divergence", &kl_divergence);
    module.def("l2_sp", &l2_sp);
}

}  // namespace ssl_fast
