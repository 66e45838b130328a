// Length and spherical harmonics of one edge vector, and the gradient with respect to the vector. The polynomials
// problem::harmonics and problem::reverse are generated.
#pragma once

namespace mf {

MF_INLINE problem::T unit_vector(const problem::T* vector, problem::T* u) {
    const problem::T r = sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2]);
    for (int a = 0; a < 3; ++a) u[a] = vector[a] / r;
    return r;
}

MF_INLINE void edge_forward(const problem::T* vector, problem::T* radius, problem::T* y) {
    problem::T u[3], Y[problem::COUNT];
    *radius = unit_vector(vector, u);
    problem::harmonics(u, Y);
    for (int j = 0; j < problem::COUNT; ++j) y[j] = Y[j];
}

// Differences of positions are formed in float64: rounded once, they are right to the last bit anywhere in space.
MF_INLINE void edge_geometry(
    const double* positions, index_t sender, index_t receiver, const double* shift, problem::T* vector,
    problem::T* radius, problem::T* y) {
    for (int a = 0; a < 3; ++a)
        vector[a] = problem::T((positions[3 * receiver + a] - positions[3 * sender + a]) + shift[a]);
    edge_forward(vector, radius, y);
}

// The gradient with respect to the unit vector loses its part along the vector, where the gradient of the length acts.
MF_INLINE void edge_backward(const problem::T* vector, const problem::T* dy, problem::T dradius, problem::T* dvector) {
    typedef problem::T T;
    T u[3], Y[problem::COUNT], g[problem::COUNT], down[3] = {T(0), T(0), T(0)};
    const T r = unit_vector(vector, u);
    problem::harmonics(u, Y);
    for (int j = 0; j < problem::COUNT; ++j) g[j] = dy[j];
    problem::reverse(Y, g, down);
    T along = T(0);
    for (int a = 0; a < 3; ++a) along += u[a] * problem::FIRST * down[a];
    for (int a = 0; a < 3; ++a) dvector[a] = (problem::FIRST * down[a] - u[a] * along) / r + u[a] * dradius;
}

}  // namespace mf
