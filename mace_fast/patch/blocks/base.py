"""What every fast module is: another forward over the very same state as the module that it stands in for."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch

from mace_fast.patch.blocks.topology import TopologyMemo

Plan = TypeVar("Plan")

# Not state: the compiled form of the module that a fast module stands in for must not run instead of the fast
# forward.
_COMPILED_FORWARD = "_compiled_call_impl"
_OWN = ("_original", "_plan", "_memo", "_leads")


class FastModule(torch.nn.Module, Generic[Plan]):
    """A module that computes what another one computes, with the kernels of mace_fast.

    It shares the *containers* of the original, not copies of them: the same dictionaries of parameters,
    buffers, submodules and hooks. So the state dict has the same keys, ``.to()``, ``requires_grad_``,
    optimisers and hooks act on both at once, and the original, which is kept aside and is no submodule, is up
    to date whenever it is put back. Its submodules are the original's; a fast forward reads their parameters
    and does not call them, so forward hooks on *them* do not run (matching refuses a model that has such
    hooks).

    What is pickled is the original, what was changed on the fast module, and an empty memo; the plan is made
    again from the original. Saved files therefore stay readable when plans change.
    """

    __e3nn_compile_mode__ = "unsupported"  # TorchScript cannot hold these ops; e3nn then says so by name

    _original: tuple[torch.nn.Module]  # a tuple hides it from torch's registration of submodules
    _plan: Plan
    _memo: TopologyMemo
    _leads: bool

    def __init__(
        self,
        original: torch.nn.Module,
        plan: Plan | None = None,
        memo: TopologyMemo | None = None,
        leads: bool = True,
    ) -> None:
        """Stand in for ``original``.

        Args:
            original: the module whose state is shared.
            plan: what ``type(self).plan(original)`` returns, where it is known already.
            memo: the memo of the model's edge topology, shared by its fast modules.
            leads: whether this is the module that sees a new structure first in every forward of the model.

        Raises:
            UnsupportedModuleError: the original is not understood; see ``plan``.
        """
        super().__init__()
        self._adopt(original)
        self._plan = type(self).plan(original) if plan is None else plan
        self._memo = TopologyMemo() if memo is None else memo
        self._leads = leads

    @classmethod
    def plan(cls, original: torch.nn.Module) -> Plan:
        """Everything static that the fast forward needs, read from the live module.

        Raises:
            UnsupportedModuleError: the module is not understood; the message says what is wrong, not where it
                is.
        """
        raise NotImplementedError

    @classmethod
    def kernels_of(cls, plan: Plan) -> str:
        """Which kernels such a module runs, for reports."""
        raise NotImplementedError

    def example(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random arguments of ``forward`` by name, float64 on the CPU; those that may be differentiated
        require a gradient.
        """
        raise NotImplementedError

    def kernels(self) -> str:
        """Which kernels this module runs."""
        return type(self).kernels_of(self._plan)

    def extra_repr(self) -> str:
        return self.kernels()

    def give_back(self) -> torch.nn.Module:
        """The original module, brought up to this one's train mode and plain attributes; all else it shares
        already.
        """
        original = self._original[0]
        for name, value in self._changes().items():
            if name in original.__dict__:
                original.__dict__[name] = value
        return original

    def _adopt(self, original: torch.nn.Module) -> None:
        self.__dict__.update(original.__dict__)
        self.__dict__[_COMPILED_FORWARD] = None
        self.__dict__["_original"] = (original,)

    def _changes(self) -> dict[str, Any]:
        """Plain attributes that are no longer the original's: train mode, or what a caller has set."""
        theirs = self._original[0].__dict__
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in _OWN and name != _COMPILED_FORWARD and (name not in theirs or theirs[name] is not value)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {
            "original": self._original[0],
            "changes": self._changes(),
            "memo": self._memo,
            "leads": self._leads,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(state, type(self).plan(state["original"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> FastModule[Plan]:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied._set(copy.deepcopy(self.__getstate__(), memo), self._plan)  # plans are immutable
        return copied

    def _set(self, state: dict[str, Any], plan: Plan) -> None:
        torch.nn.Module.__init__(self)
        self._adopt(state["original"])
        self.__dict__.update(state["changes"])
        self._plan = plan
        self._memo = state["memo"]
        self._leads = state["leads"]


def random_tensor(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal random numbers, float64, requiring a gradient."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def random_one_hot(generator: torch.Generator, rows: int, classes: int) -> torch.Tensor:
    """One-hot rows, float64 [rows, classes]."""
    return torch.eye(classes, dtype=torch.float64)[torch.randint(classes, (rows,), generator=generator)]
