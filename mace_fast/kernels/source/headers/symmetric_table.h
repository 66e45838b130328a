// A weighted polynomial as tables, for polynomials that would make too much straight-line text.
//
// Monomials are padded to one degree D with the constant component, so that one loop nest serves all:
//
//     groups[g]   the first D - 1 components of a monomial; its leaves end at leaves_end
//     leaves[l]   the last component; its entries end at entries_end
//     entries[e]  coefficient, weight, output
//
// `Tables` is generated. Its components are indexed at run time, so x and dx live in local memory, which every
// thread reads at the same index: coalesced, and in the first-level cache.
#pragma once

#include "symmetric_node.h"

namespace mf {

template <class T> struct Entry {
    T coefficient;
    int weight, output;
};
struct Leaf {
    int component, entries_end;
};
template <int PREFIX> struct Group {
    int component[PREFIX], leaves_end;
};

template <class Tables> struct TablePolynomial {
    static constexpr int inputs = Tables::inputs, outputs = Tables::outputs, weights = Tables::weights;
    static constexpr int prefix = Tables::prefix;

    template <class X, class Sum> static MF_INLINE void evaluate(const X* x, Sum& sum) {
        for (int group = 0, leaf = 0, entry = 0; group < Tables::num_groups; ++group) {
            const auto& g = Tables::group(group);
            X q = x[g.component[0]];
            for (int j = 1; j < prefix; ++j) q = q * x[g.component[j]];
            for (; leaf < g.leaves_end; ++leaf) {
                const auto& l = Tables::leaf(leaf);
                const X monomial = q * x[l.component];
                for (; entry < l.entries_end; ++entry) {
                    const auto& e = Tables::entry(entry);
                    sum.add(e.weight, e.output, e.coefficient * monomial);
                }
            }
        }
    }

    template <class X, class P> static MF_INLINE void gradient(const X* x, X* dx, const P& pull) {
        for (int group = 0, leaf = 0, entry = 0; group < Tables::num_groups; ++group) {
            const auto& g = Tables::group(group);
            X q = x[g.component[0]];
            for (int j = 1; j < prefix; ++j) q = q * x[g.component[j]];
            X t = {};
            for (; leaf < g.leaves_end; ++leaf) {
                const auto& l = Tables::leaf(leaf);
                auto c = pull(0, 0) * 0;
                for (; entry < l.entries_end; ++entry) {
                    const auto& e = Tables::entry(entry);
                    c += e.coefficient * pull(e.weight, e.output);
                }
                t += c * x[l.component];
                dx[l.component] += q * c;
            }
            for (int j = 0; j < prefix; ++j) {
                X others = t;
                for (int i = 0; i < prefix; ++i)
                    if (i != j) others = others * x[g.component[i]];
                dx[g.component[j]] += others;
            }
        }
    }
};

}  // namespace mf
