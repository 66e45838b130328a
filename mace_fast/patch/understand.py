"""Reading e3nn and torch modules: is this exactly the module that we know, and what does it compute?

Classes are compared by their full name and never by ``isinstance``: a subclass may compute something else.
The name, and not the class object, so that nothing has to be imported and a reloaded package still matches.
Everything numerical (path weights, weight shapes, coupling constants) is read from the live module, never
from a configuration.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from mace_fast.errors import UnsupportedDescriptionError, UnsupportedModuleError
from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, Path
from mace_fast.kernels.description.linear import Linear, describe_indexed_linear, describe_linear

LINEAR = "e3nn.o3._linear.Linear"
TENSOR_PRODUCT = "e3nn.o3._tensor_product._tensor_product.TensorProduct"
FULLY_CONNECTED = "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct"
TENSOR_PRODUCTS = (
    TENSOR_PRODUCT,
    FULLY_CONNECTED,
    "e3nn.o3._tensor_product._sub.ElementwiseTensorProduct",
    "e3nn.o3._tensor_product._sub.FullTensorProduct",
)
"""The class and those that only choose its paths; o3.TensorSquare has another forward."""

_CALL_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}

# Rounding of a coupling stored in float32; a different convention differs by more than 0.1.
_COUPLING_TOLERANCE = 1e-6


def class_name(module: object) -> str:
    """Full name of an object's class."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def ancestor_names(module: object) -> set[str]:
    """Full names of an object's class and of everything that it inherits from."""
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}


def require_class(name: str, module: object, expected: str) -> None:
    """``module`` is exactly an ``expected``, runs that class's own forward, and nothing listens to its calls.

    ``name`` is the attribute under which the module was found, for the message.

    Raises:
        UnsupportedModuleError: it is not.
    """
    require_name(name, module, expected)
    require_unhooked(name, module)


def require_unhooked(name: str, module: object) -> None:
    """Nothing listens to calls of ``module``, which a fast block will not call any more.

    Raises:
        UnsupportedModuleError: it has a hook, or a forward of its own.
    """
    assert isinstance(module, torch.nn.Module)
    require_own_forward(name, module)
    hook = call_listener(module)
    if hook is not None:
        raise UnsupportedModuleError(
            f"its {name} has {hook}, which would not run: the fast block does not call its parts. "
            "Remove it, or register it on the block itself"
        )


def call_listener(module: torch.nn.Module) -> str | None:
    """Which kind of hook listens to the calls of ``module``, in words; None where none does."""
    return next((words for attribute, words in _CALL_HOOKS.items() if module.__dict__.get(attribute)), None)


def require_own_forward(name: str, module: torch.nn.Module) -> None:
    """The forward of ``module`` is its class's.

    Raises:
        UnsupportedModuleError: somebody has put another one on the object.
    """
    if replaced_forward(module):
        raise UnsupportedModuleError(
            f"its {name} has a forward that was replaced on the object, so its class does not tell"
        )


def replaced_forward(module: torch.nn.Module) -> bool:
    """Whether the object has another forward than its class's. TorchScript keeps methods where others have that."""
    return "forward" in module.__dict__ and not isinstance(module, torch.jit.ScriptModule)


