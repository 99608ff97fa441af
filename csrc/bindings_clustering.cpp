// nearest, lloyd, centroid_update, top_k and plus_plus: from addresses, sizes and strides to their
// calls.

#include <tuple>

#include "bindings.h"

namespace ssl_fast {
namespace {

Batch batch(const py::object& triple) {
    const auto [address, batch_stride, row_stride] =
        triple.cast<std::tuple<std::uintptr_t, std::int64_t, std::int64_t>>();
    return {reinterpret_cast<const void*>(address), batch_stride, row_stride};
}

void check(std::int64_t b, std::int64_t n, std::int64_t k, std::int64_t d, int dtype, int threads) {
    if (b < 0 || n < 0 || k < 1 || d < 1)
        throw std::invalid_argument(
            "sizes must be b >= 0, n >= 0, at least 1 centroid or key, and d >= 1; got " +
            std::to_string(b) + ", " + std::to_string(n) + ", " + std::to_string(k) + " and " +
            std::to_string(d));
    // An index rides on a lane of 32 bits.
    if (k > INT32_MAX)
        throw std::invalid_argument("at most 2^31 - 1 centroids or keys, got " + std::to_string(k));
    check_dtype(dtype);
    check_threads(threads);
}

Prepared<Nearest> nearest(int dtype, std::int64_t b, std::int64_t n, std::int64_t k, std::int64_t d,
                          std::int64_t columns, const py::object& x, const py::object& centroids,
                          int threads, const py::dict& addresses) {
    check(b, n, k, d, dtype, threads);
    Nearest call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.b = b;
    call.n = n;
    call.k = k;
    call.d = d;
    call.columns = columns;
    call.x = batch(x);
    call.centroids = batch(centroids);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("x_scale", call.x_scale);
    arrays.take("centroid_scale", call.centroid_scale);
    arrays.take("weight", call.weight);
    arrays.take("lengths", call.lengths);
    arrays.take("previous", call.previous);
    arrays.take("labels", call.labels);
    arrays.take("distances", call.distances);
    arrays.take("sums", call.sums);
    arrays.take("counts", call.counts);
    arrays.finish();
    if (b * n > 0) require(call.labels, "labels");
    if ((call.sums == nullptr) != (call.counts == nullptr))
        throw std::invalid_argument("sums and counts are given together or not at all");
    if (call.previous != nullptr && (columns < 1 || columns > k))
        throw std::invalid_argument("columns must be between 1 and k = " + std::to_string(k) +
                                    " with previous; got " + std::to_string(columns));
    return {call, active_isa().nearest};
}

Prepared<CentroidUpdate> centroid_update(int dtype, std::int64_t b, std::int64_t n, std::int64_t k,
                                         std::int64_t d, const py::object& x, int threads,
                                         const py::dict& addresses) {
    check(b, n, k, d, dtype, threads);
    CentroidUpdate call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.b = b;
    call.n = n;
    call.k = k;
    call.d = d;
    call.x = batch(x);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("labels", call.labels);
    arrays.take("x_scale", call.x_scale);
    arrays.take("weight", call.weight);
    arrays.take("sums", call.sums);
    arrays.take("counts", call.counts);
    arrays.take("largest", call.largest);
    arrays.finish();
    if (b * n > 0) require(call.labels, "labels");
    if (b > 0) {
        require(call.sums, "sums");
        require(call.counts, "counts");
    }
    return {call, active_isa().centroid_update};
}

Prepared<TopK> top_k(int dtype, std::int64_t b, std::int64_t n, std::int64_t m, std::int64_t d,
                     std::int64_t k, const py::object& x, const py::object& y, int threads,
                     const py::dict& addresses) {
    check(b, n, m, d, dtype, threads);
    if (k < 1 || k > m)
        throw std::invalid_argument("k must be between 1 and the number of keys, " +
                                    std::to_string(m) + ", got " + std::to_string(k));
    TopK call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.b = b;
    call.n = n;
    call.m = m;
    call.d = d;
    call.k = k;
    call.x = batch(x);
    call.y = batch(y);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("x_scale", call.x_scale);
    arrays.take("y_scale", call.y_scale);
    arrays.take("distances", call.distances);
    arrays.take("indices", call.indices);
    arrays.finish();
    if (b * n > 0) {
        require(call.distances, "distances");
        require(call.indices, "indices");
    }
    return {call, active_isa().top_k};
}

Prepared<PlusPlus> plus_plus(int dtype, std::int64_t b, std::int64_t n, std::int64_t t,
                             std::int64_t d, std::int64_t each, std::int64_t room,
                             const py::object& x, const py::object& candidates, int threads,
                             const py::dict& addresses) {
    check(b, n, t, d, dtype, threads);
    if (n > INT32_MAX)
        throw std::invalid_argument("at most 2^31 - 1 rows, got " + std::to_string(n));
    if (each < 1 || each > t || room < 0)
        throw std::invalid_argument("each must be between 1 and t = " + std::to_string(t) +
                                    ", and room >= 0; got " + std::to_string(each) + " and " +
                                    std::to_string(room));
    PlusPlus call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.b = b;
    call.n = n;
    call.t = t;
    call.d = d;
    call.each = each;
    call.room = room;
    call.x = batch(x);
    call.candidates = batch(candidates);
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("x_scale", call.x_scale);
    arrays.take("candidate_scale", call.candidate_scale);
    arrays.take("weight", call.weight);
    arrays.take("lengths", call.lengths);
    arrays.take("drawn", call.drawn);
    arrays.take("limits", call.limits);
    arrays.take("wanted", call.wanted);
    arrays.take("closest", call.closest);
    arrays.take("chosen", call.chosen);
    arrays.finish();
    if (b > 0) {
        require(call.drawn, "drawn");
        require(call.limits, "limits");
        require(call.wanted, "wanted");
        require(call.chosen, "chosen");
    }
    if (b * n > 0) require(call.closest, "closest");
    return {call, active_isa().plus_plus};
}

}  // namespace

void bind_clustering(py::module_& module) {
    bind_prepared<Nearest>(module, "Nearest");
    bind_prepared_with_cuda<CentroidUpdate>(module, "CentroidUpdate");
    bind_prepared<TopK>(module, "TopK");
    bind_prepared<PlusPlus>(module, "PlusPlus");
    module.def("nearest", &nearest);
    module.def("centroid_update", &centroid_update);
    module.def("top_k", &top_k);
    module.def("plus_plus", &plus_plus);
}

}  // namespace ssl_fast
