"""What is refused, and that the message names the module and why."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from e3nn import o3
from mace.modules import blocks
from mace.modules.lora import inject_LoRAs, merge_lora_weights
from mace.modules.wrapper_ops import CuEquivarianceConfig, OEQConfig
from test_patch_support import small_model

from mace_fast.errors import UnsupportedModuleError
from mace_fast.patch import convert, match, patch


def _refused(model: torch.nn.Module, *parts: str) -> str:
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModuleError) as error:
        convert(model, verify=False)
    with pytest.raises(UnsupportedModuleError):
        patch(model, verify=False)
    assert {name: id(module) for name, module in model.named_modules()} == before
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {error.value}"
    return str(error.value)


class SlightlyDifferent(blocks.RealAgnosticResidualInteractionBlock):
    """A subclass inherits everything, and might compute anything."""


class OtherProduct(blocks.EquivariantProductBasisBlock):
    pass


class OtherLinear(o3.Linear):
    pass


def _changed_class(module: torch.nn.Module, cls: type) -> torch.nn.Module:
    module.__class__ = cls
    return module


def test_everything_small_is_understood() -> None:
    statuses = {m.name: m.status for m in match(small_model())}
    assert statuses["interactions.0"] == statuses["products.1"] == "replace"
    assert "refuse" not in statuses.values()


def test_subclasses() -> None:
    model = small_model()
    _changed_class(model.interactions[1], SlightlyDifferent)
    _refused(model, "interactions.1", "SlightlyDifferent", "interaction block that mace_fast does not know")
    model = small_model()
    _changed_class(model.products[0], OtherProduct)
    _refused(model, "products.0", "OtherProduct", "product block")
    model = small_model()
    _changed_class(model.interactions[0].linear_up, OtherLinear)
    _refused(model, "interactions.0", "linear_up", "OtherLinear")


def test_every_refusal_is_named_at_once() -> None:
    model = small_model()
    _changed_class(model.interactions[1], SlightlyDifferent)
    _changed_class(model.products[0], OtherProduct)
    _refused(model, "interactions.1", "products.0")


def test_lora() -> None:
    model = inject_LoRAs(small_model(), rank=2)
    _refused(model, "interactions.0", "LoRA", "merge_lora_weights")
    convert(merge_lora_weights(model), verify=True)


@pytest.mark.parametrize(
    ("attribute", "config", "words"),
    [
        ("cueq_config", CuEquivarianceConfig(), "cuEquivariance"),
        ("oeq_config", OEQConfig(), "OpenEquivariance"),
    ],
)
def test_other_accelerators(attribute: str, config: Any, words: str) -> None:
    model = small_model()
    setattr(model.interactions[1], attribute, config)
    config.enabled = False  # as mace-torch leaves it where the package is not installed: the block is e3nn's
    convert(model, verify=False)
    config.enabled = True
    _refused(model, "interactions.1", words, "convert it back")
    model = small_model()
    model.interactions[0].conv_fusion = "atomic"
    _refused(model, "interactions.0", "conv_fusion")
    model = small_model()
    model.products[1].cueq_config = CuEquivarianceConfig()
    model.products[1].cueq_config.enabled = True
    _refused(model, "products.1", "cuEquivariance")


def test_module_of_another_accelerator() -> None:
    foreign = types.new_class("Linear", (torch.nn.Module,))
    foreign.__module__ = "cuequivariance_torch.operations.linear"
    model = small_model()
    model.readouts[0].linear = foreign()
    _refused(model, "readouts.0.linear", "cuequivariance_torch", "convert_cueq_e3nn")


def test_replaced_forward() -> None:
    model = small_model()
    block = model.interactions[0].conv_tp
    block.forward = types.MethodType(lambda self, *a: None, block)
    _refused(model, "interactions.0", "conv_tp", "forward")
    model = small_model()
    model.products[0].forward = lambda **k: None
    _refused(model, "products.0", "forward")


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("part", ["interactions.0.linear_up", "interactions.1.conv_tp_weights.layer0",
                                  "products.0.symmetric_contractions"])  # fmt: skip
def test_hooks_on_parts(register: str, part: str) -> None:
    model = small_model()
    handle = getattr(model.get_submodule(part), register)(lambda *a: None)
    block, _, name = part.partition("0." if "s.0" in part else "1.")
    _refused(model, block, name, "hook")
    handle.remove()
    convert(model, verify=False)


def test_other_coupling_constants() -> None:
    model = small_model()
    name, table = next((n, b) for n, b in model.named_buffers() if "_w3j_" in n)
    table.neg_()  # another sign convention
    _refused(model, "interactions.1", "conv_tp", "constants", name.rpartition(".")[2])


def test_torchscript() -> None:
    from e3nn.util import jit

    scripted = jit.compile(small_model(hidden_irreps="8x0e", num_interactions=1))
    _refused(scripted, "the model", "TorchScript", "eager")


def test_traced_for_compilation() -> None:
    from mace.tools.compile import simplify

    model = simplify(small_model())
    _refused(model, "products.0", "symmetric_contractions", "torch.fx", "prepare")


def test_missing_part() -> None:
    model = small_model()
    del model.interactions[0].skip_tp
    _refused(model, "interactions.0", "skip_tp")


def test_biases_and_external_weights() -> None:
    model = small_model()
    old = model.interactions[0].conv_tp
    model.interactions[0].conv_tp = o3.TensorProduct(
        old.irreps_in1,
        old.irreps_in2,
        old.irreps_out,
        [tuple(i)[:5] for i in old.instructions],
        shared_weights=True,
    )
    _refused(model, "interactions.0", "conv_tp", "weights of its own")
    model = small_model()
    linear = model.interactions[0].linear_up
    model.interactions[0].linear_up = o3.Linear(linear.irreps_in, linear.irreps_out, internal_weights=False)
    _refused(model, "interactions.0", "linear_up", "outside")
    model.interactions[0].linear_up = o3.Linear(linear.irreps_in, linear.irreps_out, biases=True)
    _refused(model, "interactions.0", "linear_up", "biases")


def test_precision_without_kernels() -> None:
    model = small_model().to(torch.bfloat16)
    _refused(model, "bfloat16", "float32 and float64")
    with pytest.raises(UnsupportedModuleError, match="bfloat16"):
        convert(model, dtype="float32")
    _refused(model.float(), "conv_tp", "constants")  # whose rounding stays


def test_nothing_to_replace() -> None:
    for model in (torch.nn.Linear(3, 4), torch.nn.Sequential(o3.Linear("3x0e", "2x0e"))):
        message = _refused(model, "nothing to replace", type(model).__name__)
    assert "e3nn" in message  # what was seen, and stays


def test_patching_the_root() -> None:
    product = o3.TensorProduct("4x1o", "1o", "4x0e", [(0, 0, 0, "uvu", True)])
    with pytest.raises(UnsupportedModuleError, match="convert"):
        patch(product)
    assert type(convert(product)).__name__ == "FastTensorProduct"


def test_old_pickles() -> None:
    """Attributes that older versions of mace-torch did not have are not missed."""
    model = small_model()
    del model.heads
    for block in model.interactions:
        for name in ("cueq_config", "oeq_config", "edge_irreps", "radial_MLP"):
            block.__dict__.pop(name, None)
        block.reshape.__dict__.pop("cueq_config", None)
    for block in model.products:
        for name in ("cueq_config", "use_agnostic_product"):
            block.__dict__.pop(name, None)
        for contraction in block.symmetric_contractions.contractions:
            for name in [n for n in contraction._buffers if n.endswith("_zeroed")]:
                del contraction._buffers[name]
    assert convert(model) is not None


def test_gate_of_e3nn() -> None:
    """Models pickled by mace-torch 0.3.14 hold e3nn's gate."""
    from e3nn.nn import Gate

    model = small_model("both/RealAgnosticResidualNonLinearInteractionBlock")
    for block in model.interactions:
        old = block.equivariant_nonlin
        block.equivariant_nonlin = Gate(
            old.irreps_scalars, [torch.nn.functional.silu] * len(old.irreps_scalars),
            old.irreps_gates, [torch.sigmoid] * len(old.irreps_gates), old.irreps_gated,
        ).double()  # fmt: skip
    convert(model)


def test_matching_changes_nothing() -> None:
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {n: id(m) for n, m in model.named_modules()}
    match(model)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_wrapped_models() -> None:
    """Models inside of other modules, and the same block under two names."""
    model = small_model()
    wrapper = torch.nn.ModuleDict({"potential": torch.nn.Sequential(model), "again": model.interactions[0]})
    patch(wrapper, verify=False)
    assert wrapper["again"] is model.interactions[0]
    assert type(wrapper["again"]).__name__.startswith("Fast")
