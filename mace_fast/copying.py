"""Copies of modules, also of those that Python's own deepcopy trips over."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)

# mace-torch gives a product path that no coupling allows (1e out of 0e + 1o at correlation 1, say) a parameter
# of this class, which is never trained. Its constructor does not take what torch passes it when it is copied.
_NOT_COPYABLE = ("mace.modules.symmetric_contraction", "EmptyParam")


def copy_module(module: Module) -> Module:
    """A deep copy of ``module``.

    The parameters of mace-torch that cannot be copied become plain ones with the same values that require no
    gradient, as they do in every file that mace-torch writes.
    """
    stand_ins: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
        if (type(parameter).__module__, type(parameter).__qualname__) == _NOT_COPYABLE
    }
    return copy.deepcopy(module, stand_ins)
