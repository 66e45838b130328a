"""ASE's integrators for the ensembles: made from settings, and their inner state out and in for restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

from mace_fast.errors import RestartError, StructureError
from mace_fast.md.settings import MDSettings

_CHAINED = (NoseHooverChainNVT, IsotropicMTKNPT, MTKNPT)


def prepare_velocities(atoms: Atoms, temperature: float, seed: int) -> None:
    """Give ``atoms`` Maxwell-Boltzmann velocities without net momentum, unless they have velocities
    already.
    """
    if np.any(atoms.get_momenta()):
        return
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    if len(atoms) > 1:
        Stationary(atoms, preserve_temperature=False)  # the other 3N - 3 momenta have the temperature already


def degrees_of_freedom(atoms: Atoms, settings: MDSettings) -> int:
    """How many momenta share the thermal energy: without constraints 3N under Langevin's noise, else 3N - 3.

    All other integrators conserve the net momentum, whose three components therefore take no part.
    """
    if _leaves_net_momentum_out(atoms, settings):
        return 3 * len(atoms) - 3
    return int(atoms.get_number_of_degrees_of_freedom())


def temperature(atoms: Atoms, settings: MDSettings) -> float:
    """Instantaneous temperature in K: 2 K / (f kB), with f from :func:`degrees_of_freedom`; 0.0 where f is 0.

    Where f leaves out the net momentum P, so does K: it is the kinetic energy about the centre of mass, the sum of
    p_i^2 / 2m_i less P^2 / 2M (Koenig's theorem: Goldstein, Classical Mechanics, section 1.2; f: Allen and Tildesley,
    Computer Simulation of Liquids, section 2.4). A structure whose centre of mass moves, such as the last frame of a
    Langevin run, is no hotter for it.
    """
    freedom = degrees_of_freedom(atoms, settings)
    if freedom == 0:
        return 0.0
    kinetic = float(atoms.get_kinetic_energy())
    if _leaves_net_momentum_out(atoms, settings):
        net = atoms.get_momenta().sum(axis=0)
        kinetic -= float(net @ net) / (2 * float(atoms.get_masses().sum()))
    # Of atoms that move as one the difference is rounding, of either sign.
    return max(2 * kinetic / (freedom * units.kB), 0.0)


def _leaves_net_momentum_out(atoms: Atoms, settings: MDSettings) -> bool:
    langevin = settings.ensemble == "nvt" and settings.thermostat == "langevin"
    return not (atoms.constraints or len(atoms) == 1 or langevin)


def integrator(atoms: Atoms, settings: MDSettings) -> MolecularDynamics:
    """The ASE dynamics that ``settings`` names, on ``atoms`` and the calculator that they carry.

    Raises:
        StructureError: constraints where the integrator knows none, NPT of a cell that is not periodic.
    """
    timestep = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, timestep=timestep)
    if settings.ensemble == "nvt" and settings.thermostat == "langevin":
        return Langevin(
            atoms,
            timestep=timestep,
            temperature_K=settings.temperature,
            friction=settings.friction / units.fs,
            fixcm=False,  # holding the centre of mass samples another distribution; no result depends on where it is
            rng=_thermostat_rng(settings),
        )
    freedom = degrees_of_freedom(atoms, settings)
    if settings.ensemble == "nvt" and settings.thermostat == "bussi":
        if not atoms.get_kinetic_energy() > 0:
            raise StructureError("bussi rescales velocities, and no atom moves; use thermostat langevin")
        bussi = Bussi(
            atoms,
            timestep=timestep,
            temperature_K=settings.temperature,
            taut=settings.thermostat_time * units.fs,
            rng=_thermostat_rng(settings),
        )
        # ASE counts the net momentum, which is zero and stays so, among the momenta that are thermalised.
        bussi.ndof = freedom
        bussi.target_kinetic_energy = 0.5 * units.kB * settings.temperature * freedom
        return bussi
    return _chained(atoms, settings, freedom)


def _chained(atoms: Atoms, settings: MDSettings, freedom: int) -> MolecularDynamics:
    if atoms.constraints:
        name = "npt" if settings.ensemble == "npt" else "the nose-hoover thermostat"
        raise StructureError(
            f"{name} cannot hold constraints, and the structure has some ({_names(atoms)}); "
            "use nvt with thermostat langevin or bussi, or remove them"
        )
    shared = {
        "atoms": atoms,
        "timestep": settings.timestep * units.fs,
        # ASE's chains hold 3N momenta at the given temperature: this one gives the 3N - 3 that move the right one.
        "temperature_K": settings.temperature * freedom / (3 * len(atoms)),
        "tdamp": settings.thermostat_time * units.fs,
    }
    if settings.ensemble == "nvt":
        return NoseHooverChainNVT(**shared)
    if not all(atoms.pbc) or atoms.cell.rank < 3:
        raise StructureError(
            f"npt needs a cell that is periodic in all directions, and pbc is {atoms.pbc.tolist()}; use nvt"
        )
    barostat = MTKNPT if settings.cell == "full" else IsotropicMTKNPT
    return barostat(**shared, pressure_au=settings.pressure * units.GPa, pdamp=settings.barostat_time * units.fs)


def conserved_energy(dynamics: MolecularDynamics, total_energy: float) -> float | None:
    """What the exact dynamics would keep constant (eV); None for Langevin, which keeps nothing.

    For NVE the total energy; for the others it counts what thermostat and barostat hold.
    """
    if isinstance(dynamics, _CHAINED):
        return float(dynamics.get_conserved_energy())
    if isinstance(dynamics, Bussi):
        return total_energy - float(dynamics.transferred_energy)
    return None if isinstance(dynamics, Langevin) else total_energy


def integrator_state(dynamics: MolecularDynamics) -> dict[str, np.ndarray]:
    """Every number, array and random generator that ``dynamics`` keeps from one step to the next.

    All of them are taken, whatever ASE calls them, so that none is missed in another version of ASE. Keys are paths of
    attributes; a generator's state is JSON in bytes.
    """
    state = {}
    for prefix, part in _parts(dynamics):
        for name, value in vars(part).items():
            if isinstance(value, np.random.Generator):
                text = json.dumps(value.bit_generator.state).encode()
                state[prefix + name] = np.frombuffer(text, dtype=np.uint8)
            elif _is_numeric(value):
                state[prefix + name] = np.array(value)
    return state


def restore_integrator(dynamics: MolecularDynamics, state: Mapping[str, np.ndarray]) -> None:
    """The inverse of :func:`integrator_state`, into an integrator that was made from the same settings.

    Raises:
        RestartError: the integrator keeps something that ``state`` lacks.
    """
    for prefix, part in _parts(dynamics):
        own = dict(vars(part))
        for name, value in own.items():
            if (isinstance(value, np.random.Generator) or _is_numeric(value)) and prefix + name not in state:
                raise RestartError(
                    f"the restart file lacks {prefix + name} of {type(dynamics).__name__}: another version of ASE "
                    "wrote it; continue with that version"
                )
        for key, saved in state.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or "." in name:
                continue
            if isinstance(own.get(name), np.random.Generator):
                own[name].bit_generator.state = json.loads(saved.tobytes())
            else:
                setattr(part, name, saved.item() if saved.ndim == 0 else saved.copy())


def _parts(dynamics: MolecularDynamics) -> Iterator[tuple[str, Any]]:
    """The integrator, and the thermostat and barostat that it holds, with the prefix of their attributes."""
    yield "", dynamics
    for name, value in vars(dynamics).items():
        if type(value).__module__.startswith("ase.md."):
            yield f"{name}.", value


def _is_numeric(value: object) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_)) or (
        isinstance(value, np.ndarray) and value.dtype != object
    )


def _thermostat_rng(settings: MDSettings) -> np.random.Generator:
    return np.random.default_rng(settings.seed + 1)  # not the numbers that drew the velocities


def _names(atoms: Atoms) -> str:
    return ", ".join(sorted({type(constraint).__name__ for constraint in atoms.constraints}))
