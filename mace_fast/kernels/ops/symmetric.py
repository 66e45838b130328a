"""torch ops for MACE's symmetric contraction: a folding of path weights, a polynomial with species weights.

With f(x, w) the polynomial (linear in w) and g a cotangent of its value, the ops are

    value        f(x, w)
    gradient     of <g, f(x, w)> with respect to x
    weights      gradient of <g, f(x, w)> with respect to w: a sum over the nodes of each species

and, with an optional tangent v, the derivative of each along x + epsilon v. The derivatives of the three, and
those of "value" and "weights" with a tangent, are made of the same ops; only "gradient" with a tangent
(already a second derivative) is not differentiated further.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.description.polynomial import SymmetricContraction, WeightedPolynomial
from mace_fast.kernels.ops.checks import require_ids, require_like, require_shape, require_values
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.ops.segment import csr
from mace_fast.kernels.plan.symmetric import SymmetricPlan, plan_symmetric
from mace_fast.kernels.source.symmetric import THREADS, symmetric_cpu, symmetric_cuda, weights_block

__all__ = ["describe_symmetric_plan", "fold_weights", "symmetric_contraction", "weighted_polynomial"]

# Nodes of one species that are summed one after the other in "weights"; more for many nodes, so that there
# are at most a few hundred partial sums.
_CHUNK = 16
_MOST_CHUNKS = 512

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define("symmetric_fold(Tensor weights, str key, bool transpose) -> Tensor")
_LIBRARY.define("symmetric_value(Tensor x, Tensor? tangent, Tensor weights, Tensor species, str key) -> Tensor")
_LIBRARY.define(
    "symmetric_gradient(Tensor x, Tensor? tangent, Tensor weights, Tensor species, Tensor grad, str key) -> Tensor"
)
_LIBRARY.define(
    "symmetric_weights(Tensor x, Tensor? tangent, Tensor species, Tensor grad, str key, int num_species) -> Tensor"
)


def symmetric_contraction(description: SymmetricContraction, x: Tensor, weights: Tensor, species: Tensor) -> Tensor:
    """MACE's symmetric contraction with one set of path weights per species.

    Args:
        description: built with `SymmetricContraction.from_u_matrices`.
        x: float32 or float64 [N, M, C], components before channels; any strides.
        weights: same dtype [Z, K, C], the paths of all outputs and correlations in the description's order.
        species: int32 or int64 [N], in [0, Z).

    Returns:
        [N, O, C]. Differentiable twice in x and weights. Bit for bit the same at every call.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument; on the CPU, a
            species out of range. On CUDA, where the host does not look, such a node's output is not-a-number.
        NotImplementedError: a third derivative with respect to x.
    """
    return weighted_polynomial(description.polynomial, x, fold_weights(description, weights), species)


def fold_weights(description: SymmetricContraction, weights: Tensor) -> Tensor:
    """Path weights as weights of the basis polynomials: [Z, K, C] -> [Z, R, C], computed in float64.

    Where the weights are frozen, do this once and call `weighted_polynomial`. Differentiable to any order.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.
    """
    folded: Tensor = torch.ops.mace_fast.symmetric_fold(weights, description.key, False)
    return folded


def weighted_polynomial(polynomial: WeightedPolynomial, x: Tensor, weights: Tensor, species: Tensor) -> Tensor:
    """`symmetric_contraction` with folded weights [Z, R, C]; arguments, result and errors as there."""
    out: Tensor = torch.ops.mace_fast.symmetric_value(x, None, weights, species, polynomial.key)
    return out


def describe_symmetric_plan(description: SymmetricContraction) -> SymmetricPlan:
    """The plan that the kernels of this description follow; ``print`` it to read the decision."""
    return plan_symmetric(description.polynomial)


@lru_cache(maxsize=256)
def _polynomial(key: str) -> WeightedPolynomial:
    return WeightedPolynomial.from_key(key)


# --- folding


@lru_cache(maxsize=256)
def _fold_shape(key: str, transpose: bool) -> tuple[int, int]:
    rows, columns = SymmetricContraction.from_key(key).fold.shape
    return (rows, columns) if transpose else (columns, rows)


@lru_cache(maxsize=256)
def _fold_matrix(key: str, transpose: bool, device: torch.device) -> Tensor:
    fold = torch.from_numpy(SymmetricContraction.from_key(key).fold.copy())
    return (fold if transpose else fold.T).contiguous().to(device)


def _check_fold(weights: Tensor, key: str, transpose: bool) -> tuple[int, int]:
    require_values("symmetric_fold", "weights", weights, 3)
    rows, columns = _fold_shape(key, transpose)
    require_shape("symmetric_fold", "weights", weights, (weights.shape[0], columns, weights.shape[2]))
    return rows, columns


def _fold(weights: Tensor, key: str, transpose: bool) -> Tensor:
    _check_fold(weights, key, transpose)
    matrix = _fold_matrix(key, transpose, weights.device)
    return torch.matmul(matrix, weights.to(torch.float64)).to(weights.dtype)


def _fold_fake(weights: Tensor, key: str, transpose: bool) -> Tensor:
    rows, _ = _check_fold(weights, key, transpose)
    return weights.new_empty(weights.shape[0], rows, weights.shape[2])


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.key, ctx.transpose = inputs


def _fold_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mace_fast.symmetric_fold(grad, ctx.key, not ctx.transpose), None, None


# --- checks


def _check_x(op: str, p: WeightedPolynomial, x: Tensor, tangent: Tensor | None, species: Tensor) -> None:
    require_values(op, "x", x, 3)
    require_shape(op, "x", x, (x.shape[0], p.num_inputs, x.shape[2]))
    if tangent is not None:
        require_like(op, "tangent", tangent, x, "x")
        require_shape(op, "tangent", tangent, tuple(x.shape))
    require_ids(op, "species", species, x.device)
    require_shape(op, "species", species, (x.shape[0],))


def _check_weights(op: str, p: WeightedPolynomial, x: Tensor, weights: Tensor) -> None:
    require_like(op, "weights", weights, x, "x")
    require_values(op, "weights", weights, 3)
    require_shape(op, "weights", weights, (weights.shape[0], p.num_weights, x.shape[2]))


def _check_grad(op: str, p: WeightedPolynomial, x: Tensor, grad: Tensor) -> None:
    require_like(op, "grad", grad, x, "x")
    require_shape(op, "grad", grad, (x.shape[0], p.num_outputs, x.shape[2]))


def _require_known_species(op: str, species: Tensor, num_species: int) -> None:
    if species.numel():
        low, high = (int(value) for value in torch.aminmax(species))
        if low < 0 or high >= num_species:
            raise ValueError(f"{op}: species has values from {low} to {high}, but there are weights for {num_species}")


# --- value and gradient


def _value(x: Tensor, tangent: Tensor | None, weights: Tensor, species: Tensor, key: str) -> Tensor:
    out = _value_fake(x, tangent, weights, species, key)
    return _run_node_kernel("evaluate", key, x, tangent, weights, species, None, out)


def _gradient(x: Tensor, tangent: Tensor | None, weights: Tensor, species: Tensor, grad: Tensor, key: str) -> Tensor:
    out = _gradient_fake(x, tangent, weights, species, grad, key)
    return _run_node_kernel("gradient", key, x, tangent, weights, species, grad, out)


def _run_node_kernel(
    kind: str,
    key: str,
    x: Tensor,
    tangent: Tensor | None,
    weights: Tensor,
    species: Tensor,
    grad: Tensor | None,
    out: Tensor,
) -> Tensor:
    nodes, _, channels = x.shape
    if not on_gpu(x):
        _require_known_species(f"symmetric_{kind}", species, weights.shape[0])
    if out.numel() == 0:
        return out
    if not _polynomial(key).terms or weights.shape[0] == 0:
        # without a species every node's is out of range, which only CUDA gets here with
        return out.fill_(float("nan") if weights.shape[0] == 0 else 0.0)
    arrays = [x.contiguous(), None if tangent is None else tangent.contiguous()]
    arrays += [weights.contiguous(), species.contiguous()]
    if grad is not None:
        arrays.append(grad.contiguous())
    arrays.append(out)
    values, ids = _name(x), _name(species)
    if on_gpu(x):
        module = _cuda_module(key, kind, tangent is not None, values, ids, x.device)
        grid = (-(-nodes * channels // THREADS), 1, 1)
        arguments = (*arrays, nodes, weights.shape[0], channels)
        module.launch(f"symmetric_{kind}", grid, (THREADS, 1, 1), 0, arguments)
    else:
        function = _cpu_function(key, kind, tangent is not None, values, ids)
        function(*(_pointer(array) for array in arrays), nodes, channels, cpu_threads())
    return out


def _value_fake(x: Tensor, tangent: Tensor | None, weights: Tensor, species: Tensor, key: str) -> Tensor:
    p = _polynomial(key)
    _check_x("symmetric_value", p, x, tangent, species)
    _check_weights("symmetric_value", p, x, weights)
    return x.new_empty(x.shape[0], p.num_outputs, x.shape[2])


def _gradient_fake(
    x: Tensor, tangent: Tensor | None, weights: Tensor, species: Tensor, grad: Tensor, key: str
) -> Tensor:
    p = _polynomial(key)
    _check_x("symmetric_gradient", p, x, tangent, species)
    _check_weights("symmetric_gradient", p, x, weights)
    _check_grad("symmetric_gradient", p, x, grad)
    return x.new_empty(x.shape)


# --- gradient with respect to the weights


def _weights(x: Tensor, tangent: Tensor | None, species: Tensor, grad: Tensor, key: str, num_species: int) -> Tensor:
    p = _polynomial(key)
    dw = _weights_fake(x, tangent, species, grad, key, num_species)
    nodes, _, channels = x.shape
    if not on_gpu(x):
        _require_known_species("symmetric_weights", species, num_species)
    if dw.numel() == 0 or nodes == 0:
        return dw.zero_()
    order, row_ptr = csr(species, num_species)
    length = max(_CHUNK, -(-nodes // _MOST_CHUNKS))
    most_chunks = nodes // length + min(num_species, nodes)
    partial = x.new_empty(most_chunks, p.num_weights, channels)
    arrays = [x.contiguous(), None if tangent is None else tangent.contiguous(), grad.contiguous()]
    arrays += [order, row_ptr, partial]
    values = _name(x)
    if on_gpu(x):
        module = _cuda_module(key, "weights", tangent is not None, values, "int64", x.device)
        threads, shared = weights_block(p, values, channels)
        grid = (most_chunks, -(-channels // threads), 1)
        arguments = (*arrays, num_species, channels, length)
        module.launch("symmetric_weights", grid, (threads, 1, 1), shared, arguments)
        row = p.num_weights * channels
        grid = (-(-row // THREADS), num_species, 1)
        module.launch("symmetric_weights_sum", grid, (THREADS, 1, 1), 0, (partial, row_ptr, dw, row, length))
    else:
        function = _cpu_function(key, "weights", tangent is not None, values, "int64")
        pointers = [_pointer(array) for array in (*arrays, dw)]
        function(*pointers, num_species, channels, length, cpu_threads())
    return dw


def _weights_fake(
    x: Tensor, tangent: Tensor | None, species: Tensor, grad: Tensor, key: str, num_species: int
) -> Tensor:
    p = _polynomial(key)
    _check_x("symmetric_weights", p, x, tangent, species)
    _check_grad("symmetric_weights", p, x, grad)
    return x.new_empty(num_species, p.num_weights, x.shape[2])


# --- kernels, found by the key: hashing a polynomial takes longer than a small kernel


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _cpu_function(key: str, kind: str, tangent: bool, values: str, ids: str) -> Any:
    source = symmetric_cpu(_polynomial(key), kind, tangent, values, ids)
    function = getattr(load_cpu(source), f"symmetric_{kind}")
    pointers = {"evaluate": 5, "gradient": 6, "weights": 7}[kind]
    numbers = 3 if kind == "weights" else 2
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_longlong] * numbers + [ctypes.c_int]
    function.restype = None
    return function


@cache
def _cuda_module(key: str, kind: str, tangent: bool, values: str, ids: str, device: torch.device) -> CudaModule:
    return load_cuda(symmetric_cuda(_polynomial(key), kind, tangent, values, ids), device)


# --- derivatives


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _value_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, tangent, weights, species = ctx.saved_tensors
    ops = torch.ops.mace_fast
    dx = dv = dw = None
    if ctx.needs_input_grad[0]:
        dx = ops.symmetric_gradient(x, tangent, weights, species, grad, ctx.key)
    if ctx.needs_input_grad[1]:
        dv = ops.symmetric_gradient(x, None, weights, species, grad, ctx.key)
    if ctx.needs_input_grad[2]:
        dw = ops.symmetric_weights(x, tangent, species, grad, ctx.key, weights.shape[0])
    return dx, dv, dw, None, None


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _gradient_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    # <u, gradient(x, w, g)> is <g, derivative of f along x + epsilon u>
    x, tangent, weights, species, grad = ctx.saved_tensors
    if tangent is not None:
        _refuse_third_derivative()
    ops = torch.ops.mace_fast
    dx = dw = dg = None
    if ctx.needs_input_grad[0]:
        dx = ops.symmetric_gradient(x, cotangent, weights, species, grad, ctx.key)
    if ctx.needs_input_grad[2]:
        dw = ops.symmetric_weights(x, cotangent, species, grad, ctx.key, weights.shape[0])
    if ctx.needs_input_grad[4]:
        dg = ops.symmetric_value(x, cotangent, weights, species, ctx.key)
    return dx, None, dw, None, dg, None


def _weights_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.key, _ = inputs
    ctx.save_for_backward(*tensors)


def _weights_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    # <u, weights(x, g)> is <g, f(x, u)>
    x, tangent, species, grad = ctx.saved_tensors
    ops = torch.ops.mace_fast
    dx = dv = dg = None
    if ctx.needs_input_grad[0]:
        dx = ops.symmetric_gradient(x, tangent, cotangent, species, grad, ctx.key)
    if ctx.needs_input_grad[1]:
        dv = ops.symmetric_gradient(x, None, cotangent, species, grad, ctx.key)
    if ctx.needs_input_grad[3]:
        dg = ops.symmetric_value(x, tangent, cotangent, species, ctx.key)
    return dx, dv, None, dg, None, None


def _refuse_third_derivative() -> NoReturn:
    raise NotImplementedError(
        "symmetric_contraction: third derivatives with respect to x are not implemented (first and second "
        "are); take them from the unconverted model, which restore() gives back"
    )


for _op, _function in (
    ("symmetric_fold", _fold),
    ("symmetric_value", _value),
    ("symmetric_gradient", _gradient),
    ("symmetric_weights", _weights),
):
    _LIBRARY.impl(_op, _function, "CPU")
    _LIBRARY.impl(_op, _function, "CUDA")

torch.library.register_fake("mace_fast::symmetric_fold", _fold_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::symmetric_value", _value_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::symmetric_gradient", _gradient_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::symmetric_weights", _weights_fake, lib=_LIBRARY)
torch.library.register_autograd("mace_fast::symmetric_fold", _fold_backward, setup_context=_fold_setup, lib=_LIBRARY)
torch.library.register_autograd("mace_fast::symmetric_value", _value_backward, setup_context=_value_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "mace_fast::symmetric_gradient", _gradient_backward, setup_context=_gradient_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "mace_fast::symmetric_weights", _weights_backward, setup_context=_weights_setup, lib=_LIBRARY
)
map_one_by_one("symmetric_fold", "symmetric_value", "symmetric_gradient", "symmetric_weights")
