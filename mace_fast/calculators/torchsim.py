"""torch-sim's model interface: batched dynamics and relaxation of many systems with mace_fast's kernels.

    from mace_fast.calculators.torchsim import MACEFastModel

    model = MACEFastModel("my.model", device="cuda", default_dtype="float32")
    torch_sim.integrate(system=frames, model=model, ...)

Needs torch-sim (``pip install torch-sim-atomistic``), which nothing else in mace_fast does.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mace_fast.calculators.ase import MACEFastCalculator
from mace_fast.calculators.graph import (
    FEATURE_DEFAULTS,
    INFO_KEYS,
    check_cells,
    check_feature,
    check_positions,
    check_structures,
    naming,
)
from mace_fast.calculators.results import total_energies
from mace_fast.calculators.screening import Model
from mace_fast.errors import MissingToolError, StructureError, UnsupportedModuleError
from mace_fast.inference import Structures


def _interface() -> Any:
    try:
        return importlib.import_module("torch_sim.models.interface").ModelInterface
    except ImportError as error:
        raise MissingToolError(
            f"torch-sim cannot be imported ({error}); install it: pip install torch-sim-atomistic"
        ) from error


_ModelInterface: Any = _interface()


class MACEFastModel(_ModelInterface):
    """A MACE model for torch-sim. Between calls it keeps the neighbour list, with a skin, and CUDA graphs.

    Results follow torch-sim's conventions: eV and A, detached, on the device and in the dtype of the state's positions.
    The systems of a state may be of any sizes; a system's results do not depend on the others, beyond rounding.

    Args:
        model: a file, a public model's name, a module, or a :class:`MACEFastCalculator` whose frozen program is used.
        compute_forces, compute_stress: what :meth:`forward` returns; both can be set later.
        features: what every system has of the model's further inputs where the state does not say, as
            ``{"total_charge": 1, "total_spin": 2}`` (e, multiplicity). A state says it in its fields ``charge`` and
            ``spin``, [systems] each. torch-sim 0.3 has no such fields, makes states from atoms without them, and loses
            those that are set when a run begins. What neither says is 0 and 1, with a warning.
        **settings: of the calculator that is made (``device``, ``default_dtype``, ``head``, ``skin``, ``cuda_graph``,
            ``verify`` ...).

    Raises:
        UnsupportedModuleError: the model has no frozen form.
        TypeError: settings beside a calculator.
        ValueError: ``features`` names what the model does not take.
    """

    def __init__(
        self,
        model: MACEFastCalculator | Model,
        *,
        compute_forces: bool = True,
        compute_stress: bool = True,
        features: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, MACEFastCalculator):
            if settings:
                raise TypeError(f"{', '.join(sorted(settings))}: these were given when the calculator was made")
            calculator = model
        else:
            given = "models" if isinstance(model, torch.nn.Module) else "model_paths"
            calculator = MACEFastCalculator(**{given: model}, **settings)  # type: ignore[arg-type]
        if calculator.stepper is None:
            raise UnsupportedModuleError("the model has no frozen form, which the torch-sim interface runs")
        self._calculator = calculator
        self._stepper = calculator.stepper.like()
        self._device = calculator.device
        self._dtype = getattr(torch, calculator.default_dtype)
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._memory_scales_with = "n_atoms_x_density"
        self._features = dict(features or {})
        self._stated: set[str] = set()
        known = calculator._build_graph.feature_specs
        for name in self._features:
            if name not in known:
                raise ValueError(f"features={self._features}: the model takes {', '.join(known) or 'none'}")
        self._warned: set[str] = set()

    @property
    def compute_forces(self) -> bool:
        """Whether forces are returned."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether stresses are returned."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Energy [systems], and where asked for forces [atoms, 3] and stress [systems, 3, 3].

        Args:
            state: torch-sim's ``SimState``, or a mapping with its fields.

        Raises:
            StructureError: as the ASE calculator; names the system. Also a state without a charge (or spin ...) after
                one that had it: a run that began with it has lost it.
            ValueError: the atoms of a system do not follow one another.
        """
        positions = _field(state, "positions")
        calculator = self._calculator
        unit, length = calculator.energy_units_to_eV, calculator.length_units_to_A
        structures = self._read(state)
        found = self._stepper(structures, forces=self._compute_forces, stress=self._compute_stress)

        def mean(values: list[np.ndarray], factor: float) -> Tensor:
            array = np.mean(values, axis=0) * factor
            return torch.from_numpy(array).to(positions.device, positions.dtype)

        energies = [
            np.array(total_energies(model, each["energy"], each["node_energy"], structures.ptr))
            for model, each in zip(calculator.models, found, strict=True)
        ]
        results = {"energy": mean(energies, unit)}
        if self._compute_forces:
            results["forces"] = mean([each["forces"] for each in found], unit / length)
        if self._compute_stress:
            results["stress"] = mean([each["stress"] for each in found], unit / length**3)
        return results

    def _read(self, state: Any) -> Structures:
        positions = _numpy(_field(state, "positions"), np.float64)
        cells = _numpy(_field(state, "cell"), np.float64).reshape(-1, 3, 3).swapaxes(1, 2)  # columns are the vectors
        batch = _numpy(_field(state, "system_idx"), np.int64)
        numbers = _numpy(_field(state, "atomic_numbers"), np.int64)
        if (np.diff(batch) < 0).any():
            raise ValueError("the atoms of a system must follow one another: system_idx is not sorted")
        periodic = np.broadcast_to(_numpy(_field(state, "pbc"), np.bool_), (len(cells), 3))
        ptr = np.concatenate([[0], np.cumsum(np.bincount(batch, minlength=len(cells)))])

        def check(number: int) -> None:
            check_positions(positions[ptr[number] : ptr[number + 1]])
            check_cells(cells[number : number + 1], periodic[number : number + 1])

        with naming("system", len(cells), check):
            check_structures(positions, cells, periodic, ptr)
        builder = self._calculator._build_graph
        return Structures(
            positions=positions,
            cells=np.ascontiguousarray(cells),
            pbc=np.ascontiguousarray(periodic),
            species=builder.species_index(numbers),
            ptr=ptr,
            features={name: self._feature(state, name, spec, ptr) for name, spec in builder.feature_specs.items()},
            head=builder.head,
        )

    def _feature(self, state: Any, name: str, spec: Mapping[str, Any], ptr: np.ndarray) -> np.ndarray:
        """A further input of the model, [systems] or [atoms, columns] float64: the state's, else the one that was given
        for all systems, else mace-torch's default."""
        systems, atoms = len(ptr) - 1, int(ptr[-1])
        per_atom = spec["per"] == "atom"
        field = INFO_KEYS.get(name, name)  # a state names them as atoms.info does
        value = state.get(field) if isinstance(state, Mapping) else getattr(state, field, None)
        where = f"the state's field {field!r}"
        if value is not None:
            self._stated.add(name)
        elif name in self._features:
            value, where = np.full(atoms if per_atom else systems, self._features[name]), "features of this model"
        elif name in self._stated:
            raise StructureError(
                f"an earlier state had {name} in its field {field!r}, which this one lacks: torch-sim loses it in a "
                f"run; give MACEFastModel(..., features={{{name!r}: ...}}), for all systems"
            )
        elif name in FEATURE_DEFAULTS and not per_atom:
            value, where = np.full(systems, FEATURE_DEFAULTS[name]), "the default"
            self._warn_of_default(name, field)
        else:
            raise StructureError(f"the model takes {name!r}, which the state lacks; set its field {field!r}")
        array = _numpy(value, np.float64)
        starts = ptr if per_atom else np.arange(systems + 1)

        def check(number: int) -> None:
            begin, end = int(starts[number]), int(starts[number + 1])
            check_feature(name, spec, array[begin:end], end - begin, where)

        with naming("system", systems, check):
            return check_feature(name, spec, array, atoms if per_atom else systems, where)

    def _warn_of_default(self, name: str, field: str) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        warnings.warn(
            f"the model takes {name!r}, and the state has no field {field!r}: every system gets "
            f"{FEATURE_DEFAULTS[name]:g}. Set state.{field} (one number a system), or give "
            f"MACEFastModel(..., features={{{name!r}: ...}}) for all systems; in torch-sim 0.3 "
            "atoms_to_state makes no such field of atoms.info",
            UserWarning,
            stacklevel=4,
        )


def _field(state: Any, name: str) -> Any:
    return state[name] if isinstance(state, Mapping) else getattr(state, name)


def _numpy(values: Any, dtype: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=dtype)
