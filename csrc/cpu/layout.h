#pragma once
// How a call's workspace is cut up, and the packing of its keys and queries.

#include "core/team.h"
#include "cpu/weights.h"

namespace ssl_fast {
namespace {

// Hands out 64-byte aligned arrays; with a null base it only counts.
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)), used_(0) {}
    template <class T>
    T* take(int64_t count) {
        char* p = base_ + used_;
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(p);
    }
    std::size_t used() const { return static_cast<std::size_t>(used_); }

  private:
    char* base_;
    int64_t used_;
};

// Keys (or the symmetric loss's features) as the sweeps read them.
struct PackedKeys {
    int64_t m, d;
    float* packed;
    float* scale;  // [M], padded to whole groups with zeros

    int64_t groups() const { return ceil_div(m, GROUP); }
    Block block(int64_t group) const {
        Block b{};
        b.key = group * GROUP;
        b.keys = static_cast<int>(smaller(GROUP, m - b.key));
        return b;
    }
};

template <class Path>
void pack_key_row(const Rows& keys, Dtype dtype, int64_t j, int64_t rows, const PackedKeys& out,
                  const float* row, float* buffer) {
    if constexpr (Path::BF16) {
        uint16_t* bits = reinterpret_cast<uint16_t*>(buffer);
        const int64_t padded = round_up(out.d, 32);
        if (j < out.m)
            __builtin_memcpy(bits, row_at(keys, dtype, j), out.d * 2);
        else
            __builtin_memset(bits, 0, out.d * 2);
        __builtin_memset(bits + out.d, 0, (padded - out.d) * 2);
        Path::pack_key_bits(bits, j, rows, out.d, out.packed);
    } else {
        static_cast<void>(rows);
        Path::pack_key(row, out.scale[j], j, out.d, out.packed);
    }
}

// One panel of keys: scales (the inverse norm, or what the caller gave) and packed rows.
// `buffer` holds round_up(d, 64) floats.
template <class Path>
void pack_keys(const Rows& keys, Dtype dtype, const float* given_scale, bool normalize,
               int64_t panel, const PackedKeys& out, float* buffer) {
    const int64_t first = panel * Path::PANEL;
    const int64_t rows = round_up(out.block(first / GROUP).keys, Path::PANEL);
    for (int64_t j = first; j < first + Path::PANEL; ++j) {
        const float* row = buffer;
        if (j < out.m) {
            row = widen(keys, dtype, j, out.d, buffer);
            out.scale[j] = normalize ? inverse_norm(row, out.d)
                                     : (given_scale != nullptr ? given_scale[j] : 1.0f);
        } else {
            __builtin_memset(buffer, 0, out.d * sizeof(float));
            out.scale[j] = 0.0f;
        }
        pack_key_row<Path>(keys, dtype, j, rows, out, row, buffer);
    }
}

}  // namespace
}  // namespace ssl_fast
