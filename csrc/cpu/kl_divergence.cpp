// kl_divergence on the CPU: the sum, and the gradient of the log-variance, in one pass.

#include "core/kl_divergence.h"

#include "cpu/exponential.h"
#include "cpu/kernels.h"
#include "cpu/passes.h"

namespace ssl_fast {
namespace {

constexpr int64_t BLOCK = 16384;
// Elements that are widened together; they stay in the first cache.
constexpr int64_t PART = 1024;
// The largest fp32 number whose exponential is finite.
constexpr float LARGEST_EXPONENT = 88.72283f;
// Terms are added in fp32 without overflow: 1024 of the largest exponential stay finite.
constexpr float SMALL = 0x1p-20f;

struct Exponential {
    Vec minus_one;          // exp(x) - 1
    Vec minus_one_minus_x;  // exp(x) - 1 - x
};

// Near 0, x^2 times the power series of (exp(x) - 1 - x) / x^2 (5e-8 at |x| = 1) keeps the digits
// that the subtraction would lose.
inline Exponential exponential(Vec x) {
    const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
    // exp stops growing there; NaN stays, and so does +inf, whose divergence is NaN in torch.
    const Vec limited = min(broadcast(LARGEST_EXPONENT), x);
    const Vec larger_or_infinite =
        select_greater(x, broadcast(3.4028235e38f), x, exp_of(max(broadcast(-104.0f), limited)));
    Vec series = broadcast(2.7557319e-7f);
    series = fma(series, x, broadcast(2.7557319e-6f));
    series = fma(series, x, broadcast(2.4801587e-5f));
    series = fma(series, x, broadcast(1.9841270e-4f));
    series = fma(series, x, broadcast(1.3888889e-3f));
    series = fma(series, x, broadcast(8.3333333e-3f));
    series = fma(series, x, broadcast(4.1666667e-2f));
    series = fma(series, x, broadcast(1.6666667e-1f));
    series = fma(series, x, broadcast(0.5f));
    const Vec squared = x * x * series;
    const Vec size = max(x, zero - x);
    const Vec far = larger_or_infinite - one;
    return {select_greater(size, one, far, x + squared),
            select_greater(size, one, far - x, squared)};
}

class Divergence {
  public:
    Divergence(const KlDivergence& call, int rank)
        : c_(call), arena_(call.workspace), blocks_(arena_, ceil_div(call.n, BLOCK)) {
        const std::size_t shared = arena_.used();
        for (int r = 0; r <= rank; ++r)
            for (float*& buffer : buffers_) buffer = arena_.take<float>(PART);
        bytes_ = shared + (arena_.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void run(Team* team) {
        const bool past =
            c_.grad_logvar != nullptr && c_.n * 4 > STREAMED_BYTES && aligned(c_.grad_logvar, 64);
        blocks_.run(
            team,
            [=](int64_t block, double* sum) {
                *sum = 0.0;
                const int64_t end = smaller((block + 1) * BLOCK, c_.n);
                for (int64_t first = block * BLOCK; first < end; first += PART)
                    *sum += part(first, smaller(PART, end - first), past);
            },
            [this](const double* total) {
                // The largest number where many large but finite terms add up to more.
                const double largest = 3.4028234663852886e38;
                const double sum = *total, size = sum < 0.0 ? -sum : sum;
                const bool above = size > largest && size < __builtin_inf();
                *c_.value = static_cast<float>(above ? largest : sum);
            });
    }

  private:
    // Numbers as fp32, with zeros (of which the divergence is 0) up to whole vectors.
    const float* numbers(const void* data, int64_t first, int64_t count, float* buffer) const {
        const Rows row{static_cast<const char*>(data) + first * element_size(c_.dtype), 0};
        const float* wide = widen(row, c_.dtype, 0, count, buffer);
        if (count % WIDTH == 0) return wide;
        if (wide != buffer) __builtin_memcpy(buffer, wide, count * sizeof(float));
        for (int64_t i = count; i % WIDTH != 0; ++i) buffer[i] = 0.0f;
        return buffer;
    }

    double part(int64_t first, int64_t count, bool past) const {
        const float* mu = numbers(c_.mu, first, count, buffers_[0]);
        const float* logvar = numbers(c_.logvar, first, count, buffers_[1]);
        float* grad = c_.grad_logvar == nullptr ? nullptr : c_.grad_logvar + first;
        float* to = grad != nullptr && count % WIDTH == 0 ? grad : buffers_[2];
        Vec sum = broadcast(0.0f);
        for (int64_t i = 0; i < count; i += WIDTH) {
            const Vec m = load(mu + i);
            const Exponential e = exponential(load(logvar + i));
            sum = sum + fma(m, m, e.minus_one_minus_x) * broadcast(0.5f * SMALL);
            if (grad == nullptr) continue;
            const Vec half = e.minus_one * broadcast(0.5f);
            if (past && to == grad)
                store_past(to + i, half);
            else
                store(to + i, half);
        }
        if (grad != nullptr && to != grad) __builtin_memcpy(grad, to, count * sizeof(float));
        return static_cast<double>(sum_lanes(sum)) / static_cast<double>(SMALL);
    }

    const KlDivergence& c_;
    Arena arena_;
    Blocks<1> blocks_;
    float* buffers_[3];
    std::size_t bytes_;
};

std::size_t workspace_bytes(const KlDivergence& call) {
    KlDivergence unplaced = call;
    unplaced.workspace = nullptr;
    return Divergence(unplaced, 0).bytes();
}

void run(const KlDivergence& call, Team* team) { Divergence(call, team->rank).run(team); }

}  // namespace

extern const Kernels<KlDivergence> SSL_FAST_TABLE(kl_divergence);
const Kernels<KlDivergence> SSL_FAST_TABLE(kl_divergence) = {workspace_bytes, run};

}  // namespace ssl_fast