def submodule(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """A submodule by name.

    Raises:
        UnsupportedModuleError: there is none.
    """
    found = module._modules.get(name)
    if found is None:
        raise UnsupportedModuleError(f"it has no submodule {name}")
    return found


def read_linear(parent: torch.nn.Module, name: str, **layouts: Any) -> Linear:
    """The description of the ``o3.Linear`` at ``parent.name``, weights kept in the module.

    Raises:
        UnsupportedModuleError: it is something else, or has biases or external weights.
    """
    module: Any = submodule(parent, name)
    require_class(name, module, LINEAR)
    if not module.internal_weights:
        raise UnsupportedModuleError(f"its {name} takes its weights from outside")
    description: Linear = described(name, describe_linear, module, **layouts)
    if description.biases:
        raise UnsupportedModuleError(f"its {name} has biases, which no block of mace-torch has")
    return description


def read_indexed_linear(parent: torch.nn.Module, name: str, **layouts: Any) -> tuple[Linear, int]:
    """The ``FullyConnectedTensorProduct`` with one-hot attributes at ``parent.name``.

    Returns:
        The linear map of one species, and the number of species.

    Raises:
        UnsupportedModuleError: it is something else, or has external weights.
    """
    module: Any = submodule(parent, name)
    require_class(name, module, FULLY_CONNECTED)
    if not module.internal_weights:
        raise UnsupportedModuleError(f"its {name} takes its weights from outside")
    return described(name, describe_indexed_linear, module, **layouts)


def read_channelwise(name: str, module: Any) -> ChannelwiseTensorProduct:
    """The description of an ``o3.TensorProduct`` with 'uvu' paths only, wherever its weights come from.

    Raises:
        UnsupportedModuleError: another class, other paths, or coupling constants in another convention than
            e3nn 0.4's.
    """
    require_name(name, module, TENSOR_PRODUCT)
    modes = sorted({ins.connection_mode for ins in module.instructions} - {"uvu"})
    if modes:
        raise UnsupportedModuleError(f"its {name} has paths of mode {', '.join(modes)}; only uvu has a kernel")
    require_known_couplings(name, module)
    x, x_index = kept_blocks(module.irreps_in1)
    y, y_index = kept_blocks(module.irreps_in2)
    z, z_index = kept_blocks(module.irreps_out)
    paths = tuple(
        Path(
            x_index[ins.i_in1],
            y_index[ins.i_in2],
            z_index[ins.i_out],
            float(ins.path_weight),
            bool(ins.has_weight),
        )
        for ins in module.instructions
        if 0 not in ins.path_shape
    )
    description: ChannelwiseTensorProduct = described(name, ChannelwiseTensorProduct, x, y, z, paths)
    if description.weight_numel != module.weight_numel:
        raise UnsupportedModuleError(
            f"its {name} has {module.weight_numel} weights, but its instructions imply {description.weight_numel}"
        )
    return description


def coupling_buffers(module: torch.nn.Module) -> dict[str, tuple[int, int, int]]:
    """Names of the Clebsch-Gordan tables that e3nn keeps as buffers below ``module``, with their degrees."""
    found = {}
    for name, _ in module.named_buffers():
        match = re.fullmatch(r"_w3j_(\d+)_(\d+)_(\d+)", name.rpartition(".")[2])
        if match:
            found[name] = (int(match[1]), int(match[2]), int(match[3]))
    return found


def require_known_couplings(name: str, module: torch.nn.Module) -> None:
    """The Clebsch-Gordan tables below ``module`` are those of this package.

    Raises:
        UnsupportedModuleError: they are another version's.
    """
    for buffer_name, degrees in coupling_buffers(module).items():
        live = module.get_buffer(buffer_name).detach().cpu().double().numpy()
        if np.abs(live - clebsch_gordan(*degrees)).max() > _COUPLING_TOLERANCE:
            raise UnsupportedModuleError(
                f"its {name} couples {degrees} with other constants than e3nn 0.4's wigner_3j "
                f"({buffer_name}); was it made by another version of e3nn?"
            )


def kept_blocks(irreps: Any) -> tuple[tuple[tuple[int, int], ...], dict[int, int]]:
    """Blocks (multiplicity, degree) with copies, and their places by e3nn's number, which counts those without too."""
    kept = [number for number, (mul, _) in enumerate(irreps) if mul > 0]
    blocks = tuple((irreps[number].mul, irreps[number].ir.l) for number in kept)
    return blocks, {number: position for position, number in enumerate(kept)}


def described(name: str, describe: Any, *args: Any, **kwargs: Any) -> Any:
    """A description, with the module's name in what it refuses."""
    try:
        return describe(*args, **kwargs)
    except UnsupportedDescriptionError as error:
        raise UnsupportedModuleError(f"its {name} has no kernel: {error}") from error


def require_name(name: str, module: object, *expected: str) -> None:
    """``module`` is exactly of one of the classes.

    Raises:
        UnsupportedModuleError: it is not.
    """
    found = class_name(module)
    if found not in expected:
        raise UnsupportedModuleError(f"its {name} is a {found}, not a {' or a '.join(expected)}{_explain(found)}")


def foreign_accelerator(module: object) -> str | None:
    """Why a module of another accelerator refuses a model; None for any other module."""
    package = class_name(module).partition(".")[0]
    if package in ("cuequivariance_torch", "cuequivariance", "openequivariance"):
        return f"it is a {class_name(module)}{_explain(class_name(module))}"
    return None


def _explain(found: str) -> str:
    """What is known about classes that users' models do contain."""
    if "lora" in found.lower():
        return ". It is wrapped for low-rank fine-tuning: merge first, with mace.modules.lora.merge_lora_weights(model)"
    if found.startswith("cuequivariance"):
        return ". It belongs to cuEquivariance: convert back first, with mace.cli.convert_cueq_e3nn.run"
    if found.startswith("openequivariance"):
        return ". It belongs to OpenEquivariance: convert back first, with mace.cli.convert_oeq_e3nn.run"
    if found.startswith("torch.fx."):
        return ". It was traced with torch.fx, as mace.tools.compile.prepare does: give the model as it was before that"
    if found.startswith("torch.jit."):
        return ". It is compiled to TorchScript, whose modules cannot be read: give the eager model"
    return ""
