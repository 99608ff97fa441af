// l2_sp on the CPU: one pass over all tensors, small ones among the large.

#include "core/l2_sp.h"

#include "cpu/kernels.h"
#include "cpu/passes.h"

namespace ssl_fast {
namespace {

// Of a tensor; a smaller tensor is a block of its own.
constexpr int64_t BLOCK = 16384;
// Elements that are widened together; they stay in the first cache.
constexpr int64_t PART = 1024;

// Blocks of all tensors, and where each tensor's begin.
int64_t count_blocks(const L2Sp& c, int64_t* begin) {
    int64_t blocks = 0;
    for (int64_t tensor = 0; tensor < c.count; ++tensor) {
        if (begin != nullptr) begin[tensor] = blocks;
        blocks += ceil_div(c.sizes[tensor], BLOCK);
    }
    return blocks;
}

class Distance {
  public:
    Distance(const L2Sp& call, int rank)
        : c_(call),
          count_(count_blocks(call, nullptr)),
          arena_(call.workspace),
          blocks_(arena_, count_) {
        begin_ = arena_.take<int64_t>(c_.count);
        const std::size_t shared = arena_.used();
        for (int r = 0; r <= rank; ++r)
            for (float*& buffer : buffers_) buffer = arena_.take<float>(PART);
        bytes_ = shared + (arena_.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        if (team->rank == 0) count_blocks(c_, begin_);
        const double factor = c_.grad_value == nullptr ? 1.0 : *c_.grad_value;
        const float step = static_cast<float>(c_.weight * factor);
        int64_t elements = 0;
        for (int64_t tensor = 0; tensor < c_.count; ++tensor) elements += c_.sizes[tensor];
        // A gradient that is added to is in the cache already when it is stored.
        const bool past = !c_.add && elements * element_size(c_.dtype) > STREAMED_BYTES;
        blocks_.run(
            team,
            [=](int64_t block, double* sum) {
                const int64_t tensor = tensor_of(block);
                const int64_t first = (block - begin_[tensor]) * BLOCK;
                const int64_t count = smaller(BLOCK, c_.sizes[tensor] - first);
                *sum = distance(tensor, first, count, step, past);
            },
            [this](const double* total) {
                if (c_.value != nullptr) *c_.value = static_cast<float>(0.5 * c_.weight * *total);
            });
    }

  private:
    // The last tensor whose blocks begin at or before this one; an empty tensor has none.
    int64_t tensor_of(int64_t block) const {
        int64_t low = 0, high = c_.count - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (begin_[middle] <= block)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }

    template <bool GRAD, bool ADD, bool PAST>
    double part(const float* x, const float* anchor, float* grad, int64_t count, float step) const {
        Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
        const Vec steps = broadcast(step);
        int64_t e = 0;
        const auto one = [&](int64_t at, Vec& sum) {
            const Vec d = load(x + at) - load(anchor + at);
            sum = fma(d, d, sum);
            if constexpr (GRAD) {
                const Vec g = ADD ? fma(steps, d, load(grad + at)) : steps * d;
                if constexpr (PAST)
                    store_past(grad + at, g);
                else
                    store(grad + at, g);
            }
        };
        for (; e + 4 * WIDTH <= count; e += 4 * WIDTH)
            for (int v = 0; v < 4; ++v) one(e + v * WIDTH, sums[v]);
        for (; e + WIDTH <= count; e += WIDTH) one(e, sums[0]);
        float tail = 0.0f;
        for (; e < count; ++e) {
            const float d = x[e] - anchor[e];
            tail += d * d;
            if constexpr (GRAD) grad[e] = ADD ? grad[e] + step * d : step * d;
        }
        return static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail);
    }

    double part_of(const float* x, const float* anchor, float* grad, int64_t count, float step,
                   bool past) const {
        if (grad == nullptr) return part<false, false, false>(x, anchor, grad, count, step);
        if (c_.add) return part<true, true, false>(x, anchor, grad, count, step);
        if (past) return part<true, false, true>(x, anchor, grad, count, step);
        return part<true, false, false>(x, anchor, grad, count, step);
    }

    double distance(int64_t tensor, int64_t first, int64_t count, float step, bool past) const {
        const int64_t bytes = element_size(c_.dtype), skipped = first * bytes;
        const char* x = reinterpret_cast<const char*>(c_.parameters[tensor]) + skipped;
        const char* anchor = reinterpret_cast<const char*>(c_.anchors[tensor]) + skipped;
        char* grad = nullptr;
        if (c_.grads != nullptr && c_.grads[tensor] != 0)
            grad = reinterpret_cast<char*>(c_.grads[tensor]) + skipped;
        double sum = 0.0;
        for (int64_t at = 0; at < count; at += PART) {
            const int64_t size = smaller(PART, count - at);
            const Rows xs{x + at * bytes, 0}, anchors{anchor + at * bytes, 0};
            const float* wide = widen(xs, c_.dtype, 0, size, buffers_[0]);
            const float* wide_anchor = widen(anchors, c_.dtype, 0, size, buffers_[1]);
            char* to = grad == nullptr ? nullptr : grad + at * bytes;
            if (c_.dtype == Dtype::float32 || grad == nullptr) {
                sum += part_of(wide, wide_anchor, reinterpret_cast<float*>(to), size, step,
                               past && aligned(to, sizeof(Vec)));
                continue;
            }
            const Rows grads{to, 0};
            if (c_.add) widen(grads, c_.dtype, 0, size, buffers_[2]);
            sum += part_of(wide, wide_anchor, buffers_[2], size, step, false);
            narrow(buffers_[2], c_.dtype, 0, size, past ? static_cast<void*>(buffers_[0]) : to);
            if (past) copy_past(to, reinterpret_cast<const char*>(buffers_[0]), size * bytes);
        }
        return sum;
    }

    const L2Sp& c_;
    const int64_t count_;
    Arena arena_;
    Blocks<1> blocks_;
    int64_t* begin_;
    float* buffers_[3];
    std::size_t bytes_;
};

std::size_t workspace_bytes(const L2Sp& call) {
    L2Sp unplaced = call;
    unplaced.workspace = nullptr;
    return Distance(unplaced, 0).bytes();
}

void run(const L2Sp& call, Team* team) { Distance(call, team->rank).run(team); }

}  // namespace

extern const Kernels<L2Sp> SSL_FAST_TABLE(l2_sp);
const Kernels<L2Sp> SSL_FAST_TABLE(l2_sp) = {workspace_bytes, run};

}  // namespace ssl_fast
