"""The ASE calculator: what mace.calculators.MACECalculator gives for energy models, through converted
models.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from mace.modules import MACE

from mace_fast.calculators.batches import evaluate_batch, pack
from mace_fast.calculators.derived import descriptors, fresh, hessian
from mace_fast.calculators.graph import INFO_KEYS, GraphBuilder, take
from mace_fast.calculators.models import Verify, choose_head, prepared_models, require_one_committee
from mace_fast.calculators.results import ase_results, find_not_finite, not_finite, total_energies
from mace_fast.calculators.snapshot import Snapshot, changes_since
from mace_fast.calculators.wanted import Wanted
from mace_fast.errors import StructureError
from mace_fast.inference import FrozenMACE, Stepper
from mace_fast.loading import model_dtype, resolve_device, resolve_dtype

_ATOMS_PER_BATCH = {"cuda": 2048, "cpu": 256}
_OTHER_MODEL_TYPES = frozenset({"DipoleMACE", "EnergyDipoleMACE", "DipolePolarizabilityMACE", "PolarMACE"})
# Keywords of ASE's Calculator, which every calculator takes.
_ASE_KEYWORDS = frozenset({"restart", "ignore_bad_restart_file", "label", "atoms", "directory"})


class MACEFastCalculator(Calculator):
    """Drop-in for :class:`mace.calculators.MACECalculator` with energy models, on the CPU and on NVIDIA GPUs.

    The arguments, results and units are MACECalculator's. It differs where that one surprises:

    - Results are computed when they are asked for: forces bring the energy but no stress. What was asked
      for at the last configuration is computed in one go at the next, so an NPT run pays once a step.
    - Results are float64 arrays whatever the model's dtype; the energy is summed over atoms in float64.
    - An unknown head is an error and not the last head; an element that the model does not know, a position
      that is not a number and a result that is not finite are errors that say so.
    - A charge or spin that the model does not know is an error, and so is one under the feature's own name, such as
      ``atoms.info["total_charge"]``, where ``info_keys`` names another.
    - The given modules, torch's default dtype and ASE's Calculator class are left as they are.

    Args:
        model_paths: a path, a glob such as ``"run-*.model"`` or a list of paths (several make a committee),
            or a public model's name such as ``"medium-mpa-0"``.
        models: modules in place of files.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        energy_units_to_eV, length_units_to_A: factors from the model's units.
        default_dtype: ``"float32"`` or ``"float64"``; empty keeps the model's.
        charges_key: the array in which atomic charges are stored.
        info_keys, arrays_keys: where in ``atoms.info`` and ``atoms.arrays`` a model's further inputs are
            found, as ``{"total_spin": "spin", "total_charge": "charge"}``. A structure that gives none has the charge 0
            (e) and the spin 1 (multiplicity).
        model_type: ``"MACE"``; the others have no energy alone and are refused.
        compile_mode, fullgraph, enable_cueq, enable_oeq, pad_num_atoms, pad_num_edges, warmup: settings of
            other
            accelerators, which mace_fast replaces: a warning says that they have no effect.
        verify: prove on construction that the converted model and its program compute what the original computes, by
            evaluating all on several small structures in float64 and in the working dtype. For a foundation model
            that takes a minute on two CPU cores, so ``"once"`` does it for a model file that this machine
            has not proven before, with the same code, versions, device and precision (the proof is kept beside the
            compiled kernels). Models that are given as modules, or hold code of other packages, are proven each time.
            True proves now, False trusts.
        frozen: evaluate energies, forces and stresses by the frozen program (:func:`mace_fast.freeze`), several times
            faster than the converted model; it is verified as well, and its tables are made at the first evaluation of
            each set of elements. A model that has no frozen form is evaluated in its converted form, with a warning.
            Descriptors and Hessians always are.
        skin: A. Candidate pairs are found within cutoff + skin, and used until an atom has moved by half of it or the
            cell has changed as much; 0 makes a list at each step. The skin does not change results: of the candidates,
            those within the cutoff are evaluated, or those beyond contribute exactly zero. Frozen programs alone keep
            candidates. None: 0.5, and 1.0 for small structures on a GPU, where more candidates cost nothing.
        cuda_graph: replay each evaluation as a CUDA graph: one launch in place of hundreds. None does so on a GPU.
            Graphs are captured for sizes with some room, again when a structure does not fit, and four are kept.
        neighbours: how pairs are found on a GPU, ``"vesin-cuda"``, ``"nvalchemi"`` or ``"vesin-upload"`` (the CPU's
            list); None takes the first that works, and for small structures the CPU. See
            :class:`mace_fast.inference.NeighbourSearch`.
        head: name of the model's head; needed where there are several and none is called default.
        compute_atomic_stresses: offer ``stresses`` and ``virials`` per atom.
        **kwargs: ASE's own keywords (``label``, ``directory``, ...).

    Attributes:
        models: the converted models.
        stepper: what evaluates frozen programs and keeps their lists and graphs (``stepper.rebuilds``,
            ``stepper.search.method``); None for converted models.
        proofs: what was proven, now or earlier, and where the reports lie; empty with ``verify=False``.
        r_max: cutoff in A.
        available_heads, head: the names of the model's heads, and the one in use.

    Raises:
        ModelFileError: a file is not a model, a name cannot be downloaded.
        UnsupportedModuleError: the model has a part that mace_fast does not understand.
        VerificationError: a converted model differs from its original.
        MissingToolError: no GPU for ``device="cuda"``, no compiler.
        ValueError: contradictory or unknown arguments.
    """

    _last: Snapshot | Atoms | None

    def __init__(
        self,
        model_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        models: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
        device: str | torch.device = "cpu",
        energy_units_to_eV: float = 1.0,
        length_units_to_A: float = 1.0,
        default_dtype: str | torch.dtype = "",
        charges_key: str = "Qs",
        info_keys: Mapping[str, str] | None = None,
        arrays_keys: Mapping[str, str] | None = None,
        model_type: str = "MACE",
        compile_mode: str | None = None,
        fullgraph: bool = True,
        enable_cueq: bool = False,
        enable_oeq: bool = False,
        pad_num_atoms: int = 0,
        pad_num_edges: int = 0,
        warmup: bool = False,
        *,
        verify: Verify = "once",
        frozen: bool = True,
        skin: float | None = None,
        cuda_graph: bool | None = None,
        neighbours: str | None = None,
        head: str | None = None,
        compute_atomic_stresses: bool = False,
        model_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - _ASE_KEYWORDS
        if unknown:
            raise TypeError(f"MACEFastCalculator got unknown arguments: {', '.join(sorted(unknown))}")
        super().__init__(**kwargs)
        if model_type in _OTHER_MODEL_TYPES:
            raise ValueError(
                f"model_type={model_type!r}: mace_fast evaluates energy models only; "
                "use mace.calculators.MACECalculator"
            )
        if model_type != "MACE":
            raise ValueError(f"model_type={model_type!r} is none of mace-torch's; use 'MACE'")
        _warn_of_other_accelerators(
            compile_mode=compile_mode,
            enable_cueq=enable_cueq,
            enable_oeq=enable_oeq,
            pad_num_atoms=pad_num_atoms,
            pad_num_edges=pad_num_edges,
            warmup=warmup,
        )
        if model_path is not None:
            if model_paths is not None:
                raise ValueError("both 'model_path' (deprecated) and 'model_paths' are given; give 'model_paths'")
            warnings.warn("'model_path' is deprecated, use 'model_paths'", FutureWarning, stacklevel=2)
            model_paths = model_path
        if (model_paths is None) == (models is None):
            raise ValueError("give exactly one of 'model_paths' and 'models'")

        self.device = resolve_device(device)
        prepared = prepared_models(
            model_paths, models, self.device, resolve_dtype(default_dtype), verify, frozen=frozen
        )
        self.models: list[MACE] = [model.converted for model in prepared]
        self.num_models = len(self.models)
        self._programs = [model.program for model in prepared]
        self.proofs = [proof for model in prepared for proof in model.proofs]
        require_one_committee(self.models)
        self.stepper: Stepper | None = None
        self._batches: Stepper | None = None
        programs = [program for program in self._programs if isinstance(program, FrozenMACE)]
        if len(programs) == len(self._programs):
            self.stepper = Stepper(programs, skin=skin, cuda_graph=cuda_graph, neighbours=neighbours)
        elif cuda_graph:
            raise ValueError("cuda_graph=True: only frozen programs are captured, and this model runs converted")
        self.model_type = model_type
        self.energy_units_to_eV = energy_units_to_eV
        self.length_units_to_A = length_units_to_A
        self.compute_atomic_stresses = compute_atomic_stresses
        self.charges_key = charges_key
        self.info_keys = dict(INFO_KEYS if info_keys is None else info_keys)
        self.arrays_keys = {**(arrays_keys or {}), charges_key: "charges"}

        first = self.models[0]
        self.default_dtype = str(model_dtype(first)).removeprefix("torch.")
        self.r_max = float(first.r_max)
        self.available_heads: list[str] = list(first.heads)
        self.head = choose_head(head, self.available_heads)
        self._build_graph = GraphBuilder(
            atomic_numbers=[int(z) for z in first.atomic_numbers],
            cutoff=self.r_max,
            device=self.device,
            dtype=model_dtype(first),
            head=self.available_heads.index(self.head),
            # mace-torch sets the attribute only on models that take more than atoms.
            feature_specs=getattr(first, "embedding_specs", None) or {},
            info_keys=self.info_keys,
            arrays_keys=self.arrays_keys,
        )
        self.implemented_properties = ["energy", "energies", "free_energy", "node_energy", "forces", "stress"]
        if compute_atomic_stresses:
            self.implemented_properties += ["stresses", "virials"]
        if self.num_models > 1:
            self.implemented_properties += ["energy_comm", "energy_var", "forces_comm", "stress_var"]
        self.results: dict[str, Any] = {}
        self._asked: frozenset[str] = frozenset()
        self._asked_before: frozenset[str] = frozenset()
        self._isolated: np.ndarray | None = None

    @property
    def atoms(self) -> Atoms | None:
        """A copy of the atoms of the last results, as in ASE; it is made when it is asked for."""
        if isinstance(self._last, Snapshot):
            self._last = self._last.restore()
        return self._last

    @atoms.setter
    def atoms(self, atoms: Atoms | None) -> None:
        self._last = atoms

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last results; changed model inputs in ``atoms.info`` or ``atoms.arrays``
        count.
        """
        # ASE compares with a tolerance, which takes longer than all else that a step does on the host.
        last = self._last
        changes: list[str] = super().check_state(atoms, tol=tol) if tol > 1e-15 else changes_since(last, atoms)
        if not changes and last is not None:
            for name, spec in self._build_graph.feature_specs.items():
                per_atom = spec["per"] == "atom"
                key = (self.arrays_keys if per_atom else self.info_keys).get(name, name)
                old, new = (getattr(a, "arrays" if per_atom else "info").get(key) for a in (last, atoms))
                if not np.array_equal(np.asarray(old, dtype=object), np.asarray(new, dtype=object)):
                    changes.append("info")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: str | Iterable[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill :attr:`results`; ASE calls this when a property is asked for. ``properties=None`` means all
        of them.

        Raises:
            StructureError: see :class:`GraphBuilder`; also a result that is not finite.
        """
        super().calculate()
        if atoms is None:
            atoms = self.atoms
        else:
            self._last = Snapshot.of(atoms)
        asked = _names(self.implemented_properties if properties is None else properties)
        if system_changes:
            self.results = {}
            self._asked_before, self._asked = self._asked, frozenset()
        self._asked |= asked
        wanted = self._asked | self._asked_before
        outputs = self._evaluate(atoms, Wanted.of(wanted, self.compute_atomic_stresses))
        self.results = self.results | self._results(outputs, atoms)

    def forget_lists(self) -> None:
        """Find neighbours anew at the next step. Its results are then, to the last bit, those of a new calculator;
        otherwise they depend, by rounding, on the step at which the present list was made.
        """
        if self.stepper is not None:
            self.stepper.forget_lists()

    def evaluate(
        self,
        structures: Iterable[Atoms],
        properties: str | Iterable[str] = ("energy", "forces"),
        *,
        atoms_per_batch: int | None = None,
    ) -> list[dict[str, Any]]:
        """Results of many structures, several in one evaluation; see :func:`mace_fast.evaluate`.

        Structures of like sizes are put together, up to ``atoms_per_batch`` atoms or one structure; by default 2048 on
        a GPU and 256 on a CPU. Where a GPU has no memory for that, halves are tried.

        Returns:
            For each structure, in order, what :attr:`results` would hold. Neither that nor :attr:`atoms` change.

        Raises:
            PropertyNotImplementedError: of a property that :attr:`implemented_properties` does not list.
            StructureError: names the number of the structure, from 0.
            TypeError: one structure in place of several, or something that is none.
        """
        asked = _names(properties)
        unknown = sorted(asked - set(self.implemented_properties))
        if unknown:
            raise PropertyNotImplementedError(
                f"{', '.join(unknown)}: this model has {', '.join(self.implemented_properties)}"
            )
        wanted = Wanted.of(asked, self.compute_atomic_stresses)
        given = _several(structures)
        if self.stepper is None or wanted.atomic_stresses:
            return [self._one_of_many(number, atoms, wanted) for number, atoms in enumerate(given)]
        if self._batches is None:
            # Its lists and graphs are not those of dynamics.
            self._batches = self.stepper.like(skin=0.0, varied=True)
        limit = atoms_per_batch or _ATOMS_PER_BATCH.get(self.device.type, 2048)
        results: list[dict[str, Any]] = [{}] * len(given)
        if not given:
            return results
        everything = self._build_graph.read_all(given)
        for chosen in pack(np.diff(everything.ptr).tolist(), limit):
            batch = take(everything, np.array(chosen))
            found = evaluate_batch(self._batches, batch, wanted.forces, wanted.stress)
            outputs = self._together(found, wanted, batch.ptr)
            bad = find_not_finite(outputs, batch.ptr)
            if bad is not None:
                number, name = chosen[bad[0]], bad[1]
                raise StructureError(f"structure {number}: {not_finite(name, given[number])}")
            for number, result in zip(chosen, self._in_units(outputs, batch.species, batch.ptr), strict=True):
                results[number] = result
        return results

    def _one_of_many(self, number: int, atoms: Atoms, wanted: Wanted) -> dict[str, Any]:
        try:
            return self._results(self._evaluate_graph(atoms, wanted), atoms)
        except StructureError as exc:
            raise StructureError(f"structure {number}: {exc}") from exc

    def get_hessian(self, atoms: Atoms | None = None) -> np.ndarray | list[np.ndarray]:
        """Second derivatives of the energy, [3N, N, 3] in the model's units; a list of them for a
        committee.
        """
        graph = self._build_graph(self._atoms(atoms))
        hessians = [hessian(model, graph) for model in self.models]
        return hessians[0] if self.num_models == 1 else hessians

    def get_descriptors(
        self, atoms: Atoms | None = None, invariants_only: bool = True, num_layers: int = -1
    ) -> np.ndarray | list[np.ndarray]:
        """The node features that the model computes, [N, features]; a list of them for a committee.

        Args:
            invariants_only: keep the scalars of each layer.
            num_layers: how many layers, from the first; -1 for all.
        """
        graph = self._build_graph(self._atoms(atoms))
        arrays = descriptors(self.models, graph, invariants_only, num_layers)
        return arrays[0] if self.num_models == 1 else arrays

    def _atoms(self, atoms: Atoms | None) -> Atoms:
        if atoms is None and self.atoms is None:
            raise ValueError("no atoms are given, and none were calculated before")
        return self.atoms if atoms is None else atoms

    def _evaluate(self, atoms: Atoms, wanted: Wanted) -> dict[str, np.ndarray]:
        """What the models give, float64, first axis the model, in the models' units."""
        if self.stepper is None or wanted.atomic_stresses:
            return self._evaluate_graph(atoms, wanted)
        found = self.stepper(self._build_graph.read(atoms), forces=wanted.forces, stress=wanted.stress)
        return self._together(found, wanted, _one(atoms))

    def _evaluate_graph(self, atoms: Atoms, wanted: Wanted) -> dict[str, np.ndarray]:
        """By the models' own forward, with a neighbour list of this step."""
        graph = self._build_graph(atoms)
        found = []
        for program in self._programs:
            with torch.set_grad_enabled(wanted.forces):
                out = program(
                    fresh(graph),
                    compute_force=wanted.forces,
                    compute_stress=wanted.stress,
                    compute_edge_forces=wanted.atomic_stresses,
                    compute_atomic_stresses=wanted.atomic_stresses,
                )
            tensors = {name: out[name] for name in ("energy", *wanted.names)}
            found.append({name: value.detach().cpu().numpy().astype(np.float64) for name, value in tensors.items()})
        return self._together(found, wanted, _one(atoms))

    def _together(
        self, found: Sequence[Mapping[str, np.ndarray]], wanted: Wanted, ptr: np.ndarray
    ) -> dict[str, np.ndarray]:
        """A batch's outputs of the models, stacked; views where there is one model."""
        names = wanted.names
        if len(found) == 1:
            outputs = {name: found[0][name][None] for name in names}
        else:
            outputs = {name: np.stack([each[name] for each in found]) for name in names}
        outputs["energy"] = np.array(
            [
                total_energies(model, each["energy"], each["node_energy"], ptr)
                for model, each in zip(self.models, found, strict=True)
            ]
        )
        return outputs

    def _results(self, outputs: Mapping[str, np.ndarray], atoms: Atoms) -> dict[str, Any]:
        ptr = _one(atoms)
        bad = find_not_finite(outputs, ptr)
        if bad is not None:
            raise StructureError(not_finite(bad[1], atoms))
        return self._in_units(outputs, self._build_graph.species(atoms.numbers), ptr)[0]

    def _in_units(
        self, outputs: Mapping[str, np.ndarray], species: np.ndarray, ptr: np.ndarray
    ) -> list[dict[str, Any]]:
        if self._isolated is None:
            table = self.models[0].atomic_energies_fn.atomic_energies.detach().cpu().double().numpy()
            self._isolated = np.atleast_2d(table)[self._build_graph.head]
        # node_energy leaves out the first model's energies of the isolated atoms.
        return ase_results(outputs, self._isolated[species], ptr, self.energy_units_to_eV, self.length_units_to_A)


def _names(properties: str | Iterable[str]) -> frozenset[str]:
    """One name is one property, and not its letters."""
    return frozenset([properties] if isinstance(properties, str) else properties)


def _several(structures: Iterable[Atoms]) -> list[Atoms]:
    if isinstance(structures, Atoms):  # whose elements are of the class Atom
        raise TypeError("evaluate takes several structures, and got one Atoms: give it in a list, [atoms]")
    if isinstance(structures, (str, bytes, os.PathLike)):
        raise TypeError(
            f"evaluate takes structures, and got {structures!r}: read a file with ase.io.read(..., index=':')"
        )
    given = list(structures)
    for number, atoms in enumerate(given):
        if not isinstance(atoms, Atoms):
            raise TypeError(f"structure {number} is of the class {type(atoms).__name__}, and not ase.Atoms")
    return given


def _one(atoms: Atoms) -> np.ndarray:
    """Where the atoms of the only structure of a batch begin and end."""
    return np.array([0, len(atoms)])


def _warn_of_other_accelerators(**settings: Any) -> None:
    given = [name for name, value in settings.items() if value]
    if given:
        warnings.warn(
            f"{', '.join(given)}: no effect, mace_fast's own kernels are used",
            UserWarning,
            stacklevel=3,
        )
