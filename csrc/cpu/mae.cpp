// mae on the CPU. A patch is small enough for the first cache, so that its mean, its variance and
// the loss are three walks over it and one over memory. Patches that aren't counted are not read.

#include "core/mae.h"

#include "cpu/kernels.h"
#include "cpu/passes.h"

namespace ssl_fast {
namespace {

// The elements of a block of patches: enough for one ticket's cost to vanish.
constexpr int64_t BLOCK = 32768;

// The first element of patch l of image b.
inline int64_t corner(const Images& images, int64_t b, int64_t l) {
    return b * images.strides[0] + l / images.columns * images.patch_rows * images.strides[2] +
           l % images.columns * images.patch_columns * images.strides[3];
}

// Whether a pixel's channels are adjacent, and pixels along a row (as in torch.channels_last).
inline bool interleaved(const Images& images) {
    return images.strides[3] == images.channels && (images.channels == 1 || images.strides[1] == 1);
}

// C > 0: the channels are known, and the compiler turns the strided stores into shuffles.
template <class T, int C>
inline void gather_rows(const T* from, const Images& images, T* to) {
    const int64_t channels = C > 0 ? C : images.channels;
    const int64_t width = images.patch_columns;
    const int64_t next_channel = images.strides[1], next_column = C > 0 ? 1 : images.strides[3];
    for (int64_t y = 0; y < images.patch_rows; ++y) {
        const T* row = from + y * images.strides[2];
        T* out = to + y * width * channels;
        for (int64_t x = 0; x < width; ++x)
            for (int64_t c = 0; c < channels; ++c)
                out[x * channels + c] = row[c * next_channel + x * next_column];
    }
}

// Patch l of image b in the order (row, column, channel).
template <class T>
void gather(const void* data, const Images& images, int64_t b, int64_t l, T* to) {
    const T* from = static_cast<const T*>(data) + corner(images, b, l);
    const int64_t row = images.patch_columns * images.channels;
    if (interleaved(images))
        for (int64_t i = 0; i < images.patch_rows; ++i)
            __builtin_memcpy(to + i * row, from + i * images.strides[2], row * sizeof(T));
    else if (images.strides[3] == 1 && images.channels == 3)
        gather_rows<T, 3>(from, images, to);
    else
        gather_rows<T, 0>(from, images, to);
}

struct Moments {
    float mean, inverse;
};

// Of one part of a row, as far as fp32 sums go, relative to the mean of its first elements, the
// shift. Its square is at most SHIFT / p of what is to be found, so that p / SHIFT of 6e-8 is the
// worst that the subtraction of it costs.
constexpr int64_t PART = 4096, SHIFT = 4 * WIDTH;

inline float mean_of_first(const float* t, int64_t count) {
    if (count >= SHIFT) {
        const Vec sum = (load(t) + load(t + WIDTH)) + (load(t + 2 * WIDTH) + load(t + 3 * WIDTH));
        return sum_lanes(sum) / static_cast<float>(SHIFT);
    }
    float sum = 0.0f;
    for (int64_t e = 0; e < count; ++e) sum += t[e];
    return sum / static_cast<float>(count);
}

inline Moments moments(const float* t, int64_t p) {
    double mean = 0.0, squares = 0.0;  // over the parts so far
    for (int64_t begin = 0; begin < p; begin += PART) {
        const int64_t end = smaller(begin + PART, p);
        const float shift = mean_of_first(t + begin, end - begin);
        Vec sums[4], squared[4];
        for (int v = 0; v < 4; ++v) sums[v] = squared[v] = broadcast(0.0f);
        const auto one = [&](int64_t e, int v) {
            const Vec x = load(t + e) - shift;
            sums[v] = sums[v] + x;
            squared[v] = fma(x, x, squared[v]);
        };
        int64_t e = begin;
        for (; e + 4 * WIDTH <= end; e += 4 * WIDTH)
            for (int v = 0; v < 4; ++v) one(e + v * WIDTH, v);
        for (; e + WIDTH <= end; e += WIDTH) one(e, 0);
        float tail = 0.0f, tail_squared = 0.0f;
        for (; e < end; ++e) {
            const float x = t[e] - shift;
            tail += x;
            tail_squared += x * x;
        }
        const double count = static_cast<double>(end - begin), before = static_cast<double>(begin);
        const double sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + tail;
        const double own = sum_lanes((squared[0] + squared[1]) + (squared[2] + squared[3])) +
                           tail_squared - sum * sum / count;
        const double away = shift + sum / count - mean;
        squares += own + away * away * before * count / (before + count);
        mean += away * count / (before + count);
    }
    // Rounding may leave less than nothing. One element has no unbiased variance: NaN, as in torch.
    const double variance = (squares < 0.0 ? 0.0 : squares) / static_cast<double>(p - 1);
    return {static_cast<float>(mean), static_cast<float>(1.0 / __builtin_sqrt(variance + 1e-6))};
}

class Patches {
  public:
    Patches(const Mae& call, int rank)
        : c_(call),
          rows_(call.b * call.l),
          block_(larger(1, BLOCK / call.p)),
          arena_(call.workspace),
          blocks_(arena_, ceil_div(rows_, block_)) {
        const std::size_t shared = arena_.used();
        for (int r = 0; r <= rank; ++r)
            for (float*& buffer : buffers_) buffer = arena_.take<float>(c_.p);
        bytes_ = shared + (arena_.used() - shared) / (rank + 1) * c_.threads;
    }
    std::size_t bytes() const { return bytes_; }

