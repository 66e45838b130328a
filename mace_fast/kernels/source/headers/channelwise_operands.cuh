// What the kernels of channelwise_conv.cuh are called with, and the lists that the generated `Segment` is made of.
#pragma once
#include "number.h"

namespace mf {

template <int INDEX, class First, class... Rest> struct ItemAt { typedef typename ItemAt<INDEX - 1, Rest...>::type type; };
template <class First, class... Rest> struct ItemAt<0, First, Rest...> { typedef First type; };
template <class... Items> struct List {
    template <class F> MF_INLINE static void each(F&& f) { (f(Items{}), ...); }
    template <int INDEX> using At = ItemAt<INDEX, Items...>;
};

// Device pointers of a graph sorted by receiver, without copying it: position -> edge through `order`.
// A null `order`, `row` or `sender` stands for the identity (no graph: sample e is its own sender and receiver).
struct Graph {
    const int* order;
    const int* row;
    const int* sender;
    const int* receiver;
    const float* poison;  // 0, or NaN when an index was out of range: every result then is NaN
    index_t receivers;
    index_t run;     // receivers that one group works through
    index_t groups;  // that work through receivers; those after them have windows
    index_t limit;   // edges of a receiver beyond which they are left to windows
    int parts;       // groups that share a receiver or window; run is 1 where there are several
    MF_INLINE index_t begin(index_t n) const { return row ? row[n] : n; }
    MF_INLINE index_t edge(index_t position) const { return order ? order[position] : position; }
    MF_INLINE index_t sender_of(index_t e) const { return sender ? sender[e] : e; }
};

template <class T> struct Operands {
    const T *x, *y, *w;
    index_t x_row, y_row, w_row;  // elements from one node or edge to the next; w_row = 0: one set of weights for all
};

// Weights as functions of the edge length instead of numbers per edge: see spline.h. A null radius: no spline.
template <class T> struct Spline {
    const T* radius;   // [edges]
    const int* table;  // [edges], which of several tables; null when there is one
    const T* rows;     // [tables * (intervals + 1), ORDER, NUMEL]
    index_t intervals;
    T per_length;  // intervals per unit of length
};

}  // namespace mf
