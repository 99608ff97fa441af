// reconstruction on the CPU: both inputs are read once, in parts that stay in the first cache, and
// each part's losses, their sum and the gradient come from one loop.

#include "core/reconstruction.h"

#include "cpu/kernels.h"
#include "cpu/passes.h"
#include "cpu/pointwise.h"

namespace ssl_fast {
namespace {

// Elements of a block: long ones are streams to the prefetcher, but each thread has to get some.
// Blocks of a huge page, 524288 elements, take as long, also where the gradient's pages are fresh.
constexpr int64_t LEAST_BLOCK = 16384, MOST_BLOCK = 131072;
// Elements that are widened together, and summed in fp32.
constexpr int64_t PART = 1024;
// The hardware's prefetcher stops at the end of a page of 4 KB.
constexpr int64_t AHEAD = 4096;

// The columns of a part as fp32, each with whole vectors to read; null where there is none.
struct Part {
    const float *x, *t, *weight, *keep, *pos_weight;
    float *slope, *loss;
    int64_t vectors;
    bool past;  // slope lies in memory that is written past the caches
};

class Reconstructed {
  public:
    Reconstructed(const Reconstruction& call, int rank)
        : c_(call),
          block_(larger(LEAST_BLOCK, smaller(MOST_BLOCK, round_up(call.n / 32, PART)))),
          arena_(call.workspace),
          blocks_(arena_, ceil_div(call.n, block_)) {
        const std::size_t shared = arena_.used();
        for (int r = 0; r <= rank; ++r)
            for (float*& buffer : buffers_) buffer = arena_.take<float>(PART);
        bytes_ = shared + (arena_.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        const int64_t size = element_size(c_.dtype);
        past_ = c_.grad != nullptr && c_.grad != c_.input && c_.n * size > STREAMED_BYTES;
        blocks_.run(
            team,
            [this](int64_t block, double* sums) {
                sums[0] = sums[1] = 0.0;
                const int64_t end = smaller((block + 1) * block_, c_.n);
                for (int64_t first = block * block_; first < end; first += PART)
                    part(first, smaller(PART, end - first), sums);
            },
            [this](const double* total) {
                if (c_.value != nullptr) *c_.value = static_cast<float>(c_.factor * total[0]);
                if (c_.outside != nullptr) *c_.outside = static_cast<int64_t>(total[1]);
            });
    }

  private:
    enum Buffer { INPUT, TARGET, WEIGHT, KEEP, POSITIVE, SLOPE, LOSS, NARROW, BUFFERS };

    // What comes AHEAD bytes later, by lines.
    __attribute__((always_inline)) static void fetch(const void* data, int64_t bytes) {
        const char* from = static_cast<const char*>(data) + AHEAD;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 3);
    }

    // `count` numbers from `first` on, followed by `rest` up to whole vectors.
    const float* numbers(const void* data, Dtype dtype, int64_t first, int64_t count, float rest,
                         float* buffer) const {
        const Rows row{static_cast<const char*>(data) + first * element_size(dtype), 0};
        if (dtype != Dtype::float32) fetch(row.data, count * element_size(dtype));
        const float* wide = widen(row, dtype, 0, count, buffer);
        if (count % WIDTH == 0) return wide;
        if (wide != buffer) __builtin_memcpy(buffer, wide, count * sizeof(float));
        for (int64_t i = count; i % WIDTH != 0; ++i) buffer[i] = rest;
        return buffer;
    }

    const float* target(int64_t first, int64_t count) const {
        float* buffer = buffers_[TARGET];
        const float scale = c_.target_scale, shift = c_.target_shift;
        if (c_.bytes) {
            const auto* from = static_cast<const uint8_t*>(c_.target) + first;
            fetch(from, count);
            for (int64_t i = 0; i < count; ++i)
                buffer[i] = static_cast<float>(from[i]) * scale + shift;
            for (int64_t i = count; i % WIDTH != 0; ++i) buffer[i] = 0.5f;
            return buffer;
        }
        const float* t = numbers(c_.target, c_.target_dtype, first, count, 0.5f, buffer);
        if (scale == 1.0f && shift == 0.0f) return t;
        for (int64_t i = 0; i < count; i += WIDTH)
            store(buffer + i, fma(load(t + i), broadcast(scale), broadcast(shift)));
        return buffer;
    }

    // Which elements count, null where all do: a part of whole vectors and no mask.
    const float* kept(int64_t first, int64_t count) const {
        if (c_.mask == nullptr && count % WIDTH == 0) return nullptr;
        float* keep = buffers_[KEEP];
        for (int64_t i = 0; i < count;) {
            const int64_t at = first + i, m = c_.mask == nullptr ? 0 : at / c_.mask_span;
            const int64_t end =
                c_.mask == nullptr ? count : smaller(count, (m + 1) * c_.mask_span - first);
            const float one = c_.mask == nullptr || c_.mask[m] != 0 ? 1.0f : 0.0f;
            for (; i < end; ++i) keep[i] = one;
        }
        for (int64_t i = count; i % WIDTH != 0; ++i) keep[i] = 0.0f;
        return keep;
    }

    const float* positive(int64_t first, int64_t count) const {
        if (c_.pos_weight == nullptr) return nullptr;
        float* buffer = buffers_[POSITIVE];
        int64_t at = first % c_.period;
        for (int64_t i = 0; i < round_up(count, WIDTH); ++i) {
            buffer[i] = c_.pos_weight[at];
            if (++at == c_.period) at = 0;
        }
        return buffer;
    }