    void forward(Team* team) {
        blocks_.run(
            team,
            [this](int64_t block, double* sums) {
                sums[0] = sums[1] = 0.0;
                for_rows(block, [&](int64_t i) {
                    const float weight = c_.mask[i];
                    if (weight == 0.0f) return;
                    sums[0] += weight * loss(patch(i));
                    sums[1] += weight;
                });
            },
            [this](const double* total) { write(total); });
    }

    void backward(Team* team) {
        const double weight = *c_.weight;
        blocks_.run(
            team,
            [=](int64_t block, double* sums) {
                sums[0] = sums[1] = 0.0;
                const double factor = weight * slope();
                for_rows(block, [&](int64_t i) {
                    if (c_.mask[i] == 0.0f)
                        no_gradient(i);
                    else
                        gradient(i, patch(i), static_cast<float>(factor * c_.mask[i]));
                });
            },
            [](const double*) {});
    }

    // The loss, and the gradient for a weight of 1, from one read: the mask's sum comes first.
    void both(Team* team) {
        if (team->rank == 0) {
            double count = 0.0;
            for (int64_t i = 0; i < rows_; ++i) count += c_.mask[i];
            *c_.scale = inverse_of(count);
        }
        blocks_.run(
            team,
            [this](int64_t block, double* sums) {
                sums[0] = sums[1] = 0.0;
                const double factor = slope();
                for_rows(block, [&](int64_t i) {
                    const float weight = c_.mask[i];
                    if (weight == 0.0f) return no_gradient(i);
                    const Patch row = patch(i);
                    sums[0] += weight * loss(row);
                    sums[1] += weight;
                    gradient(i, row, static_cast<float>(factor * weight));
                });
            },
            [this](const double* total) { write(total); });
    }

  private:
    // A patch as fp32, and what its target is normalised with.
    struct Patch {
        const float *x, *t;
        Moments moments;
    };

    static float inverse_of(double count) {
        return count == 0.0 ? 0.0f : static_cast<float>(1.0 / count);
    }
    void write(const double* total) const {
        *c_.loss = total[1] == 0.0 ? 0.0f : static_cast<float>(total[0] / total[1]);
        *c_.scale = inverse_of(total[1]);
    }
    // Of half a squared difference's derivative, but for the mask.
    double slope() const { return 2.0 * *c_.scale / static_cast<double>(c_.p); }

    // Skipped rows throw the hardware's prefetcher off: three quarters of the rows took 2.9 ms
    // where all took 1.9. So the next row that counts is asked for before one is worked on: 2.3 ms.
    template <class Body>
    void for_rows(int64_t block, Body body) {
        const int64_t end = smaller((block + 1) * block_, rows_);
        int64_t asked = block * block_;
        for (int64_t i = block * block_; i < end; ++i) {
            if (asked <= i) {
                do {
                    ++asked;
                } while (asked < end && c_.mask[asked] == 0.0f);
                if (asked < end) prefetch(asked);
            }
            body(i);
        }
    }

    // Inlined by force: GCC takes a function of nothing but prefetches for one without effects, and
    // drops its calls.
    __attribute__((always_inline)) static void prefetch_bytes(const char* from, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    }

    __attribute__((always_inline)) void prefetch(int64_t i) const {
        prefetch_bytes(pred_at(i), c_.p * element_size(c_.dtype));
        const int64_t size = element_size(c_.target_dtype);
        if (c_.images.channels == 0) {
            prefetch_bytes(target_at(i), c_.p * size);
            return;
        }
        const Images& images = c_.images;
        const bool planes = images.strides[3] == 1, pixels = interleaved(images);
        if (!planes && !pixels) return;
        const char* from =
            static_cast<const char*>(c_.target.data) + corner(images, i / c_.l, i % c_.l) * size;
        const int64_t bytes = images.patch_columns * images.strides[3] * size;
        for (int64_t c = 0; c < (pixels ? 1 : images.channels); ++c)
            for (int64_t y = 0; y < images.patch_rows; ++y)
                prefetch_bytes(from + (c * images.strides[1] + y * images.strides[2]) * size,
                               bytes);
    }

