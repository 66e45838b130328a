"""``compare``: two models of MACE's signature, in every quantity and mode, on their own elements."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import ase
import torch

from mace_fast.verification.criterion import MORE_COPIES, is_doubtful
from mace_fast.verification.environment import describe_environment
from mace_fast.verification.evaluate import (
    MODES,
    NO_STRUCTURE_FOR,
    Cotangents,
    Mode,
    Outputs,
    evaluate,
)
from mace_fast.verification.graphs import Batch, Graph, batch_graphs, build_graphs
from mace_fast.verification.modules import compare_modules
from mace_fast.verification.quantities import Sample, call_failed, compare_quantities
from mace_fast.verification.reference import Copies, ReferenceResults
from mace_fast.verification.report import EquivalenceReport, QuantityRow, StructureInfo, dtype_name
from mace_fast.verification.structures import default_structures, model_heads, with_every_head
from mace_fast.verification.tensors import compare_tensors

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps done, and the number of all steps known so far."""

_FEW_EDGES = 400
_HESSIAN_ATOMS = 6
_DTYPES = (torch.float64, torch.float32)


def compare(
    reference: torch.nn.Module,
    candidate: torch.nn.Module,
    *,
    structures: Sequence[ase.Atoms] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | str | None = None,
    modules: Mapping[str, str] | None = None,
    modes: Sequence[str] | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> EquivalenceReport:
    """Whether ``candidate`` computes what ``reference`` computes.

    ``mace_fast.verification.criterion`` says when two results are the same. Both models are left as they are:
    the work is done on deep copies, and torch's default dtype, autocast and gradient mode are put back.
    Gradients are compared of the parameters that require one; of all, where none does.

    Args:
        reference: a MACE model of mace-torch; in float64 it is the truth.
        candidate: a module of the same signature, whose state dictionary has the same tensors.
        structures: evaluated instead of ``default_structures(reference)``. ``atoms.info`` may hold ``name``,
            ``head``, and additional inputs (``charge``, ``spin``). Structures without a head are given each
            head in turn, and the smallest one is repeated for heads that are left.
        dtypes: float64, float32 or both; by default float64 and the candidate's own.
        device: where to evaluate; by default where the candidate is.
        modules: names of modules to be compared one by one, each with a label of the kernel that runs for it.
            By default the model's blocks are compared, and only if the whole model fails, to find the cause.
        modes: names of the modes (``MODES``) to compare in; by default all. What is left out is said in the
            report.
        seed: of structures and cotangents; a fresh one by default.
        progress: called with a message, the steps done and the steps known.

    Returns:
        The report; ``report.raise_if_failed()`` raises VerificationError.

    Raises:
        StructureError: a structure that the reference cannot evaluate.
        ValueError: a dtype, mode or module that does not exist, no structures.
        MaceFastError: the reference itself fails.
    """
    run_device = torch.device(device) if device is not None else _device_of(candidate)
    run_dtypes = _checked_dtypes(dtypes, candidate)
    labels = _checked_modules(modules, reference)
    run_modes = _checked_modes(modes)
    run_seed = secrets.randbits(31) if seed is None else seed
    if structures is None:
        atoms = default_structures(reference, seed=run_seed)
    else:
        atoms = with_every_head(reference, structures)
    if not atoms:
        raise ValueError("no structures to compare on; leave out `structures` to use default_structures(reference)")
    report = EquivalenceReport(
        reference=type(reference).__name__,
        candidate=type(candidate).__name__,
        seed=run_seed,
        dtypes=[dtype_name(dtype) for dtype in run_dtypes],
        device=str(run_device),
        environment=describe_environment(run_device),
    )
    comparison = _Comparison(
        report=report,
        reference=reference,
        candidate=Copies(candidate, run_device),
        dtypes=run_dtypes,
        generator=torch.Generator().manual_seed(run_seed),
        progress=progress,
        num_steps=len(run_modes) + 4,
    )
    start = time.perf_counter()
    # Copies that are made in inference mode could not be differentiated.
    with torch.inference_mode(False):
        comparison.compare_tensors()
        results = comparison.evaluate_scales(atoms)
        comparison.compare_modes(run_modes, results)
        comparison.compare_modules(labels, results)
    report.seconds["total"] = time.perf_counter() - start
    return report


@dataclass
class _Comparison:
    """The steps of one run of ``compare``; each writes into the report."""

    report: EquivalenceReport
    reference: torch.nn.Module
    candidate: Copies
    dtypes: tuple[torch.dtype, ...]
    generator: torch.Generator
    progress: Progress | None
    num_steps: int
    steps_done: int = field(default=0)

    def compare_tensors(self) -> None:
        """Parameters and buffers of the models as they are."""
        with self._step("tensors"):
            compared = compare_tensors(self.reference, self.candidate.model)
            self.report.num_tensors, self.report.tensors = compared

    def evaluate_scales(self, structures: Sequence[ase.Atoms]) -> ReferenceResults:
        """Neighbour lists, and how large the terms are that energies, forces and virials are sums of."""
        with self._step("neighbour lists"):
            graphs = build_graphs(self.reference, structures)
            self.report.structures = [
                StructureInfo(g.name, g.formula, g.pbc, g.head, g.num_atoms, g.num_edges) for g in graphs
            ]
            unused = [head for head in model_heads(self.reference) if head not in {g.head for g in graphs}]
            if unused:
                self.report.not_compared.append(f"heads {', '.join(unused)}: no structure is for them")
            batches = _make_batches(graphs)
        with self._step("scales"):
            return ReferenceResults(self.reference, self.candidate.device, batches)

    def compare_modes(self, modes: Sequence[Mode], results: ReferenceResults) -> None:
        """Each mode in each dtype."""
        parameters = list(self.candidate.model.parameters())
        trained = any(parameter.requires_grad for parameter in parameters)
        not_compared = self.report.not_compared
        for mode in modes:
            with self._step(mode.what):
                if mode.batch not in results.batches:
                    not_compared.append(f"{mode.what}: {NO_STRUCTURE_FOR[mode.batch]}")
                elif mode.name == "training" and not parameters:
                    not_compared.append(f"{mode.what}: the candidate has no parameters")
                else:
                    if mode.name == "training" and not trained:
                        # As in files of mace_run_train: whoever trains such a model switches them on first.
                        self.candidate.require_gradients()
                        results.copies.require_gradients()
                    self.report.rows.extend(self._compare_mode(mode, results))
        left_out = [mode.what for mode in MODES if mode not in modes]
        if left_out:
            not_compared.append(f"{', '.join(left_out)}: not asked for")

    def compare_modules(self, labels: Mapping[str, str] | None, results: ReferenceResults) -> None:
        """The modules that ``labels`` names; without it all blocks, if the models differ: which is it?"""
        agree = all(row.passed for row in self.report.rows)
        if labels is None and agree:
            return
        names = labels if labels is not None else dict.fromkeys(_blocks(self.reference), "")
        references = {dtype: results.copies[dtype] for dtype in _DTYPES}
        candidates = {dtype: self.candidate[dtype] for dtype in self.dtypes}
        with self._step("modules"):
            # A fault may show only in an element or a structure that is not among the few.
            for batch in (results.batches["few"], results.batches["all"]):
                calls = results.calls(batch, list(names))
                rows = compare_modules(calls, references, candidates, names, self.candidate.device, self.generator)
                self.report.modules = list(rows)
                if agree or self.report.first_differing_module() is not None:
                    break
        unused = sorted(set(names) - {call.name for call in calls})
        if labels is not None and unused:
            self.report.not_compared.append(f"modules that the reference does not call: {', '.join(unused)}")

    def _compare_mode(self, mode: Mode, results: ReferenceResults) -> Iterator[QuantityRow]:
        batch = results.batches[mode.batch]
        cotangents = self._cotangents(mode, batch)
        reference = results.of(mode, cotangents)
        for dtype in self.dtypes:
            reference(torch.float64)
            again = None
            try:
                sample = Sample(batch, reference, self._evaluate(mode, batch, dtype, cotangents))
                if mode == MODES[0] and dtype == self.dtypes[-1]:
                    again = replace(sample, outputs=self._evaluate(mode, batch, dtype))
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                # Whatever a candidate raises is a difference, and goes into the report.
                yield call_failed(mode.name, dtype, error)
                continue
            yield from self._judged(mode, mode.name, dtype, sample, results)
            if again is not None:
                self.report.repeatable = _same_bits(sample.outputs, again.outputs)
                if not self.report.repeatable:
                    yield from self._judged(mode, f"{mode.name}, called again", dtype, again, results)

    def _judged(
        self, mode: Mode, name: str, dtype: torch.dtype, sample: Sample, results: ReferenceResults
    ) -> list[QuantityRow]:
        """The rows of one evaluation; of several, where a single one leaves room for chance."""
        compared = partial(
            compare_quantities,
            mode=name,
            terms=results.terms(sample.batch),
            dtype=dtype,
            typical=results.typical_error,
        )
        rows = list(compared(samples=[sample]))
        if dtype != torch.float32 or not any(is_doubtful(row.error, row.tolerance) for row in rows):
            return rows
        samples = [sample]
        for _ in range(MORE_COPIES):
            batch = sample.batch.displaced(self.generator)
            cotangents = self._cotangents(mode, batch)
            reference = results.on(batch, mode, cotangents)
            try:
                samples.append(Sample(batch, reference, self._evaluate(mode, batch, dtype, cotangents)))
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                return [*rows, call_failed(name, dtype, error)]
        note = f"chance: measured again on {MORE_COPIES} displaced copies"
        return [
            replace(row, note=note) if row.passed and not first.passed else row
            for first, row in zip(rows, compared(samples=samples), strict=True)
        ]

    def _evaluate(self, mode: Mode, batch: Batch, dtype: torch.dtype, cotangents: Cotangents | None = None) -> Outputs:
        return evaluate(self.candidate[dtype], batch, mode, dtype, self.candidate.device, cotangents)

    def _cotangents(self, mode: Mode, batch: Batch) -> Cotangents | None:
        return Cotangents.random(batch, self.generator) if mode.name == "training" else None

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(what, self.steps_done, max(self.num_steps, self.steps_done + 1))
        start = time.perf_counter()
        yield
        self.steps_done += 1
        self.report.seconds[what] = self.report.seconds.get(what, 0.0) + time.perf_counter() - start


def _make_batches(graphs: Sequence[Graph]) -> dict[str, Batch]:
    """All structures; a few of the smaller ones; those without any edge; the smallest one for the Hessian."""
    connected = sorted((graph for graph in graphs if graph.num_edges), key=lambda graph: graph.num_edges)
    lone = [graph for graph in graphs if not graph.num_edges]
    few: list[Graph] = []
    for graph in connected:
        if not few or sum(other.num_edges for other in few) + graph.num_edges <= _FEW_EDGES:
            few.append(graph)
    batches = {"all": batch_graphs("all", graphs), "few": batch_graphs("few", few or graphs)}
    if lone:
        batches["lone"] = batch_graphs("lone", lone)
    small = [graph for graph in connected if 2 <= graph.num_atoms <= _HESSIAN_ATOMS]
    if small:
        batches["one"] = batch_graphs("one", small[:1])
    return batches


def _same_bits(first: Outputs, second: Outputs) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _blocks(model: torch.nn.Module) -> list[str]:
    """Names of the model's blocks: its children, and those of its lists."""
    names = []
    for name, child in model.named_children():
        if isinstance(child, torch.nn.ModuleList):
            names += [f"{name}.{index}" for index in range(len(child))]
        else:
            names.append(name)
    return names


def _floating_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensors in (model.parameters(), model.buffers()):
        yield from (tensor for tensor in tensors if tensor.is_floating_point())


def _device_of(model: torch.nn.Module) -> torch.device:
    first = next(_floating_tensors(model), None)
    return torch.device("cpu") if first is None else first.device


def _checked_dtypes(dtypes: tuple[torch.dtype, ...] | None, candidate: torch.nn.Module) -> tuple[torch.dtype, ...]:
    if dtypes is None:
        first = next(_floating_tensors(candidate), None)
        dtypes = (torch.float64,) if first is None else (torch.float64, first.dtype)
    wrong = [dtype for dtype in dtypes if dtype not in _DTYPES]
    if wrong or not dtypes:
        raise ValueError(f"models are compared in torch.float64 and torch.float32, not in {wrong or 'no dtype at all'}")
    return tuple(dict.fromkeys(dtypes))


def _checked_modes(modes: Sequence[str] | None) -> list[Mode]:
    if modes is None:
        return list(MODES)
    known = {mode.name: mode for mode in MODES}
    unknown = [name for name in modes if name not in known]
    if unknown or not modes:
        raise ValueError(f"unknown modes {unknown}; there are {', '.join(known)}")
    return [mode for mode in MODES if mode.name in modes]


def _checked_modules(modules: Mapping[str, str] | None, reference: torch.nn.Module) -> Mapping[str, str] | None:
    if modules is not None:
        known = dict(reference.named_modules(remove_duplicate=False))
        unknown = [name for name in modules if name not in known]
        if unknown:
            raise ValueError(f"the reference, a {type(reference).__name__}, has no modules named {', '.join(unknown)}")
    return modules
