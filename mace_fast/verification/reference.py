"""What the reference computes, evaluated when first asked for, on copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from mace_fast.copying import copy_module
from mace_fast.errors import MaceFastError
from mace_fast.verification.evaluate import (
    MODES,
    Cotangents,
    Mode,
    Outputs,
    evaluate,
    evaluate_edge_forces,
)
from mace_fast.verification.graphs import Batch
from mace_fast.verification.modules import Call, record_calls
from mace_fast.verification.quantities import reference_errors
from mace_fast.verification.report import dtype_name
from mace_fast.verification.terms import TermScales


class Copies:
    """Deep copies of a model, one for each dtype, made when first asked for."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._copies: dict[torch.dtype, torch.nn.Module] = {}
        self._gradients = False

    def __getitem__(self, dtype: torch.dtype) -> torch.nn.Module:
        if dtype not in self._copies:
            copied = copy_module(self.model).to(device=self.device, dtype=dtype)
            self._copies[dtype] = _with_gradients(copied) if self._gradients else copied
        return self._copies[dtype]

    def require_gradients(self) -> None:
        """All parameters of the copies require a gradient, whatever those of the model do."""
        self._gradients = True
        for copied in self._copies.values():
            _with_gradients(copied)


def _with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


class ReferenceResults:
    """Results of the reference on batches of structures; the batch "all" holds every structure.

    Raises:
        MaceFastError: from any method, where the reference itself raises.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, batches: Mapping[str, Batch]) -> None:
        self.copies = Copies(model, device)
        self.batches = batches
        everything = batches["all"]
        with self._running("edge forces"):
            outputs, forces = evaluate_edge_forces(self.copies[torch.float32], everything, torch.float32, device)
        self._terms = TermScales.of(everything, outputs, forces)
        self._main = self.on(batches[MODES[0].batch], MODES[0])
        self._errors: dict[str, float] | None = None

    def terms(self, batch: Batch) -> TermScales:
        """Scales of the structures of a batch."""
        everything = self.batches["all"].graphs
        return self._terms.select([everything.index(graph) for graph in batch.graphs])

    def of(self, mode: Mode, cotangents: Cotangents | None = None) -> Callable[[torch.dtype], Outputs]:
        """The results of a mode, on its batch, as a function of the dtype."""
        return self._main if mode == MODES[0] else self.on(self.batches[mode.batch], mode, cotangents)

    def on(self, batch: Batch, mode: Mode, cotangents: Cotangents | None = None) -> Callable[[torch.dtype], Outputs]:
        """The results of a mode on any batch, as a function of the dtype."""
        results: dict[torch.dtype, Outputs] = {}

        def evaluated(dtype: torch.dtype) -> Outputs:
            if dtype not in results:
                with self._running(f"{mode.what} in {dtype_name(dtype)}"):
                    results[dtype] = evaluate(
                        self.copies[dtype],
                        batch,
                        mode,
                        dtype,
                        self.copies.device,
                        cotangents,
                    )
            return results[dtype]

        return evaluated

    def typical_error(self, quantity: str) -> float:
        """The relative float32 error of a quantity over all structures; 0 where it is not known."""
        if self._errors is None:
            oracle, float32 = self._main(torch.float64), self._main(torch.float32)
            self._errors = reference_errors(self.batches[MODES[0].batch], self._terms, oracle, float32)
        return self._errors.get(quantity, 0.0)

    def calls(self, batch: Batch, names: Sequence[str]) -> list[Call]:
        """What the named modules are called with."""
        with self._running("the recording of module inputs"):
            return record_calls(self.copies[torch.float64], batch, names, self.copies.device)

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """Says, where something raises, that it was the reference."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise MaceFastError(
                f"the reference, a {type(self.copies.model).__name__}, cannot be evaluated ({what}): "
                f"{type(error).__name__}: {error}. It must be an energy model that mace-torch runs."
            ) from error
