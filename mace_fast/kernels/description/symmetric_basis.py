"""A sparse basis of the polynomials that the paths of a symmetric contraction span. NumPy, float64."""

from __future__ import annotations

import numpy as np

__all__ = ["path_basis", "symmetrise"]

# Singular values of the path matrix relative to the largest: those of independent paths are above 0.1 in
# every MACE basis (l up to 4, correlation up to 4), those of dependent ones at the rounding error. Values
# between the two mean that U is not what it claims to be, and nothing may be dropped.
_INDEPENDENT = 1e-3
_ROUNDING = {True: 1e-12, False: 3e-6}  # U exact to float64, or rounded to float32


def symmetrise(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the entries of U that multiply the same monomial.

    Args:
        u: [2l+1, M, ..., M, K].

    Returns:
        The matrix [K, P] of coefficients in float64, and int64 [P, 1 + nu]: the output component and the
        ascending components of x of each column. Columns are in lexicographic order; exact zeros of U make no
        column.
    """
    num_paths = u.shape[-1]
    entries = np.nonzero(u)
    places = np.stack(entries[:-1], axis=1)
    places[:, 1:].sort(axis=1)
    columns, inverse = np.unique(places, axis=0, return_inverse=True)
    flat = entries[-1] * len(columns) + inverse.reshape(-1)
    sums = np.bincount(flat, weights=u[entries].astype(np.float64), minlength=num_paths * len(columns))
    return sums.reshape(num_paths, len(columns)), columns


def path_basis(paths: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Factor ``paths = fold @ basis`` with a sparse basis.

    Args:
        paths: [K, P], float64.
        exact: whether the entries are exact to float64, or carry rounding errors of float32 that may be
            removed.

    Returns:
        fold [K, R] and basis [R, P], float64. R is the rank of ``paths``, or P (single monomials) where
        ``paths`` is not clearly of lower rank to the accuracy asked for.
    """
    size = np.abs(paths).max(initial=0.0)
    if size == 0.0:
        return np.zeros((len(paths), 0)), np.zeros((0, paths.shape[1]))
    rounding = _ROUNDING[exact]
    _, values, right = np.linalg.svd(paths, full_matrices=False)
    rank = int((values > _INDEPENDENT * values[0]).sum())
    if rank == len(values) or values[rank] <= rounding * values[0]:
        basis = _sparse_rows(right[:rank], 10 * rounding)
        fold = np.linalg.lstsq(basis.T, paths.T, rcond=None)[0].T
        fold[np.abs(fold) <= rounding * np.abs(fold).max()] = 0.0
        if np.abs(paths - fold @ basis).max() <= rounding * size:
            return fold, basis
    used = np.flatnonzero(np.abs(paths).max(axis=0) > 0.0)
    return paths[:, used], np.eye(paths.shape[1])[used]


def _sparse_rows(rows: np.ndarray, zero: float) -> np.ndarray:
    """Rows of the same span with an identity at chosen pivot columns, pivots chosen for few non-zeros.

    Every row operation of the reduced form respects a direct sum of the span into spaces with disjoint
    columns (the different (l1, l2, l3) of a monomial), so the form falls into small blocks; each is then
    improved on its own.
    """
    reduced, pivots = _reduced_rows(rows, zero)
    for block in _connected_rows(reduced):
        columns = np.flatnonzero(np.abs(reduced[block]).max(axis=0))
        reduced[np.ix_(block, columns)] = _fewest_terms(reduced[np.ix_(block, columns)], zero)
    return reduced


def _reduced_rows(rows: np.ndarray, zero: float) -> tuple[np.ndarray, list[int]]:
    """Gauss-Jordan elimination with complete pivoting."""
    reduced = rows.copy()
    pivots = []
    for step in range(len(reduced)):
        rest = np.abs(reduced[step:])
        # of nearly equal candidates the first, so that rounding does not choose
        row, column = divmod(int(np.argmax(rest > 0.999 * rest.max())), rest.shape[1])
        reduced[[step, step + row]] = reduced[[step + row, step]]
        reduced[step] /= reduced[step, column]
        for other in range(len(reduced)):
            if other != step:
                reduced[other] -= reduced[other, column] * reduced[step]
        pivots.append(column)
    reduced[np.abs(reduced) <= zero] = 0.0
    return reduced, pivots


def _connected_rows(matrix: np.ndarray) -> list[np.ndarray]:
    """Sets of rows that share columns, directly or through others."""
    touches = (matrix != 0.0).astype(np.int64)
    linked = (touches @ touches.T) > 0
    label = np.arange(len(matrix))
    for _ in range(len(matrix)):
        label = np.where(linked, label[None, :], len(matrix)).min(axis=1)
    return [np.flatnonzero(label == name) for name in np.unique(label)]


def _fewest_terms(block: np.ndarray, zero: float, largest: float = 3.0) -> np.ndarray:
    """Exchange pivots one at a time while that removes non-zeros and keeps entries at most ``largest``."""
    best = block
    improved = True
    while improved:
        improved = False
        for row in range(len(block)):
            for column in range(block.shape[1]):
                if abs(best[row, column]) < 1.0 / largest:
                    continue
                pivot = best[row] / best[row, column]
                trial = best - np.outer(best[:, column], pivot)
                trial[row] = pivot
                trial[np.abs(trial) <= zero] = 0.0
                fewer = np.count_nonzero(trial) < np.count_nonzero(best)
                if fewer and np.abs(trial).max() <= largest:
                    best, improved = trial, True
    return best
