#pragma once
// The best of a list, and its order, without the STL (csrc/README.md).

#include <cstdint>

namespace ssl_fast {
namespace {

struct Entry {
    float key;
    int32_t index;
};

// Higher keys first, then lower indices: no two entries are alike.
struct HigherKey {
    static bool before(const Entry& a, const Entry& b) {
        return a.key > b.key || (a.key == b.key && a.index < b.index);
    }
};
// Lower keys first, then lower indices; NaN last.
struct LowerKey {
    static bool before(const Entry& a, const Entry& b) {
        const bool a_nan = a.key != a.key, b_nan = b.key != b.key;
        if (a_nan || b_nan) return a_nan != b_nan ? b_nan : a.index < b.index;
        return a.key < b.key || (a.key == b.key && a.index < b.index);
    }
};

inline void swap(Entry& a, Entry& b) {
    const Entry t = a;
    a = b;
    b = t;
}

// The first `keep` of `count` entries, in any order, to the front: Hoare's selection.
template <class Order>
void select(Entry* entries, int64_t count, int64_t keep) {
    int64_t low = 0, high = count - 1;
    const int64_t wanted = keep - 1;
    while (low < high) {
        Entry &a = entries[low], &b = entries[low + (high - low) / 2], &c = entries[high];
        if (Order::before(b, a)) swap(a, b);
        if (Order::before(c, b)) swap(b, c);
        if (Order::before(b, a)) swap(a, b);
        const Entry pivot = b;
        int64_t i = low, j = high;
        while (i <= j) {
            while (Order::before(entries[i], pivot)) ++i;
            while (Order::before(pivot, entries[j])) --j;
            if (i <= j) swap(entries[i++], entries[j--]);
        }
        if (wanted <= j)
            high = j;
        else if (wanted >= i)
            low = i;
        else
            return;
    }
}

// Heapsort.
template <class Order>
void sort(Entry* entries, int64_t count) {
    const auto sift = [entries](int64_t parent, int64_t end) {
        const Entry moved = entries[parent];
        for (int64_t child; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && Order::before(entries[child], entries[child + 1])) ++child;
            if (!Order::before(moved, entries[child])) break;
            entries[parent] = entries[child];
        }
        entries[parent] = moved;
    };
    for (int64_t parent = count / 2 - 1; parent >= 0; --parent) sift(parent, count);
    for (int64_t end = count - 1; end > 0; --end) {
        swap(entries[0], entries[end]);
        sift(0, end);
    }
}

}  // namespace
}  // namespace ssl_fast
