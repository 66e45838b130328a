"""Converted and patched models keep everything that a module has: state, dtype, device, mode, hooks,
identity.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_patch_support import FLOAT64_TOLERANCE, assert_same, evaluate, small_model, structures

from mace_fast import zoo
from mace_fast.errors import UnsupportedModuleError
from mace_fast.patch import convert, patch, restore
from mace_fast.patch.blocks.base import FastModule

VARIANTS = ["base", "nonlinear_foundation"]


def _fast_names(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FastModule)]


def _pickled(model: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def _fingerprint(model: torch.nn.Module) -> dict[str, object]:
    """Everything that a conversion could disturb, by identity and by value."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[f"{name} module"] = (id(module), type(module), module.training)
        for key, value in module.__dict__.items():
            # TorchScript modules keep a bound forward once they have been called.
            if not isinstance(value, (dict, set)) and not isinstance(module, torch.jit.ScriptModule):
                seen[f"{name}.{key}"] = id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        gradient = None if tensor.grad is None else tensor.grad.clone()
        seen[f"{name} tensor"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor._version,
            tensor.requires_grad,
            tensor.dtype,
        )
        seen[f"{name} value"] = tensor.detach().clone()
        seen[f"{name} gradient"] = gradient
    return seen


def _assert_same_fingerprint(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key  # type: ignore[arg-type]
        else:
            assert value == b[key], key


@pytest.mark.parametrize("variant", VARIANTS)
def test_convert_leaves_the_original_alone(variant: str, rng: np.random.Generator) -> None:
    model = small_model(variant).train()
    model.interactions[0].eval()
    model.products[0].linear.weight.grad = torch.ones_like(model.products[0].linear.weight)
    model.readouts[0].requires_grad_(False)
    before = _fingerprint(model)
    fast = convert(model)
    _assert_same_fingerprint(_fingerprint(model), before)
    assert fast.training and not fast.interactions[0].training
    assert not any(p.requires_grad for p in fast.readouts[0].parameters())
    theirs = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert not any(id(t) in theirs for t in [*fast.parameters(), *fast.buffers()])


def test_convert_leaves_the_process_alone() -> None:
    """Random state and default dtype of torch are as before, also where the conversion is verified."""
    model = small_model(dtype=torch.float32)
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            convert(model)
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002


def test_fingerprint_sees_a_change() -> None:
    model = small_model()
    before = _fingerprint(model)
    with torch.no_grad():
        model.readouts[0].linear.weight[0] += 1e-9
    with pytest.raises(AssertionError):
        _assert_same_fingerprint(_fingerprint(model), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_patch_and_restore_bit_for_bit(variant: str, rng: np.random.Generator) -> None:
    model = small_model(variant)
    data = structures(model, rng)
    before, exact = _fingerprint(model), evaluate(model, data)
    originals = list(model.interactions) + list(model.products)
    assert patch(model) is model
    assert len(_fast_names(model)) == len(originals)
    assert all(a is not b for a, b in zip([*model.interactions, *model.products], originals, strict=True))
    assert_same(evaluate(model, data), exact, FLOAT64_TOLERANCE)
    assert restore(model) is model
    assert all(a is b for a, b in zip([*model.interactions, *model.products], originals, strict=True))
    _assert_same_fingerprint(_fingerprint(model), before)
    # Not to the bit: e3nn's TorchScript rounds otherwise once it has been called a few times and is optimised.
    assert_same(evaluate(model, data), exact, 1e-14)


def test_patching_twice_and_restoring_twice() -> None:
    model = small_model()
    first = model.interactions[0]
    patch(model, verify=False)
    blocks = list(model.interactions)
    patch(model)
    assert all(a is b for a, b in zip(model.interactions, blocks, strict=True))
    assert restore(restore(model)).interactions[0] is first


def test_convert_a_patched_model(rng: np.random.Generator) -> None:
    model = small_model()
    data = structures(model, rng)
    exact = evaluate(model, data)
    patch(model, verify=False)
    fast = convert(model)
    assert _fast_names(fast) == _fast_names(model)
    assert fast.interactions[0] is not model.interactions[0]
    assert fast.interactions[0]._memo is not model.interactions[0]._memo
    restore(model)
    assert not _fast_names(model) and _fast_names(fast)
    assert_same(evaluate(fast, data), exact, FLOAT64_TOLERANCE)


def test_patch_what_is_left(rng: np.random.Generator) -> None:
    """A model of which one block is fast already: the others follow and share its memo."""
    model = small_model()
    model.interactions[1] = convert(model.interactions[1], verify=False)
    exact = evaluate(restore(copy.deepcopy(model)), structures(model, np.random.default_rng(1)))
    patch(model, verify=False)
    memos = {id(m._memo) for m in model.modules() if isinstance(m, FastModule)}
    assert len(memos) == 1 and len(_fast_names(model)) == 4
    assert [m._leads for m in model.interactions] == [True, False]
    assert_same(evaluate(model, structures(model, np.random.default_rng(1))), exact, FLOAT64_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_keys_and_exchange(variant: str, rng: np.random.Generator) -> None:
    model, other = small_model(variant), small_model(variant, seed=5)
    data = structures(model, rng)
    fast = convert(model, verify=False)
    keys = list(model.state_dict())
    assert list(fast.state_dict()) == keys
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), model.state_dict().values(), strict=True))
    fast.load_state_dict(other.state_dict())  # from an original into a fast model
    assert_same(evaluate(fast, data), evaluate(other, data), FLOAT64_TOLERANCE)
    model.load_state_dict(fast.state_dict())  # and back
    assert_same(evaluate(model, data), evaluate(other, data), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_copies(variant: str, copied: Callable[[torch.nn.Module], torch.nn.Module], rng: np.random.Generator) -> None:
    model = small_model(variant)
    data = structures(model, rng)
    exact = evaluate(model, data)
    fast = convert(model, verify=False).eval()
    fast.interactions[0].train()
    evaluate(fast, data)  # fills the memo
    twin = copied(fast)
    assert list(twin.state_dict()) == list(fast.state_dict())
    assert [m.training for m in twin.modules()] == [m.training for m in fast.modules()]
    assert len({id(m._memo) for m in twin.modules() if isinstance(m, FastModule)}) == 1
    assert twin.interactions[0]._memo is not fast.interactions[0]._memo
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fast.parameters()}
    assert_same(evaluate(twin, data), exact, FLOAT64_TOLERANCE)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    assert_same(evaluate(twin, data), exact, FLOAT64_TOLERANCE)
    twin = twin.float().double()  # parameters of the copy and of the original it keeps aside are still the same
    assert_same(evaluate(restore(twin), data), exact, 1e-3)
    assert not _fast_names(twin)


