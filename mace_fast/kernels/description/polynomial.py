"""Polynomials with species weights: what MACE's symmetric contraction computes, described without torch.

For node n, channel c and output component o, MACE evaluates (Batatia et al., NeurIPS 2022, eq. 10 and 11)

    out[n, o, c] = sum_nu,k W_nu[species(n), k, c] sum_m1.. U_nu[o, m1.., k] x[n, m1, c] x[n, m2, c] ...

Only the part of U that is symmetric in m1..m_nu contributes, so the K paths of one (output, nu) span a space
of much smaller dimension R (51 paths span 12 dimensions for 1o at correlation 3 and l up to 3). The
description keeps

    A[k, (o, monomial)]  =  fold[k, r]  basis[r, (o, monomial)]

with a sparse ``basis``: every basis polynomial has coefficient one at a monomial of its own, where the others
have zero. Kernels evaluate the basis polynomials with the folded weights

    W'[z, r, c] = sum_k fold[k, r] W[z, k, c].
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels.description.symmetric_basis import path_basis, symmetrise

__all__ = ["SymmetricContraction", "Term", "WeightedPolynomial"]


@dataclass(frozen=True, order=True)
class Term:
    """``coefficient * weights[weight] * prod(x[m] for m in monomial)``, added to component ``output``.

    Attributes:
        output: component of the output, 0 <= output < num_outputs.
        weight: index into the weights, 0 <= weight < num_weights.
        monomial: components of x, ascending, with repetition; its length is the degree.
        coefficient: float64.
    """

    output: int
    weight: int
    monomial: tuple[int, ...]
    coefficient: float


@dataclass(frozen=True)
class WeightedPolynomial:
    """``out[o] = sum_terms coefficient * w[weight] * prod x[monomial]``: polynomial in x, linear in w.

    Attributes:
        input_blocks: sizes 2l+1 of the irreps that x consists of, in order; M is their sum.
        output_blocks: sizes 2l+1 of the irreps of the output, in order; O is their sum.
        num_weights: R.
        terms: sorted, without repeated (output, weight, monomial).

    Raises:
        ValueError: a term refers to a component or weight that does not exist, is repeated, or is not sorted.
    """

    input_blocks: tuple[int, ...]
    output_blocks: tuple[int, ...]
    num_weights: int
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        previous: tuple[int, int, tuple[int, ...]] | None = None
        for term in self.terms:
            place = (term.output, term.weight, term.monomial)
            if previous is not None and place <= previous:
                raise ValueError(f"terms must be sorted and distinct; {place} follows {previous}")
            previous = place
            if not 0 <= term.output < self.num_outputs or not 0 <= term.weight < self.num_weights:
                raise ValueError(f"{term} is out of range: {self.num_outputs} outputs, {self.num_weights} weights")
            if not term.monomial or tuple(sorted(term.monomial)) != term.monomial:
                raise ValueError(f"{term}: a monomial lists at least one component, ascending")
            if term.monomial[0] < 0 or term.monomial[-1] >= self.num_inputs:
                raise ValueError(f"{term} is out of range: x has {self.num_inputs} components")

    @property
    def num_inputs(self) -> int:
        """M, the number of components of x."""
        return sum(self.input_blocks)

    @property
    def num_outputs(self) -> int:
        """O, the number of components of the output."""
        return sum(self.output_blocks)

    @cached_property
    def degree(self) -> int:
        """Largest degree of a monomial; 0 if there is no term."""
        return max((len(term.monomial) for term in self.terms), default=0)

    @cached_property
    def key(self) -> str:
        """Everything there is to the polynomial as one string (JSON, deflated, base64).

        Ops receive this string. It is complete, not a digest of something registered elsewhere, so that an
        exported program or a pickled module works in a process that never saw this object.
        """
        columns = list(zip(*((t.output, t.weight, t.monomial, t.coefficient.hex()) for t in self.terms), strict=True))
        data = [self.input_blocks, self.output_blocks, self.num_weights, columns]
        return _pack(json.dumps(data, separators=(",", ":")).encode())

    @staticmethod
    def from_key(key: str) -> WeightedPolynomial:
        """Inverse of ``key``. Raises ValueError for a string that is not a key."""
        inputs, outputs, num_weights, columns = json.loads(_unpack(key))
        terms = tuple(Term(o, w, tuple(m), float.fromhex(c)) for o, w, m, c in zip(*columns, strict=True))
        return WeightedPolynomial(tuple(inputs), tuple(outputs), num_weights, terms)

    def __str__(self) -> str:
        return (
            f"polynomial of degree {self.degree}, {self.num_inputs} components (blocks {self.input_blocks}), "
            f"{self.num_outputs} outputs (blocks {self.output_blocks}), {self.num_weights} weights, "
            f"{len(self.terms)} terms"
        )


@dataclass(frozen=True)
class SymmetricContraction:
    """A symmetric contraction: folding of the path weights, then a weighted polynomial.

    Weights [Z, K, C] of all outputs and correlations are concatenated along K: outputs in order, and within
    an output nu = correlation, correlation - 1, ..., 1, which is MACE's ``[weights_max, *weights]`` of each
    ``Contraction``.

    Attributes:
        polynomial: the basis polynomials.
        fold_bytes: the matrix [K, R] as little-endian float64, row-major (bytes, to be hashable).
        path_counts: K of each (output, nu), in the order of the weights.
    """

    polynomial: WeightedPolynomial
    fold_bytes: bytes
    path_counts: tuple[tuple[int, ...], ...]

    @property
    def num_paths(self) -> int:
        """K, the number of path weights per species and channel."""
        return sum(sum(counts) for counts in self.path_counts)

    @property
    def num_inputs(self) -> int:
        """M, the number of components of x."""
        return self.polynomial.num_inputs

    @property
    def num_outputs(self) -> int:
        """O, the number of components of the output."""
        return self.polynomial.num_outputs

    @property
    def fold(self) -> np.ndarray:
        """The matrix [K, R], float64, with ``W' = einsum('kr,zkc->zrc', fold, W)``."""
        matrix = np.frombuffer(self.fold_bytes, dtype="<f8")
        return matrix.reshape(self.num_paths, self.polynomial.num_weights)

    @cached_property
    def key(self) -> str:
        """Everything there is to the contraction as one string, like ``WeightedPolynomial.key``."""
        fold = base64.b64encode(self.fold_bytes).decode()
        return _pack(json.dumps([self.polynomial.key, self.path_counts, fold], separators=(",", ":")).encode())

    @staticmethod
    def from_key(key: str) -> SymmetricContraction:
        """Inverse of ``key``. Raises ValueError for a string that is not a key."""
        polynomial, counts, fold = json.loads(_unpack(key))
        path_counts = tuple(tuple(c) for c in counts)
        return SymmetricContraction(WeightedPolynomial.from_key(polynomial), base64.b64decode(fold), path_counts)

    @staticmethod
    def from_u_matrices(
        u_matrices: Sequence[Sequence[np.ndarray]],
        input_blocks: Sequence[int],
        output_blocks: Sequence[int],
    ) -> SymmetricContraction:
        """Description of MACE's SymmetricContraction, from the U matrices that a module holds.

        For a live module ``sc`` of mace-torch::

            u_matrices = [[c.U_tensors(nu).cpu().numpy() for nu in range(c.correlation, 0, -1)] for c in
            sc.contractions] input_blocks = [ir.dim for _, ir in sc.contractions[0].coupling_irreps]
            output_blocks = [ir.dim for _, ir in sc.irreps_out] weights = torch.cat([w for c in
            sc.contractions for w in (c.weights_max, *c.weights)], dim=1)

        The dtype of a matrix says how exact it is. float32 matrices are the exact ones with rounding errors,
        which are removed together with the linear dependence of the paths. float64 matrices must be
        reproduced to float64 accuracy: where they carry float32 rounding errors (a float32 model that was
        converted to float64), the paths are independent in a strict sense, and the basis becomes that of
        single monomials, one weight for each: exact for any U, but with more weights to read.

        Args:
            u_matrices: for each output irrep, for nu = correlation, ..., 1, the matrix [2l+1, M, ..., M, K]
                (without the first axis where 2l+1 = 1), float32 or float64.
            input_blocks: 2l+1 of each irrep of x.
            output_blocks: 2l+1 of each output irrep.

        Raises:
            ValueError: the number or a shape of the matrices does not fit the blocks.
            TypeError: a matrix is neither float32 nor float64.
            UnsupportedDescriptionError: a matrix holds infinities or not-a-numbers.
        """
        num_inputs = sum(input_blocks)
        if len(u_matrices) != len(output_blocks):
            raise ValueError(f"{len(u_matrices)} lists of U matrices for {len(output_blocks)} output blocks")
        terms: list[Term] = []
        folds: list[np.ndarray] = []
        path_counts: list[tuple[int, ...]] = []
        num_weights = 0
        first_output = 0
        for index, (matrices, dim) in enumerate(zip(u_matrices, output_blocks, strict=True)):
            counts = []
            for position, u in enumerate(matrices):
                name = f"u_matrices[{index}][{position}]"
                nu = len(matrices) - position
                if u.dtype not in (np.float32, np.float64):
                    raise TypeError(f"{name} is {u.dtype}; expected float32 or float64")
                if u.ndim == 0 or u.size != dim * num_inputs**nu * u.shape[-1]:
                    raise ValueError(
                        f"{name} has shape {u.shape}; expected {(dim, *(num_inputs,) * nu)} and a path axis"
                    )
                if not np.isfinite(u).all():
                    raise UnsupportedDescriptionError(f"{name} holds values that are not finite")
                paths, places = symmetrise(u.reshape(dim, *(num_inputs,) * nu, u.shape[-1]))
                fold, basis = path_basis(paths, exact=u.dtype == np.float64)
                for r, column in zip(*np.nonzero(basis), strict=True):
                    output, *monomial = (int(i) for i in places[column])
                    terms.append(
                        Term(
                            first_output + output,
                            num_weights + int(r),
                            tuple(monomial),
                            float(basis[r, column]),
                        )
                    )
                folds.append(fold)
                counts.append(fold.shape[0])
                num_weights += basis.shape[0]
            path_counts.append(tuple(counts))
            first_output += dim
        polynomial = WeightedPolynomial(tuple(input_blocks), tuple(output_blocks), num_weights, tuple(sorted(terms)))
        return SymmetricContraction(polynomial, _block_diagonal(folds).astype("<f8").tobytes(), tuple(path_counts))

    def __str__(self) -> str:
        return f"symmetric contraction of {self.num_paths} paths: {self.polynomial}"


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    result = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row += block.shape[0]
        column += block.shape[1]
    return result


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpack(key: str) -> bytes:
    try:
        return zlib.decompress(base64.b64decode(key, validate=True))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"not the key of a description: {key[:40]!r}") from error
