// centroid_update: rows brought in the order of their clusters by counting, and summed in parts of
// that order. No row is compared with another, nothing depends on which thread comes first, and a
// cluster that has most of the rows costs no more than many small ones.

#include "core/clustering.h"
#include "core/cuda.h"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"

namespace ssl_fast {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
// Rows in flight per thread.
constexpr int UNROLL = 4;

// What the kernels share. A segment is a cluster of a problem: s = problem * K + label.
struct Plan {
    std::int64_t b, n, k, d, segments;
    // Rows of a problem that one warp puts in order. As many as clusters at least, so that the
    // counts are no more than the rows.
    std::int64_t chunk, chunks;
    // Sorted rows of one worker: 8192 workers fill a card once, and shorter parts than 32 rows
    // would be as many bytes as their rows.
    std::int64_t part, parts;

    int* counts;             // [segments, chunks]; then where a chunk's rows go in their segment
    std::int64_t* bounds;    // [segments + 1]
    int* order;              // [B N]: rows of their problem, sorted by segment
    double* partial_sums;    // [parts, 2, D]: of the segment that began before a part, and of the
                             // one that goes on after it
    double* partial_counts;  // [parts, 2]
};

// Sizes, and the places of the arrays in a workspace that may be null.
Plan plan_of(const CentroidUpdate& call, std::size_t& bytes) {
    Plan plan{};
    plan.b = call.b;
    plan.n = call.n;
    plan.k = call.k;
    plan.d = call.d;
    plan.segments = call.b * call.k;
    plan.chunk = call.k > 1024 ? call.k : 1024;
    plan.chunks = divided_up(call.n, plan.chunk);
    const std::int64_t share = divided_up(call.b * call.n, 8192);
    plan.part = share < 32 ? 32 : share;
    plan.parts = divided_up(call.b * call.n, plan.part);

    auto* place = static_cast<char*>(call.workspace);
    bytes = 0;
    const auto take = [&](std::int64_t count, std::size_t size) {
        void* here = place + bytes;
        bytes += (static_cast<std::size_t>(count) * size + ACCESS_BYTES - 1) / ACCESS_BYTES *
                 ACCESS_BYTES;
        return here;
    };
    plan.counts = static_cast<int*>(take(plan.segments * plan.chunks, sizeof(int)));
    plan.bounds = static_cast<std::int64_t*>(take(plan.segments + 1, sizeof(std::int64_t)));
    plan.order = static_cast<int*>(take(plan.b * plan.n, sizeof(int)));
    plan.partial_sums = static_cast<double*>(take(plan.parts * 2 * plan.d, sizeof(double)));
    plan.partial_counts = static_cast<double*>(take(plan.parts * 2, sizeof(double)));
    return plan;
}

// The label of a row that takes part, or -1.
__device__ inline int label_of(const CentroidUpdate& call, std::int64_t row) {
    const std::int64_t label = call.labels[row];
    if (label < 0 || label >= call.k) return -1;
    return call.weight != nullptr && call.weight[row] == 0.0f ? -1 : static_cast<int>(label);
}

// One block for each chunk of each problem. Sums of integers don't depend on their order.
__global__ void __launch_bounds__(THREADS) count_kernel(CentroidUpdate call, Plan plan) {
    const std::int64_t problem = blockIdx.x / plan.chunks, chunk = blockIdx.x % plan.chunks;
    const std::int64_t begin = chunk * plan.chunk;
    const std::int64_t end = begin + plan.chunk < plan.n ? begin + plan.chunk : plan.n;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        const int label = label_of(call, problem * plan.n + i);
        if (label >= 0)
            atomicAdd(&plan.counts[(problem * plan.k + label) * plan.chunks + chunk], 1);
    }
}

