// Python passes addresses, sizes and strides; what can't be run
// raises here, before a kernel starts, and the GIL is released while it runs.

#include "bindings.h"

#include <chrono>

namespace ssl_fast {
namespace {

Rows rows(const py::object& pair) {
    if (pair.is_none()) return {nullptr, 0};
    const auto [address, stride] = pair.cast<std::pair<std::uintptr_t, std::int64_t>>();
    return {reinterpret_cast<const void*>(address), stride};
}

// Ids by address, queries' [count][n] and keys' [count][m]; none where the count is 0.
struct Ids {
    std::uintptr_t query, key;
    int count;
    bool matching;
};

Ids ids_of(const py::tuple& ids) {
    if (ids.size() != 4)
        throw std::invalid_argument("ids must be (query, key, count, matching), got " +
                                    std::to_string(ids.size()) + " entries");
    return {ids[0].cast<std::uintptr_t>(), ids[1].cast<std::uintptr_t>(), ids[2].cast<int>(),
            ids[3].cast<bool>()};
}

Exclusion exclusion(const std::vector<std::int64_t>& diagonals, const Ids& ids, std::int64_t n,
                    std::int64_t m) {
    if (diagonals.size() > static_cast<std::size_t>(MAX_DIAGONALS))
        throw std::invalid_argument("diagonals holds at most " + std::to_string(MAX_DIAGONALS) +
                                    " entries, got " + std::to_string(diagonals.size()));
    Exclusion rule{};
    rule.n_diagonals = static_cast<int>(diagonals.size());
    for (std::size_t i = 0; i < diagonals.size(); ++i) rule.diagonals[i] = diagonals[i];
    if (ids.count < 0 || ids.count > MAX_IDS)
        throw std::invalid_argument("a row has at most " + std::to_string(MAX_IDS) + " ids, got " +
                                    std::to_string(ids.count));
    rule.n_ids = ids.count;
    rule.matching = ids.matching;
    for (int id = 0; id < ids.count; ++id) {
        rule.query_ids[id] = reinterpret_cast<const std::int64_t*>(ids.query) + id * n;
        rule.key_ids[id] = reinterpret_cast<const std::int64_t*>(ids.key) + id * m;
    }
    return rule;
}

void check_sizes(std::int64_t n, std::int64_t m, std::int64_t d, int dtype, int threads) {
    if (n < 0 || m < 0 || d < 1)
        throw std::invalid_argument("sizes must be n >= 0, m >= 0 and d >= 1, got " +
                                    std::to_string(n) + ", " + std::to_string(m) + " and " +
                                    std::to_string(d));
    check_dtype(dtype);
    check_threads(threads);
}

Pass pass_of(const std::string& name) {
    if (name == "forward") return Pass::forward;
    if (name == "loss") return Pass::loss;
    if (name == "backward") return Pass::backward;
    throw std::invalid_argument("pass must be forward, loss or backward, got '" + name + "'");
}

void take_common(Arrays& arrays, PairSoftmax& call) {
    arrays.take("query_scale", call.query_scale);
    arrays.take("key_scale", call.key_scale);
    arrays.take("loss", call.loss);
    arrays.take("grad_query", call.grad_query);
    arrays.take("grad_key", call.grad_key);
    arrays.take("grad_query_scale", call.grad_query_scale);
    arrays.take("grad_key_scale", call.grad_key_scale);
}

Prepared<PairSoftmax> pair_softmax(const std::string& pass, int dtype, std::int64_t n,
                                   std::int64_t m, std::int64_t d, const py::object& query,
                                   const py::object& key, const py::object& positive,
                                   const std::vector<std::int64_t>& diagonals, const py::tuple& ids,
                                   bool normalize, int threads, const py::dict& addresses) {
    check_sizes(n, m, d, dtype, threads);
    PairSoftmax call{};
    call.pass = pass_of(pass);
    call.dtype = static_cast<Dtype>(dtype);
    call.n = n;
    call.m = m;
    call.d = d;
    call.query = rows(query);
    call.key = rows(key);
    call.positive = rows(positive);
    call.exclusion = exclusion(diagonals, ids_of(ids), n, m);
    call.normalize = normalize;
    call.threads = threads;
    if (call.pass == Pass::loss && call.positive.data == nullptr && m < n)
        throw std::invalid_argument("in-batch positives need m >= n, got " + std::to_string(m) +
                                    " and " + std::to_string(n));
    Arrays arrays(addresses);
    take_common(arrays, call);
    arrays.take("scale", call.scale);
    arrays.take("row_lse", call.row_lse);
    arrays.take("row_max", call.row_max);
    arrays.take("column_lse", call.column_lse);
    arrays.take("diagonal_logit", call.diagonal_logit);
    arrays.take("expectation", call.expectation);
    arrays.take("positive_logit", call.positive_logit);
    arrays.take("row_grad", call.row_grad);
    arrays.take("column_grad", call.column_grad);
    arrays.take("diagonal_grad", call.diagonal_grad);
    arrays.take("grad_positive", call.grad_positive);
    arrays.take("grad_scale", call.grad_scale);
    arrays.finish();
    return {call, active_isa().pair_softmax};
}

Prepared<PairSoftmaxSymmetric> pair_softmax_symmetric(const std::string& pass, int dtype,
                                                      std::int64_t n, std::int64_t d,
                                                      std::int64_t pairs,
                                                      const py::object& features,
                                                      const py::tuple& ids, bool normalize,
                                                      int threads, const py::dict& addresses) {
    check_sizes(n, n, d, dtype, threads);
    PairSoftmaxSymmetric call{};
    call.pass = pass_of(pass);
    if (pairs != 0 && 2 * pairs != n)
        throw std::invalid_argument("pairs must be 0 or half of the rows, got " +
                                    std::to_string(pairs) + " of " + std::to_string(n));
    if (call.pass == Pass::loss && 2 * pairs != n)
        throw std::invalid_argument("a loss needs pairs, got none");
    call.dtype = static_cast<Dtype>(dtype);
    call.n = n;
    call.d = d;
    call.pairs = pairs;
    call.features = rows(features);
    call.exclusion = exclusion({}, ids_of(ids), n, n);
    call.normalize = normalize;
    call.threads = threads;
    Arrays arrays(addresses);
    arrays.take("scale", call.scale);
    arrays.take("row_scale", call.row_scale);
    arrays.take("row_lse", call.row_lse);
    arrays.take("row_max", call.row_max);
    arrays.take("loss", call.loss);
    arrays.take("positive_logit", call.positive_logit);
    arrays.take("row_grad", call.row_grad);
    arrays.take("grad_features", call.grad_features);
    arrays.take("grad_scale", call.grad_scale);
    arrays.take("moment", call.moment);
    arrays.finish();
    return {call, active_isa().pair_softmax_symmetric};
}

Prepared<PairSigmoid> pair_sigmoid(int dtype, std::int64_t n, std::int64_t m, std::int64_t d,
                                   const py::object& query, const py::object& key,
                                   const std::vector<std::int64_t>& positive_diagonals, int threads,
                                   const py::dict& addresses) {
    check_sizes(n, m, d, dtype, threads);
    if (positive_diagonals.size() > 1)
        throw std::invalid_argument("positive_diagonals holds at most 1 entry, got " +
                                    std::to_string(positive_diagonals.size()));
    PairSigmoid call{};
    call.dtype = static_cast<Dtype>(dtype);
    call.n = n;
    call.m = m;
    call.d = d;
    call.query = rows(query);
    call.key = rows(key);
    call.exclusion = exclusion(positive_diagonals, Ids{}, n, m);
    call.threads = threads;
    Arrays arrays(addresses);
    take_common(arrays, call);
    arrays.take("bias", call.bias);
    arrays.take("row_weight", call.row_weight);
    arrays.take("grad_bias", call.grad_bias);
    arrays.finish();
    call.pass = call.grad_bias == nullptr ? Pass::forward : Pass::backward;
    return {call, active_isa().pair_sigmoid};
}

double fma_peak(const std::string& kind, int threads, double seconds) {
    const PeakKernels& kernels = *active_isa().peak;
    if (kind != "fp32" && kind != "bf16")
        throw std::invalid_argument("kind must be fp32 or bf16, got '" + kind + "'");
    check_threads(threads);
    // Without bfloat16 products the operands are widened, so the fp32 peak is the ceiling.
    const auto loop = kind == "bf16" && kernels.bf16 != nullptr ? kernels.bf16 : kernels.fp32;
    py::gil_scoped_release release;
    using Clock = std::chrono::steady_clock;
    struct Round {
        double (*loop)(long);
        long rounds;
        double operations;
    };
    double best = 0.0;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    do {
        Round round{loop, 1000000, 0.0};
        const auto start = Clock::now();
        run_team(
            threads,
            [](Team* team, void* context) {
                auto* round = static_cast<Round*>(context);
                const double operations = round->loop(round->rounds);
                if (team->rank == 0) round->operations = operations * team->size;
            },
            &round);
        const std::chrono::duration<double> took = Clock::now() - start;
        best = std::max(best, round.operations / took.count() * 1e-9);
    } while (Clock::now() < end);
    return best;
}

// One pass of the floor that passes over memory are held against; the caller has the clock.
void stream(std::uintptr_t a, std::uintptr_t b, std::uintptr_t to, std::int64_t n, int threads) {
    check_threads(threads);
    if (n < 0) throw std::invalid_argument("n must not be negative, got " + std::to_string(n));
    if (to % 64 != 0) throw std::invalid_argument("to must be aligned to 64 bytes");
    struct Pass {
        const float *a, *b;
        float* to;
        std::int64_t n;
        const PeakKernels* kernels;
    };
    Pass pass{reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
              reinterpret_cast<float*>(to), n, active_isa().peak};
    py::gil_scoped_release release;
    run_team(
        threads,
        [](Team* team, void* context) {
            const auto* pass = static_cast<Pass*>(context);
            pass->kernels->stream(pass->a, pass->b, pass->to, pass->n, team);
        },
        &pass);
}

std::vector<std::string> names(const std::vector<const Isa*>& isas) {
    std::vector<std::string> list;
    for (const Isa* isa : isas) list.emplace_back(isa->name);
    return list;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU and CUDA kernels of ssl_fast: addresses in, results written in place.";
    bind_prepared<PairSoftmax>(module, "PairSoftmax");
    bind_prepared<PairSoftmaxSymmetric>(module, "PairSoftmaxSymmetric");
    bind_prepared<PairSigmoid>(module, "PairSigmoid");
    bind_clustering(module);
    bind_linear(module);
    bind_mae(module);
    bind_reconstruction(module);
    module.def("pair_softmax", &pair_softmax);
    module.def("pair_softmax_symmetric", &pair_softmax_symmetric);
    module.def("pair_sigmoid", &pair_sigmoid);
    module.def("compiled_isas", [] { return names(compiled_isas()); });
    module.def("available_isas", [] { return names(available_isas()); });
    module.def("active_isa", [] { return std::string(active_isa().name); });
    module.def("set_isa", &set_isa, py::arg("name"));
    module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("size"));
    module.def("fma_peak", &fma_peak, py::arg("kind"), py::arg("threads"), py::arg("seconds"));
    module.def("stream", &stream, py::arg("a"), py::arg("b"), py::arg("to"), py::arg("n"),
               py::arg("threads"));
#if defined(SSL_FAST_HAVE_CUDA)
    module.attr("cuda") = true;
    // Why the CUDA kernels can't run on a device, or None; it becomes the current one.
    module.def("use_device", [](int device) -> py::object {
        const int error = cuda::use(device);
        if (error == 0) return py::none();
        return py::str(cuda::message_of(error));
    });
#else
    module.attr("cuda") = false;
#endif
#if defined(SSL_FAST_OPENMP)
    module.attr("threading") = "OpenMP";
#else
    module.attr("threading") = "std::thread";
#endif
}

}  // namespace ssl_fast
