"""What a molecular dynamics run is to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

ENSEMBLES = ("nve", "nvt", "npt")
THERMOSTATS = ("langevin", "nose-hoover", "bussi")
CELLS = ("isotropic", "full")
TRAJECTORY_FORMATS = ("extxyz", "traj")


@dataclass(frozen=True)
class MDSettings:
    """What to run.

    Attributes:
        steps: number of steps.
        ensemble: "nvt", "nve" (velocity Verlet) or "npt" (Martyna, Tobias and Klein, J. Chem. Phys. 101, 4177
            (1994), with chains of thermostats on atoms and cell).
        temperature: K; of the thermostat, and of the velocities drawn at the start if the structure has none.
        timestep: fs.
        friction: 1/fs, of the Langevin thermostat.
        seed: of the initial velocities and of the thermostat.
        log_interval: steps between rows of the log and frames of the trajectory.
        thermostat: of NVT: "langevin", "nose-hoover" (a chain of three) or "bussi" (stochastic velocity
            rescaling).
        thermostat_time: fs, the time constant of nose-hoover, bussi and NPT.
        pressure: GPa, of NPT.
        barostat_time: fs, the time constant of NPT's cell.
        cell: what NPT changes: "isotropic" scales the cell, "full" lets every length and angle move.
        trajectory: "extxyz" (text, eight decimals) or "traj" (ASE's binary format, exact).
        restart_interval: steps between restart points, at each of which the calculator starts afresh.

    Raises:
        ValueError: names the setting that makes no sense, or that these dynamics do not read.
    """

    steps: int
    ensemble: str = "nvt"
    temperature: float = 300.0
    timestep: float = 1.0
    friction: float = 0.01
    seed: int = 0
    log_interval: int = 10
    thermostat: str = "langevin"
    thermostat_time: float = 100.0
    pressure: float = 1e-4
    barostat_time: float = 1000.0
    cell: str = "isotropic"
    trajectory: str = "extxyz"
    restart_interval: int = 200

    def __post_init__(self) -> None:
        for name, known in (
            ("ensemble", ENSEMBLES),
            ("thermostat", THERMOSTATS),
            ("cell", CELLS),
            ("trajectory", TRAJECTORY_FORMATS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("steps", "log_interval", "restart_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and is {getattr(self, name)}")
        for name in ("timestep", "friction", "thermostat_time", "barostat_time"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, and is {getattr(self, name)}")
        for name in ("temperature", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, and is {getattr(self, name)}")
        for name in ("timestep", "friction", "thermostat_time", "barostat_time", "temperature", "pressure"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, and is {getattr(self, name)}")
        for name, where in self.without_effect().items():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}={getattr(self, name)} does nothing with {self._dynamics}: it is {where}")
        if self.temperature == 0 and self.rescales_momenta:
            raise ValueError("temperature must be above 0 for this thermostat; thermostat='langevin' cools to 0 K")

    def without_effect(self) -> dict[str, str]:
        """The settings that this run does not read, and of which runs they are; they keep their defaults."""
        langevin = self.ensemble == "nvt" and self.thermostat == "langevin"
        read = {
            "thermostat": (self.ensemble == "nvt", "of nvt"),
            "friction": (langevin, "of nvt with thermostat langevin"),
            "thermostat_time": (self.rescales_momenta, "of npt, and of nvt with thermostat nose-hoover or bussi"),
            **dict.fromkeys(("pressure", "barostat_time", "cell"), (self.ensemble == "npt", "of npt")),
        }
        return {name: where for name, (is_read, where) in read.items() if not is_read}

    @property
    def _dynamics(self) -> str:
        return self.ensemble + (f" and thermostat {self.thermostat}" if self.ensemble == "nvt" else "")

    @property
    def rescales_momenta(self) -> bool:
        """Whether a thermostat scales all momenta by one factor, which keeps a net momentum of zero."""
        return self.ensemble == "npt" or (self.ensemble == "nvt" and self.thermostat != "langevin")

    @property
    def has_thermostat(self) -> bool:
        """Whether the temperature is held."""
        return self.ensemble != "nve"
