#pragma once
// Sums of the rows of each cluster, in the order of the rows: the bits depend on nothing else.

#include "cpu/centroids.h"

namespace ssl_fast {
namespace {

struct Clusters {
    int64_t k, d;
    const int64_t* labels;  // [N]
    const float* x_scale;   // [N] or null
    const float* weight;    // [N] or null
    double* sums;           // [K, D]
    double* counts;         // [K]
};

// Rows between two changes from assigning to summing: enough that the threads rarely wait for each
// other, and few enough that they are still in cache. Where there are many clusters it takes more
// rows until each of them has some, and its sums are not read and written for a single row.
inline int64_t rows_in_cache(int64_t k, int64_t d, Dtype dtype) {
    const int64_t row = d * element_size(dtype);
    return larger(LANES,
                  smaller(larger((int64_t{2} << 20) / row, 4 * k), (int64_t{8} << 20) / row));
}

// A member of a team owns at least so many columns, two cache lines of float64 sums; they are
// added in registers.
constexpr int64_t COLUMNS = 32;
// Where there are so many: what 16 AVX-512 registers hold the sums of, and 8 of AVX2, whose 16
// would leave none for anything else.
constexpr int64_t WIDE_COLUMNS = WIDTH == 16 ? 128 : COLUMNS;

struct Range {
    int64_t begin, end;
};

// The rows of a block by their label, each label's in their order.
struct RowOrder {
    int32_t* row;    // [block]
    int32_t* begin;  // [K + 2]
};
inline RowOrder take_order(Arena& arena, int64_t block, int64_t n, int64_t k) {
    return {arena.take<int32_t>(smaller(block, n)), arena.take<int32_t>(k + 2)};
}

// What is summed of rows [begin, begin + count): row numbers count from `begin`. Returns the
// largest label.
inline int64_t sort_rows(const Clusters& c, int64_t begin, int64_t count, const RowOrder& order) {
    const int64_t* labels = c.labels + begin;
    const float* weight = c.weight == nullptr ? nullptr : c.weight + begin;
    int64_t largest = -1;
    __builtin_memset(order.begin, 0, (c.k + 2) * sizeof(int32_t));
    const auto takes_part = [&](int64_t i) {
        return labels[i] >= 0 && labels[i] < c.k && (weight == nullptr || weight[i] != 0.0f);
    };
    for (int64_t i = 0; i < count; ++i) {
        largest = labels[i] > largest ? labels[i] : largest;
        if (takes_part(i)) ++order.begin[labels[i] + 2];
    }
    for (int64_t k = 2; k <= c.k; ++k) order.begin[k] += order.begin[k - 1];
    // Each label's place moves from its begin to its end, which is the next one's begin.
    for (int64_t i = 0; i < count; ++i)
        if (takes_part(i)) order.row[order.begin[labels[i] + 1]++] = static_cast<int32_t>(i);
    return largest;
}

inline void add_counts(const Clusters& c, int64_t begin, const RowOrder& order,
                       const Range& clusters) {
    for (int64_t k = clusters.begin; k < clusters.end; ++k) {
        const int64_t first = order.begin[k], last = order.begin[k + 1];
        if (c.weight == nullptr)
            c.counts[k] += static_cast<double>(last - first);
        else
            for (int64_t r = first; r < last; ++r) c.counts[k] += c.weight[begin + order.row[r]];
    }
}

// Half as many elements as a vector has floats, so that their float64 sums are one vector of the
// ISA: what is wider GCC passes through memory piece by piece.
constexpr int EACH = WIDTH / 2;
typedef double Doubles __attribute__((vector_size(EACH * 8)));
typedef float Floats __attribute__((vector_size(EACH * 4)));
typedef uint16_t Halves __attribute__((vector_size(EACH * 2)));
typedef uint32_t Words __attribute__((vector_size(EACH * 4)));

// GCC makes two conversions of half a vector and an insertion of __builtin_convertvector.
inline Doubles to_double(Floats values) {
#if defined(__AVX512F__)
    return reinterpret_cast<Doubles>(_mm512_cvtps_pd(reinterpret_cast<__m256>(values)));
#elif defined(__AVX2__)
    return reinterpret_cast<Doubles>(_mm256_cvtps_pd(reinterpret_cast<__m128>(values)));
#else
    return __builtin_convertvector(values, Doubles);
#endif
}

// sum += factor * EACH elements.
template <Dtype DTYPE>
void add_each(const char* p, double factor, Doubles& sum) {
    Floats values;
    if constexpr (DTYPE == Dtype::float32) {
        __builtin_memcpy(&values, p, sizeof values);
    } else if constexpr (DTYPE == Dtype::bfloat16) {
        Halves bits;
        __builtin_memcpy(&bits, p, sizeof bits);
        values = reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
    } else {
        float widened[EACH];
        widen({p, EACH}, DTYPE, 0, EACH, widened);
        __builtin_memcpy(&values, widened, sizeof values);
    }
    sum += factor * to_double(values);
}

// The rows of one cluster after another into `WIDE` of the columns, those of a range of clusters.
// They lie apart, in a cache that is 100 to 200 cycles away: AHEAD of them are on their way.
template <Dtype DTYPE, int WIDE>
void add_rows(const Rows& x, const Clusters& c, int64_t begin, const RowOrder& order,
              const Range& clusters, int64_t column, int64_t width) {
    constexpr int PARTS = WIDE / EACH, AHEAD = WIDE < 64 ? 24 : 12;
    const int64_t size = DTYPE == Dtype::float32 ? 4 : 2;
    const auto address = [&](int64_t i) {
        return static_cast<const char*>(x.data) + ((begin + i) * x.stride + column) * size;
    };
    const auto factor_of = [&](int64_t i) {
        const double weight = c.weight == nullptr ? 1.0 : c.weight[i];
        return c.x_scale == nullptr ? weight : weight * c.x_scale[i];
    };
    const int32_t* last = order.row + order.begin[clusters.end];
    for (int64_t k = clusters.begin; k < clusters.end; ++k) {
        const int32_t* row = order.row + order.begin[k];
        const int32_t* end = order.row + order.begin[k + 1];
        if (row == end) continue;
        double* sums = c.sums + k * c.d + column;
        if (width < WIDE) {
            float buffer[WIDE];
            for (; row < end; ++row) {
                const double factor = factor_of(begin + *row);
                const float* values = widen({address(*row), 0}, DTYPE, 0, width, buffer);
                for (int64_t e = 0; e < width; ++e) sums[e] += factor * values[e];
            }
            continue;
        }
        Doubles sum[PARTS];
        // One memcpy of all would be a `rep movs`, which starts slowly.
#pragma GCC unroll 32
        for (int v = 0; v < PARTS; ++v) __builtin_memcpy(sum + v, sums + v * EACH, sizeof sum[v]);
        for (; row < end; ++row) {
            const char* p = address(*row);
            if (row + AHEAD < last) {
                const char* next = address(row[AHEAD]);
#pragma GCC unroll 8
                for (int line = 0; line < WIDE * size; line += 64) __builtin_prefetch(next + line);
            }
            const double factor = factor_of(begin + *row);
#pragma GCC unroll 32
            for (int v = 0; v < PARTS; ++v) add_each<DTYPE>(p + v * EACH * size, factor, sum[v]);
        }
#pragma GCC unroll 32
        for (int v = 0; v < PARTS; ++v) __builtin_memcpy(sums + v * EACH, sum + v, sizeof sum[v]);
    }
}

// Rows [begin, end) into the sums that this member of the team owns: a range of columns, and where
// there are fewer ranges than members, a range of the clusters. Returns the largest label.
template <Dtype DTYPE>
int64_t accumulate_as(const Rows& x, const Clusters& c, int64_t begin, int64_t end,
                      const Team& team, const RowOrder& order) {
    const int64_t largest = sort_rows(c, begin, end - begin, order);
    const int64_t ranges = smaller(team.size, ceil_div(c.d, COLUMNS));
    const int64_t shares = team.size / ranges;
    const int64_t range = team.rank % ranges, mine = team.rank / ranges;
    if (mine >= shares) return largest;
    const Range clusters{mine * c.k / shares, (mine + 1) * c.k / shares};
    if (range == 0) add_counts(c, begin, order, clusters);
    const int64_t slices = ceil_div(c.d, COLUMNS);
    const int64_t last = smaller((range + 1) * slices / ranges * COLUMNS, c.d);
    for (int64_t e = range * slices / ranges * COLUMNS; e < last;) {
        if (last - e >= WIDE_COLUMNS) {
            add_rows<DTYPE, WIDE_COLUMNS>(x, c, begin, order, clusters, e, WIDE_COLUMNS);
            e += WIDE_COLUMNS;
        } else {
            add_rows<DTYPE, COLUMNS>(x, c, begin, order, clusters, e, smaller(COLUMNS, last - e));
            e += COLUMNS;
        }
    }
    return largest;
}

inline int64_t accumulate(const Rows& x, Dtype dtype, const Clusters& c, int64_t begin, int64_t end,
                          const Team& team, const RowOrder& order) {
    switch (dtype) {
        case Dtype::float32: return accumulate_as<Dtype::float32>(x, c, begin, end, team, order);
        case Dtype::bfloat16: return accumulate_as<Dtype::bfloat16>(x, c, begin, end, team, order);
        default: return accumulate_as<Dtype::float16>(x, c, begin, end, team, order);
    }
}

inline Clusters clusters_of(int64_t b, int64_t n, int64_t k, int64_t d, const int64_t* labels,
                            const float* x_scale, const float* weight, double* sums,
                            double* counts) {
    return {k,
            d,
            labels + b * n,
            x_scale == nullptr ? nullptr : x_scale + b * n,
            weight == nullptr ? nullptr : weight + b * n,
            sums + b * k * d,
            counts + b * k};
}

// Many problems go to one thread each, which spares every barrier; few are shared by all threads.
inline bool one_thread_each(int64_t b, int threads) { return threads == 1 || b >= 4 * threads; }

// Hands out 0, 1, 2, ... to a team. A ticket past `end` is kept for the next round.
class Tickets {
  public:
    explicit Tickets(int64_t* counter) : counter_(counter) {}
    bool take(int64_t end) {
        if (!held_) ticket_ = __atomic_fetch_add(counter_, 1, __ATOMIC_RELAXED);
        held_ = ticket_ >= end;
        return !held_;
    }
    int64_t ticket() const { return ticket_; }

  private:
    int64_t* counter_;
    int64_t ticket_ = 0;
    bool held_ = false;
};

}  // namespace
}  // namespace ssl_fast