// The inclusive prefix sum over a warp.
template <class T>
__device__ T warp_prefix(T value) {
    const int lane = threadIdx.x % WARP;
    for (int step = 1; step < WARP; step *= 2) {
        const T below = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// One warp for each segment: its counts become where each chunk's rows begin in it, and its size
// goes to bounds.
__global__ void __launch_bounds__(THREADS) chunk_starts_kernel(Plan plan) {
    const int lane = threadIdx.x % WARP;
    const std::int64_t segment = static_cast<std::int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (segment >= plan.segments) return;
    int* counts = plan.counts + segment * plan.chunks;
    int before = 0;
    for (std::int64_t first = 0; first < plan.chunks; first += WARP) {
        const std::int64_t chunk = first + lane;
        const int count = chunk < plan.chunks ? counts[chunk] : 0;
        const int up_to = warp_prefix(count);
        if (chunk < plan.chunks) counts[chunk] = before + up_to - count;
        before += __shfl_sync(ALL_LANES, up_to, WARP - 1);
    }
    if (lane == 0) plan.bounds[segment + 1] = before;
}

constexpr int SCAN_THREADS = 1024;

// One block: sizes become bounds.
__global__ void __launch_bounds__(SCAN_THREADS) bounds_kernel(Plan plan) {
    __shared__ std::int64_t of_warps[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    std::int64_t before = 0;
    for (std::int64_t first = 0; first < plan.segments; first += SCAN_THREADS) {
        const std::int64_t segment = first + threadIdx.x;
        const std::int64_t size = segment < plan.segments ? plan.bounds[segment + 1] : 0;
        const std::int64_t in_warp = warp_prefix(size);
        if (lane == WARP - 1) of_warps[warp] = in_warp;
        __syncthreads();
        if (warp == 0) of_warps[lane] = warp_prefix(of_warps[lane]);
        __syncthreads();
        const std::int64_t up_to = before + in_warp + (warp == 0 ? 0 : of_warps[warp - 1]);
        if (segment < plan.segments) plan.bounds[segment + 1] = up_to;
        before += of_warps[WARP - 1];
        // The next round writes what this one still reads.
        __syncthreads();
    }
    if (threadIdx.x == 0) plan.bounds[0] = 0;
}

// One warp for each chunk of each problem, 32 rows at a time in their order.
__global__ void __launch_bounds__(THREADS) place_kernel(CentroidUpdate call, Plan plan) {
    const int lane = threadIdx.x % WARP;
    const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (unit >= plan.b * plan.chunks) return;
    const std::int64_t problem = unit / plan.chunks, chunk = unit % plan.chunks;
    const std::int64_t begin = chunk * plan.chunk;
    const std::int64_t end = begin + plan.chunk < plan.n ? begin + plan.chunk : plan.n;
    for (std::int64_t first = begin; first < end; first += WARP) {
        const std::int64_t i = first + lane;
        const int label = i < end ? label_of(call, problem * plan.n + i) : -1;
        const unsigned alike = __match_any_sync(ALL_LANES, label);
        const int rank = __popc(alike & ((1u << lane) - 1u));
        const std::int64_t segment = problem * plan.k + label;
        int* next = plan.counts + segment * plan.chunks + chunk;
        std::int64_t place = 0;
        if (label >= 0) place = plan.bounds[segment] + *next + rank;
        // All have read where their cluster goes on before the first of them moves it.
        __syncwarp();
        if (label >= 0) {
            plan.order[place] = static_cast<int>(i);
            if (rank == 0) *next += __popc(alike);
        }
        __syncwarp();
    }
}

// The first segment that ends after this place of the order.
__device__ inline std::int64_t segment_at(const Plan& plan, std::int64_t place) {
    std::int64_t low = 0, high = plan.segments - 1;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (plan.bounds[middle + 1] > place)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

template <int W>
struct Sum {
    double of_rows[W], of_weights;
};

template <class T, int W>
__device__ void add_row(const CentroidUpdate& call, std::int64_t row, const Pack<T, W>& values,
                        Sum<W>& sum) {
    double factor = call.weight == nullptr ? 1.0 : call.weight[row];
    sum.of_weights += factor;
    if (call.x_scale != nullptr) factor *= call.x_scale[row];
    for (int i = 0; i < W; ++i) sum.of_rows[i] += widen(values.values[i]) * factor;
}

// The rows of one problem at places begin to end of the order, in that order.
template <class T, int W>
__device__ Sum<W> sum_of(const CentroidUpdate& call, const Plan& plan, std::int64_t problem,
                         std::int64_t column, std::int64_t begin, std::int64_t end) {
    const T* x = static_cast<const T*>(call.x.data) + problem * call.x.batch_stride + column;
    const std::int64_t first_row = problem * plan.n;
    Sum<W> sum{};
    std::int64_t place = begin;
    for (; place + UNROLL <= end; place += UNROLL) {
        Pack<T, W> values[UNROLL];
        int rows[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) rows[u] = plan.order[place + u];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) values[u] = load<T, W>(x + rows[u] * call.x.row_stride);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) add_row<T, W>(call, first_row + rows[u], values[u], sum);
    }
    for (; place < end; ++place) {
        const std::int64_t row = plan.order[place];
        const Pack<T, W> values = load<T, W>(x + row * call.x.row_stride);
        add_row<T, W>(call, first_row + row, values, sum);
    }
    return sum;
}

// `lanes` threads are a worker: one part of the order in lanes * W columns. A segment that lies
// in the part altogether is written; what it shares with others goes to the partial sums.
template <class T, int W>
__global__ void __launch_bounds__(THREADS, 2)
    sum_kernel(CentroidUpdate call, Plan plan, int lanes, std::int64_t column_blocks) {
    const std::int64_t worker =
        (static_cast<std::int64_t>(blockIdx.x) * THREADS + threadIdx.x) / lanes;
    const std::int64_t part = worker / column_blocks, column_block = worker % column_blocks;
    const std::int64_t column = (column_block * lanes + threadIdx.x % lanes) * W;
    const std::int64_t begin = part * plan.part, taken = plan.bounds[plan.segments];
    const std::int64_t end = begin + plan.part < taken ? begin + plan.part : taken;
    if (part >= plan.parts || begin >= end || column >= plan.d) return;
    std::int64_t place = begin, segment = segment_at(plan, begin);
    while (place < end) {
        const std::int64_t first = plan.bounds[segment], last = plan.bounds[segment + 1];
        const std::int64_t stop = last < end ? last : end;
        const Sum<W> sum = sum_of<T, W>(call, plan, segment / plan.k, column, place, stop);
        const bool whole = first >= begin && last <= end;
        const std::int64_t slot = part * 2 + (first >= begin ? 1 : 0);
        double* sums = whole ? call.sums + segment * plan.d : plan.partial_sums + slot * plan.d;
        for (int i = 0; i < W; ++i) sums[column + i] = sum.of_rows[i];
        if (column == 0) {
            if (whole)
                call.counts[segment] = sum.of_weights;
            else
                plan.partial_counts[slot] = sum.of_weights;
        }
        place = stop;
        while (place < end && plan.bounds[segment + 1] <= place) ++segment;
    }
}

// One thread for each column of each segment, and one more for its count: zero for no rows, nothing
// for a segment that lies in one part, else the partial sums in the order of the parts.
__global__ void __launch_bounds__(THREADS) join_kernel(CentroidUpdate call, Plan plan) {
    const std::int64_t columns = plan.d + 1;
    const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const std::int64_t segment = item / columns, column = item % columns;
    if (segment >= plan.segments) return;
    const std::int64_t begin = plan.bounds[segment], end = plan.bounds[segment + 1];
    const std::int64_t first = begin / plan.part, last = (end - 1) / plan.part;
    if (begin < end && first == last) return;
    const bool counts = column == plan.d;
    const double* partials = counts ? plan.partial_counts : plan.partial_sums + column;
    const std::int64_t stride = counts ? 1 : plan.d;
    double total = 0.0;
    if (begin < end) {
        total = partials[(first * 2 + 1) * stride];
        for (std::int64_t part = first + 1; part <= last; ++part)
            total += partials[part * 2 * stride];
    }
    (counts ? call.counts[segment] : call.sums[segment * plan.d + column]) = total;
}

template <class T, int W>
cudaError_t sum_parts(const CentroidUpdate& call, const Plan& plan, cudaStream_t stream) {
    int lanes = 1;
    while (lanes < WARP && lanes * W < plan.d) lanes *= 2;
    const std::int64_t column_blocks = divided_up(plan.d, static_cast<std::int64_t>(lanes) * W);
    const std::int64_t threads = plan.parts * column_blocks * lanes;
    return launch(&sum_kernel<T, W>, divided_up(threads, THREADS), THREADS, stream, call, plan,
                  lanes, column_blocks);
}

template <class T>
cudaError_t sum_rows(const CentroidUpdate& call, const Plan& plan, cudaStream_t stream) {
    constexpr int W = WIDTH<T>;
    const bool packed = aligned(call.x.data) && call.d % W == 0 && call.x.row_stride % W == 0 &&
                        call.x.batch_stride % W == 0;
    return packed ? sum_parts<T, W>(call, plan, stream) : sum_parts<T, 1>(call, plan, stream);
}

}  // namespace

std::size_t workspace_bytes(const CentroidUpdate& call) {
    std::size_t bytes = 0;
    plan_of(call, bytes);
    return bytes;
}

int run(const CentroidUpdate& call, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    std::size_t bytes = 0;
    const Plan plan = plan_of(call, bytes);
    const std::int64_t units = plan.b * plan.chunks;
    cudaError_t error = cudaSuccess;
    const auto then = [&](auto step) {
        if (error == cudaSuccess) error = step();
    };
    const std::size_t counted = static_cast<std::size_t>(plan.segments * plan.chunks) * sizeof(int);
    then([&] { return cudaMemsetAsync(plan.counts, 0, counted, on); });
    then([&] { return launch(&count_kernel, units, THREADS, on, call, plan); });
    then([&] {
        const std::int64_t blocks = divided_up(plan.segments, WARPS);
        return launch(&chunk_starts_kernel, blocks, THREADS, on, plan);
    });
    then([&] { return launch(&bounds_kernel, 1, SCAN_THREADS, on, plan); });
    then([&] { return launch(&place_kernel, divided_up(units, WARPS), THREADS, on, call, plan); });
    then([&] {
        return with_element(
            call.dtype, [&](auto zero) { return sum_rows<decltype(zero)>(call, plan, on); },
            cudaErrorInvalidValue);
    });
    then([&] {
        const std::int64_t blocks = divided_up(plan.segments * (plan.d + 1), THREADS);
        return launch(&join_kernel, blocks, THREADS, on, call, plan);
    });
    return error;
}

}  // namespace cuda
}  // namespace ssl_fast