def test_parameters_that_cannot_be_copied(rng: np.random.Generator) -> None:
    """Paths that no coupling allows have parameters of a class that deepcopy fails on: 1e out of 0e + 1o."""
    variant = replace(zoo.small_variants()["base"], hidden_irreps="8x0e+8x1e", max_ell=1, correlation=1)
    model = zoo.build(variant)
    frozen = {name for name, p in model.named_parameters() if type(p).__name__ == "EmptyParam"}
    assert frozen
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    data = structures(model, rng)
    exact = evaluate(model, data)
    fast = convert(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert {name for name, p in fast.named_parameters() if not p.requires_grad} == frozen
    for twin in (fast, copy.deepcopy(fast), _pickled(fast), patch(model)):
        assert_same(evaluate(twin, data), exact, FLOAT64_TOLERANCE)
    restore(model)
    assert {name for name, p in model.named_parameters() if type(p).__name__ == "EmptyParam"} == frozen


@pytest.mark.parametrize("variant", ["base", "both/RealAgnosticDensityResidualInteractionBlock"])
def test_weights_are_read_anew_in_every_forward(variant: str, rng: np.random.Generator) -> None:
    """However they are written: by an optimiser, behind torch's back, from a file, in a new tensor."""
    model = small_model(variant, atomic_numbers=tuple(range(1, 13)))  # most species do not occur
    fast = convert(model, verify=False)
    data = structures(model, rng)
    others = small_model(variant, atomic_numbers=tuple(range(1, 13)), seed=1).state_dict()

    def optimise(m: torch.nn.Module) -> None:
        optimiser = torch.optim.AdamW(m.parameters(), lr=1e-2)
        torch.set_default_dtype(torch.float64)
        try:
            m(zoo.copy_graph(data), training=True)["forces"].square().sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        optimiser.step()

    def write_data(m: torch.nn.Module) -> None:
        for parameter in m.parameters():
            parameter.data.mul_(1.01)

    def write_numpy(m: torch.nn.Module) -> None:
        for parameter in m.parameters():
            array = parameter.detach().numpy()
            array *= 0.98

    def replace_tensors(m: torch.nn.Module) -> None:
        for module in m.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(module, name, torch.nn.Parameter(0.99 * parameter.detach()))

    ways: list[Callable[[torch.nn.Module], object]] = [optimise, write_data, write_numpy]
    ways.append(lambda m: m.load_state_dict(others))
    if variant == "base":  # parameters in lists are not attributes of modules
        ways.append(replace_tensors)
    before = evaluate(fast, data)
    for write in ways:
        write(model)
        write(fast)
        after = evaluate(fast, data)
        assert not torch.equal(after["energy"], before["energy"]), write
        assert_same(after, evaluate(model, data), 1e-10)
        before = after


def test_dtype_changes_reach_the_original(rng: np.random.Generator) -> None:
    model = small_model()
    data = structures(model, rng)
    patch(model, verify=False)
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    single = evaluate(model, data)
    restore(model)
    assert {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()} == {torch.float32}
    assert_same(single, evaluate(model, data), 1e-4)


def test_mode_and_attributes_come_back() -> None:
    model = small_model().eval()
    original = model.interactions[0]
    patch(model, verify=False)
    model.train()
    model.interactions[0].avg_num_neighbors = 3.5
    model.interactions[0].linear.requires_grad_(False)
    assert not original.training
    restore(model)
    assert model.interactions[0] is original and original.training
    assert original.avg_num_neighbors == 3.5
    assert not original.linear.weight.requires_grad


def test_attributes_are_live(rng: np.random.Generator) -> None:
    """What MACE code reads from blocks is there, and what is written to them counts."""
    model = small_model()
    data = structures(model, rng)
    fast = convert(model, verify=False)
    for block, theirs in zip(fast.interactions, model.interactions, strict=True):
        irreps = ("node_attrs", "node_feats", "edge_attrs", "edge_feats", "target", "hidden")
        for name in (*(f"{word}_irreps" for word in irreps), "avg_num_neighbors", "radial_MLP", "irreps_out"):
            assert getattr(block, name) == getattr(theirs, name), name
        assert block.linear_up.irreps_out == theirs.linear_up.irreps_out
        assert block.conv_tp.weight_numel == theirs.conv_tp.weight_numel
    assert fast.products[0].symmetric_contractions.contractions[0].correlation == 2
    for m in (model, fast):
        m.interactions[0].avg_num_neighbors *= 2.0
    assert_same(evaluate(fast, data), evaluate(model, data), FLOAT64_TOLERANCE)


def test_hooks_are_carried_over(rng: np.random.Generator) -> None:
    model = small_model()
    data = structures(model, rng)
    calls: list[str] = []
    block = model.interactions[0]
    before = block.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    after = block.register_forward_hook(lambda m, a, out: (out[0] * 2, out[1]))
    with_kwargs = block.register_forward_hook(lambda m, a, k, out: calls.append(sorted(k)[0]), with_kwargs=True)
    exact = evaluate(model, data)
    expected, calls[:] = list(calls), []
    fast = convert(model, verify=False)
    assert_same(evaluate(fast, data), exact, FLOAT64_TOLERANCE)
    assert calls == expected and "pre" in expected
    patch(model, verify=False)
    calls.clear()
    for handle in (before, after, with_kwargs):  # handles from before work on the fast block
        handle.remove()
    doubled = evaluate(model, data)
    assert calls == []
    with pytest.raises(AssertionError):
        assert_same(doubled, exact, 1e-3)
    model.interactions[0].register_forward_hook(lambda m, a, out: (out[0] * 2, out[1]))
    restore(model)  # and hooks from in between stay on the original
    assert_same(evaluate(model, data), exact, FLOAT64_TOLERANCE)


def test_lammps_is_refused(rng: np.random.Generator) -> None:
    fast = convert(small_model(), verify=False)
    arguments = fast.interactions[0].example(torch.Generator())
    fast.interactions[0](**arguments, lammps_class=None)
    with pytest.raises(UnsupportedModuleError, match="lammps_class"):
        fast.interactions[0](**arguments, lammps_class=object(), lammps_natoms=(1, 1))


def test_torchscript_says_no() -> None:
    from e3nn.util import jit

    with pytest.raises(NotImplementedError, match="FastRealAgnosticResidualInteraction"):
        jit.compile(convert(small_model(), verify=False))


def test_threads_share_a_model(rng: np.random.Generator) -> None:
    model = small_model()
    fast = convert(model, verify=False)
    batches = [structures(model, np.random.default_rng(int(s))) for s in rng.integers(2**31, size=3)]
    exact = [evaluate(model, data) for data in batches]
    results: dict[int, dict[str, torch.Tensor]] = {}

    def run(index: int) -> None:
        for _ in range(5):
            inputs = {k: v.clone() for k, v in batches[index].items()}
            out = fast(inputs, compute_force=False)
            results[index] = {"node_energy": out["node_energy"].detach(), "energy": out["energy"].detach()}

    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_default_dtype(torch.float32)
    for index, result in results.items():
        assert_same(result, {k: exact[index][k] for k in result}, FLOAT64_TOLERANCE)
