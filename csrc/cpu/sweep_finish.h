#pragma once
// The ends of the sweep: rows, the query sum of a row block, keys; and how a call runs it.

#include "cpu/sweep_epilogue.h"

namespace ssl_fast {
namespace {

// Statistics, loss and the rows' own gradients, once a sub-block has seen every key.
template <class Path, class Call>
void Sweep<Path, Call>::finish(int64_t first, int64_t sub, SubBlock& own) {
    alignas(64) float factor[LANES];
    if (accumulate_) transpose_sums(own.key_sum, c_.d, staged_, padded_d_);
    for (int lane = 0; lane < LANES; ++lane) {
        const int64_t i = (first + sub) * LANES + lane;
        RowTerms t{};
        if (i < c_.n) t = finish_row(i, lane, own);
        factor[lane] = LN2 * (c_.pass == Pass::loss ? t.factor : 1.0f);
        coefficient_[i] = t.coefficient;
    }
    if (!strip_) return;
    __builtin_memcpy(final_factor_ + sub * LANES, factor, sizeof factor);
    __builtin_memcpy(final_reference_ + sub * LANES, own.reference, sizeof own.reference);
    for (int64_t column = 0; column < padded_d_; column += LANES)
        Path::pack_weighted(scaled_row(sub, 0) + column, padded_d_, factor, weighted(column, sub));
}

template <class Path, class Call>
RowTerms Sweep<Path, Call>::finish_row(int64_t i, int lane, const SubBlock& own) {
    const float maximum = own.maximum[lane], reference = own.reference[lane];
    const float* key_sum = accumulate_ ? staged_ + lane * padded_d_ : nullptr;
    if (c_.pass == Pass::loss)
        return finish_loss(c_, i, maximum, reference, own.sum[lane], key_sum, query_scale_[i],
                           c_.positive.data == nullptr ? keys_.scale[i] : 0.0f, buffers_);
    if constexpr (SIGMOID) {
        c_.loss[i] = own.sum[lane] - own.lost[lane];
        if (c_.grad_bias != nullptr) c_.grad_bias[i] = own.weight[lane];
        if (accumulate_) finish_given(c_, i, key_sum, buffers_);
        return {};
    }
    const RowTerms t = row_terms(maximum, reference, own.sum[lane], 0.0f);
    if (c_.pass == Pass::forward) {
        c_.row_lse[i] = t.lse;
        c_.row_max[i] = t.maximum;
        if (c_.expectation != nullptr)
            multiply(key_sum, t.lse == -__builtin_inff() ? 0.0f : 1.0f / own.sum[lane], c_.d,
                     c_.expectation + i * c_.d);
    } else if (accumulate_) {
        finish_given(c_, i, key_sum, buffers_);
    }
    return t;
}

// The query sum of one group, in `columns` columns of LANES from `first`.
template <class Path, class Call>
void Sweep<Path, Call>::sum_queries(int64_t group, int64_t subs, int64_t first, int64_t columns) {
    const Block b = keys_.block(group);
    const int rows =
        query_sums_ == c_.grad_key ? b.keys : static_cast<int>(round_up(b.keys, Path::PANEL));
    for (int64_t sub = 0; sub < subs; sub += UNIT) {
        const int count = static_cast<int>(smaller(UNIT, subs - sub));
        const bool common = has_final_reference(group, sub, count);
        for (int64_t c = first; c < first + columns; ++c) {
            const int64_t column = c * LANES;
            if (!common) weigh_again(group, sub, count, column);
            Path::query_sum(strip(group, sub), common ? weighted(column, sub) : own_weighted_,
                            count, rows, query_sums_ + b.key * padded_d_ + column, padded_d_);
        }
    }
}

template <class Path, class Call>
bool Sweep<Path, Call>::has_final_reference(int64_t group, int64_t sub, int count) const {
    const float* then = group_reference_ + (group * block_ + sub) * LANES;
    return __builtin_memcmp(then, final_reference_ + sub * LANES, count * LANES * sizeof(float)) ==
           0;
}

// The right operand for a group that was swept before its rows' references last moved.
template <class Path, class Call>
void Sweep<Path, Call>::weigh_again(int64_t group, int64_t sub, int count, int64_t column) {
    alignas(64) float factor[LANES];
    for (int s = 0; s < count; ++s) {
        const float* then = group_reference_ + (group * block_ + sub + s) * LANES;
        const int64_t at = (sub + s) * LANES;
        for (int lane = 0; lane < LANES; lane += WIDTH)
            store(factor + lane, load(final_factor_ + at + lane) *
                                     exp2(load(then + lane) - load(final_reference_ + at + lane)));
        Path::pack_weighted(scaled_row(sub + s, 0) + column, padded_d_, factor,
                            own_weighted_ + s * Path::WEIGHTED_FLOATS);
    }
}

template <class Path, class Call>
void Sweep<Path, Call>::finish_keys(int64_t panel) {
    const int64_t key = panel * Path::PANEL;
    const bool in_batch = c_.pass == Pass::loss && c_.positive.data == nullptr;
    for (int64_t j = key; j < smaller(key + Path::PANEL, c_.m); ++j) {
        const float* sum = query_sums_ + j * padded_d_;
        if (in_batch && j < c_.n) {
            const float* q = widen(c_.query, c_.dtype, j, c_.d, buffers_.other);
            combine(sum, 1.0f, q, -coefficient_[j] * query_scale_[j], c_.d, buffers_.gradient);
            sum = buffers_.gradient;
        }
        const float* k = widen(c_.key, c_.dtype, j, c_.d, buffers_.row);
        const float along =
            through_norm(k, sum, 1.0f, keys_.scale[j], c_.normalize, c_.d, buffers_.output);
        if (c_.grad_key_scale != nullptr) c_.grad_key_scale[j] = along;
        narrow(buffers_.output, c_.dtype, j, c_.d, c_.grad_key);
    }
}

template <class Call>
std::size_t workspace_bytes(const Call& call) {
    return with_path(call.dtype, [&](auto path) {
        return Sweep<typename decltype(path)::type, Call>(call, 0).bytes();
    });
}

template <class Call>
void run(const Call& call, Team* team) {
    with_path(call.dtype, [&](auto path) {
        using Path = typename decltype(path)::type;
        const PathScope<Path> scope;
        Sweep<Path, Call>(call, team->rank).run(team);
    });
}

}  // namespace
}  // namespace ssl_fast
