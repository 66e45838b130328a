// From pairs of neighbours, each found once, to edges in both directions: by receiver and length, and by sender. On the
// CPU, by one thread: it serves structures of some thousand pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "number.h"

namespace mf {

// An edge while a receiver's are sorted: the bits of its length in float32, which sort as the length does, above its
// number. That is twice the pair's, and one more where the second atom receives.
typedef std::uint64_t Key;

struct Pairs {
    const long long* atoms;  // [count, 2], first and second
    const int* images;       // [count, 3], of the second atom
    index_t count;
    const double* positions;
    const double* cells;
    const long long* graph;  // of each atom; null: all belong to the first

    int receiver(Key edge) const { return int(atoms[edge & 0xffffffff]); }
    int sender(Key edge) const { return int(atoms[(edge & 0xffffffff) ^ 1]); }

    // The vector of an edge is positions[receiver] - positions[sender] + image @ cell.
    void image(Key edge, int* to) const {
        const int* of = images + 3 * ((edge & 0xffffffff) >> 1);
        for (int axis = 0; axis < 3; ++axis) to[axis] = edge & 1 ? of[axis] : -of[axis];
    }

    void shift(index_t pair, double* to) const {
        const int* of = images + 3 * pair;
        const double* cell = cells + (graph ? 9 * graph[atoms[2 * pair]] : 0);
        for (int c = 0; c < 3; ++c) to[c] = of[0] * cell[c] + of[1] * cell[3 + c] + of[2] * cell[6 + c];
    }

    std::uint32_t length_bits(index_t pair) const {
        double of[3];
        shift(pair, of);
        const double *from = positions + 3 * atoms[2 * pair], *to = positions + 3 * atoms[2 * pair + 1];
        const double x = to[0] - from[0] + of[0], y = to[1] - from[1] + of[1], z = to[2] - from[2] + of[2];
        const float length = float(std::sqrt(x * x + y * y + z * z));
        std::uint32_t bits;
        std::memcpy(&bits, &length, sizeof bits);
        return bits & 0x7fffffff;  // what is not a number may have a sign
    }

    // Among edges of one receiver and length the order is that of sender and image, as searches on a GPU have it.
    bool before(Key a, Key b) const {
        if (sender(a) != sender(b)) return sender(a) < sender(b);
        int of_a[3], of_b[3];
        image(a, of_a);
        image(b, of_b);
        for (int axis = 0; axis < 3; ++axis)
            if (of_a[axis] != of_b[axis]) return (of_a[axis] & IMAGE_MASK) < (of_b[axis] & IMAGE_MASK);
        return false;
    }
};

inline void sort_edges(Key* begin, Key* end, const Pairs& pairs) {
    std::sort(begin, end);
    for (Key* first = begin; first < end;) {
        Key* last = first + 1;
        while (last < end && *last >> 32 == *first >> 32) ++last;
        if (last - first > 1) std::sort(first, last, [&](Key a, Key b) { return pairs.before(a, b); });
        first = last;
    }
}

// False, with nothing written, if an atom of a pair is outside [0, nodes). The pairs' two directions make as many edges
// that enter an atom as that leave it, so `row` [nodes + 1] serves both.
inline bool edge_lists(const Pairs& pairs, index_t nodes, const long long* species, const int* place, int present,
                       int* sender, int* receiver, int* row, int* sender_order, int* sender_species, int* table,
                       int* images, double* shifts) {
    const index_t edges = 2 * pairs.count;
    for (index_t e = 0; e < edges; ++e)
        if (pairs.atoms[e] < 0 || pairs.atoms[e] >= nodes) return false;
    for (index_t n = 0; n <= nodes; ++n) row[n] = 0;
    for (index_t e = 0; e < edges; ++e) ++row[pairs.atoms[e] + 1];
    for (index_t n = 0; n < nodes; ++n) row[n + 1] += row[n];
    std::vector<int> next(row, row + nodes);
    std::vector<Key> sorted(edges);
    for (index_t pair = 0; pair < pairs.count; ++pair) {
        const Key length = Key(pairs.length_bits(pair)) << 32;
        for (Key edge = 2 * Key(pair); edge < 2 * Key(pair) + 2; ++edge)
            sorted[next[pairs.receiver(edge)]++] = length | edge;
    }
    next.assign(row, row + nodes);
    for (index_t n = 0; n < nodes; ++n) {
        sort_edges(sorted.data() + row[n], sorted.data() + row[n + 1], pairs);
        for (index_t e = row[n]; e < row[n + 1]; ++e) {
            const Key edge = sorted[e];
            const int from = pairs.sender(edge);
            sender[e] = from;
            receiver[e] = int(n);
            sender_order[next[from]++] = int(e);
            sender_species[e] = int(species[from]);
            if (table) table[e] = place[species[from]] * present + place[species[n]];
            pairs.image(edge, images + 3 * e);
            double* shift = shifts + 3 * e;
            pairs.shift((edge & 0xffffffff) >> 1, shift);
            if (!(edge & 1))
                for (int c = 0; c < 3; ++c) shift[c] = -shift[c];
        }
    }
    return true;
}

}  // namespace mf