    const char* pred_at(int64_t i) const {
        const int64_t offset = i / c_.l * c_.pred.batch_stride + i % c_.l * c_.pred.row_stride;
        return static_cast<const char*>(c_.pred.data) + offset * element_size(c_.dtype);
    }

    const char* target_at(int64_t i) const {
        const int64_t offset = i / c_.l * c_.target.batch_stride + i % c_.l * c_.target.row_stride;
        return static_cast<const char*>(c_.target.data) + offset * element_size(c_.target_dtype);
    }

    const float* pred(int64_t i) const {
        return widen(Rows{pred_at(i), 0}, c_.dtype, 0, c_.p, buffers_[0]);
    }

    const float* target(int64_t i) const {
        const int64_t b = i / c_.l, l = i % c_.l;
        Rows row{buffers_[2], 0};
        if (c_.images.channels == 0)
            row.data = target_at(i);
        else if (c_.target_dtype == Dtype::float32)
            gather(c_.target.data, c_.images, b, l, buffers_[2]);
        else
            gather(c_.target.data, c_.images, b, l, reinterpret_cast<uint16_t*>(buffers_[2]));
        return widen(row, c_.target_dtype, 0, c_.p, buffers_[1]);
    }

    Patch patch(int64_t i) const {
        const float* t = target(i);
        return {pred(i), t, c_.normalize ? moments(t, c_.p) : Moments{0.0f, 1.0f}};
    }

    double loss(const Patch& row) const {
        const auto [x, t, m] = row;
        return sum_terms(c_.p,
                         [x = x, t = t, m = m](auto lane, int64_t e) {
                             const auto d = value_at(lane, x + e) -
                                            (value_at(lane, t + e) - m.mean) * m.inverse;
                             return d * d;
                         }) /
               static_cast<double>(c_.p);
    }

    int64_t row_bytes() const { return c_.p * element_size(c_.dtype); }
    char* gradient_at(int64_t i) const {
        return static_cast<char*>(c_.grad_pred) + i * row_bytes();
    }
    bool past() const { return rows_ * row_bytes() > STREAMED_BYTES; }

    void no_gradient(int64_t i) const {
        void* to = past() ? static_cast<void*>(buffers_[2]) : gradient_at(i);
        __builtin_memset(to, 0, row_bytes());
        if (past()) copy_past(gradient_at(i), static_cast<const char*>(to), row_bytes());
    }

    void gradient(int64_t i, const Patch& row, float factor) const {
        const auto [x, t, m] = row;
        char* to = gradient_at(i);
        const bool past = this->past();
        const bool direct = c_.dtype == Dtype::float32 && (!past || aligned(to, sizeof(Vec)));
        float* out = direct ? reinterpret_cast<float*>(to) : buffers_[3];
        int64_t e = 0;
        for (; e + WIDTH <= c_.p; e += WIDTH) {
            const Vec g = factor * (load(x + e) - (load(t + e) - m.mean) * m.inverse);
            if (direct && past)
                store_past(out + e, g);
            else
                store(out + e, g);
        }
        for (; e < c_.p; ++e) out[e] = factor * (x[e] - (t[e] - m.mean) * m.inverse);
        if (direct) return;
        void* narrowed = past ? static_cast<void*>(buffers_[2]) : to;
        if (c_.dtype == Dtype::float32)
            narrowed = out;
        else
            narrow(out, c_.dtype, 0, c_.p, narrowed);
        if (past) copy_past(to, static_cast<const char*>(narrowed), row_bytes());
    }

    const Mae& c_;
    const int64_t rows_, block_;
    Arena arena_;
    Blocks<2> blocks_;
    float* buffers_[4];
    std::size_t bytes_;
};

std::size_t workspace_bytes(const Mae& call) {
    Mae unplaced = call;
    unplaced.workspace = nullptr;
    return Patches(unplaced, 0).bytes();
}

void run(const Mae& call, Team* team) {
    Patches patches(call, team->rank);
    if (call.weight != nullptr)
        patches.backward(team);
    else if (call.grad_pred != nullptr)
        patches.both(team);
    else
        patches.forward(team);
}

}  // namespace

extern const Kernels<Mae> SSL_FAST_TABLE(mae);
const Kernels<Mae> SSL_FAST_TABLE(mae) = {workspace_bytes, run};

}  // namespace ssl_fast
