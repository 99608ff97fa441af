#pragma once
// The epilogues of the sweep: what becomes of a panel of logits while it is in L1.

#include "cpu/sweep.h"

namespace ssl_fast {
namespace {

template <class Path, class Call>
void Sweep<Path, Call>::softmax(int64_t sub, int row, const Block& panel, float* tile,
                                float* logits, SubBlock& own) {
    if (c_.pass == Pass::forward && c_.diagonal_logit != nullptr)
        on_diagonal(c_.exclusion, panel, tile, [&](int64_t lane, float& logit) {
            c_.diagonal_logit[panel.query + lane] = logit * LN2;
        });
    exclude(c_.exclusion, own.ids[0], LANES, panel, tile);
    if (c_.pass == Pass::backward) {
        given_weights(tile, panel.rows, given(panel, own));
        if (c_.diagonal_grad != nullptr)
            on_diagonal(c_.exclusion, panel, tile, [&](int64_t lane, float& weight) {
                weight = c_.diagonal_grad[panel.query + lane];
            });
        return;
    }
    if (columns_asked_) {
        if (panel.queries < LANES) fill_lanes(tile, panel.rows, panel.queries, -__builtin_inff());
        const int64_t at = (1 + sub) * width_ + panel.key;
        column_part(tile, panel.rows, column_reference_ + at, column_sum_ + at);
    }
    alignas(64) float correction[LANES];
    if (!strip_ && !accumulate_) {
        online_softmax<false>(tile, panel.rows, own.statistics(), correction);
    } else if (online_softmax<true>(tile, panel.rows, own.statistics(), correction)) {
        rescale(correction, row, logits);
        // Before the first group the key sum is still zero.
        if (accumulate_ && panel.key - row > 0)
            rescale(correction, Path::key_sum_rows(c_.d), own.key_sum);
    }
}

// The positive's pair is taken out, and its weight, sigmoid - 1, put in by a formula that
// doesn't cancel.
template <class Path, class Call>
void Sweep<Path, Call>::sigmoid(const Block& panel, float* tile, SubBlock& own) {
    const float bias = *c_.bias;
    on_diagonal(c_.exclusion, panel, tile,
                [&](int64_t lane, float& logit) { own.positive[lane] = logit * LN2 + bias; });
    exclude(c_.exclusion, nullptr, 0, panel, tile);
    sigmoid_weights(tile, panel.rows, bias * LOG2E, own.row_grad, {own.sum, own.lost, own.weight});
    on_diagonal(c_.exclusion, panel, tile, [&](int64_t lane, float& weight) {
        const Sigmoid of_negative = sigmoid_of(-own.positive[lane]);
        weight = -of_negative.value * own.row_grad[lane];
        own.weight[lane] += weight;
        own.sum[lane] += of_negative.softplus;
    });
}

// The parts that a row block's sub-blocks left for a group of keys, in their order.
template <class Path, class Call>
void Sweep<Path, Call>::merge_group(int64_t group, int64_t block, int64_t subs) {
    float* reference = column_reference_ + group * GROUP;
    float* sum = column_sum_ + group * GROUP;
    for (int j = 0; block == 0 && j < GROUP; ++j) {
        reference[j] = -LARGEST;
        sum[j] = 0.0f;
    }
    for (int64_t sub = 0; sub < subs; ++sub)
        merge_columns(reference + (1 + sub) * width_, sum + (1 + sub) * width_, GROUP, reference,
                      sum);
    if (block + 1 < blocks()) return;
    for (int64_t j = 0; j < keys_.block(group).keys; ++j)
        c_.column_lse[group * GROUP + j] = row_terms(0.0f, reference[j], sum[j], 0.0f).lse;
}

template <class Path, class Call>
GivenWeights Sweep<Path, Call>::given(const Block& b, const SubBlock& own) const {
    if (c_.column_lse == nullptr) return {own.row_lse, own.row_grad, nullptr, nullptr};
    for (int row = 0; row < b.rows; ++row) {
        const int64_t j = b.key + row;
        const GivenRow column =
            row < b.keys ? given_row(c_.column_lse[j], c_.column_grad[j]) : GivenRow{0.0f, 0.0f};
        columns_[row] = column.lse;
        columns_[GROUP + row] = column.grad;
    }
    return {own.row_lse, own.row_grad, columns_, columns_ + GROUP};
}

}  // namespace
}  // namespace ssl_fast