    void part(int64_t first, int64_t count, double* sums) const {
        Part p{};
        p.vectors = ceil_div(count, WIDTH);
        p.x = numbers(c_.input, c_.dtype, first, count, 0.5f, buffers_[INPUT]);
        p.t = target(first, count);
        if (c_.weight != nullptr)
            p.weight = numbers(c_.weight, Dtype::float32, first, count, 0.0f, buffers_[WEIGHT]);
        p.keep = kept(first, count);
        p.pos_weight = positive(first, count);
        const int64_t size = element_size(c_.dtype);
        char* grad = c_.grad == nullptr ? nullptr : static_cast<char*>(c_.grad) + first * size;
        const bool direct = grad != nullptr && c_.dtype == Dtype::float32 && count % WIDTH == 0 &&
                            (!past_ || aligned(grad, sizeof(Vec)));
        p.past = direct && past_;
        if (grad != nullptr) p.slope = direct ? reinterpret_cast<float*>(grad) : buffers_[SLOPE];
        if (c_.losses != nullptr) p.loss = count % WIDTH == 0 ? c_.losses + first : buffers_[LOSS];
        chosen(p, sums);
        if (p.loss == buffers_[LOSS] && p.loss != nullptr)
            __builtin_memcpy(c_.losses + first, p.loss, count * sizeof(float));
        if (grad == nullptr || direct) return;
        const void* narrowed = p.slope;
        if (c_.dtype != Dtype::float32) {
            void* to = past_ ? static_cast<void*>(buffers_[NARROW]) : grad;
            narrow(p.slope, c_.dtype, 0, count, to);
            if (!past_) return;
            narrowed = to;
        }
        if (past_)
            copy_past(grad, static_cast<const char*>(narrowed), count * size);
        else
            __builtin_memcpy(grad, narrowed, count * size);
    }

    void chosen(const Part& p, double* sums) const {
        switch (c_.kind) {
            case Kind::mse: return loop<Kind::mse>(p, sums);
            case Kind::l1: return loop<Kind::l1>(p, sums);
            case Kind::smooth_l1: return loop<Kind::smooth_l1>(p, sums);
            case Kind::huber: return loop<Kind::huber>(p, sums);
            case Kind::bce: return loop<Kind::bce>(p, sums);
            case Kind::bce_with_logits: return loop<Kind::bce_with_logits>(p, sums);
        }
    }

    template <Kind KIND>
    void loop(const Part& p, double* sums) const {
        if (p.weight == nullptr && p.keep == nullptr && p.pos_weight == nullptr &&
            p.loss == nullptr)
            over<KIND, true>(p, sums);
        else
            over<KIND, false>(p, sums);
    }

    template <Kind KIND, bool PLAIN>
    void over(const Part& p, double* sums) const {
        const Vec zero = broadcast(0.0f), one = broadcast(1.0f), factor = broadcast(c_.grad_factor);
        Vec sum = zero;
        int64_t outside = 0;
        for (int64_t i = 0; i < p.vectors * WIDTH; i += WIDTH) {
            const Vec x = load(p.x + i), t = load(p.t + i);
            __builtin_prefetch(reinterpret_cast<const char*>(p.x + i) + AHEAD, 0, 3);
            __builtin_prefetch(reinterpret_cast<const char*>(p.t + i) + AHEAD, 0, 3);
            Terms term = terms<KIND>(x, t, c_.parameter);
            if constexpr (!PLAIN && KIND == Kind::bce_with_logits)
                if (p.pos_weight != nullptr)
                    term = bce_with_logits_terms(x, t, load(p.pos_weight + i));
            unsigned bad = 0;
            if constexpr (KIND == Kind::bce)
                bad = lanes_above(x, one) | lanes_above(zero - x, zero) | lanes_above(t, one) |
                      lanes_above(zero - t, zero);
            if constexpr (!PLAIN) {
                if (p.weight != nullptr) {
                    term.loss = term.loss * load(p.weight + i);
                    term.slope = term.slope * load(p.weight + i);
                }
                if (p.keep != nullptr) {
                    const Vec keep = load(p.keep + i);
                    term.loss = select_greater(keep, zero, term.loss, zero);
                    term.slope = select_greater(keep, zero, term.slope, zero);
                    bad &= lanes_above(keep, zero);
                }
                if (p.loss != nullptr) store(p.loss + i, term.loss);
            }
            if constexpr (KIND == Kind::bce) outside += __builtin_popcount(bad);
            sum = sum + term.loss;
            if (p.slope == nullptr) continue;
            if (p.past)
                store_past(p.slope + i, term.slope * factor);
            else
                store(p.slope + i, term.slope * factor);
        }
        sums[0] += static_cast<double>(sum_lanes(sum));
        sums[1] += static_cast<double>(outside);
    }

    const Reconstruction& c_;
    const int64_t block_;
    Arena arena_;
    Blocks<2> blocks_;
    bool past_ = false;
    float* buffers_[BUFFERS];
    std::size_t bytes_;
};

std::size_t workspace_bytes(const Reconstruction& call) {
    Reconstruction unplaced = call;
    unplaced.workspace = nullptr;
    return Reconstructed(unplaced, 0).bytes();
}

void run(const Reconstruction& call, Team* team) { Reconstructed(call, team->rank).run(team); }

}  // namespace

extern const Kernels<Reconstruction> SSL_FAST_TABLE(reconstruction);
const Kernels<Reconstruction> SSL_FAST_TABLE(reconstruction) = {workspace_bytes, run};

}  // namespace ssl_fast
