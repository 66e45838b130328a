"""Pictures of an MD run (energy, temperature, drift, how fast it went) and of a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mace_fast.md.dynamics import MDResult
from mace_fast.md.relax import RelaxResult

_BLUE, _RED, _GREY, _GREEN = "#2b6cb0", "#c53030", "#718096", "#2f855a"


def draw_run(result: MDResult, path: Path, *, title: str, speeds: Mapping[str, float] | None = None) -> None:
    """Write a PNG with the energies, the temperature, and where there is one the drift of ``result`` over time.

    Args:
        result: the run.
        path: the file to write.
        title: the heading.
        speeds: seconds a step by name of what was timed; adds a panel that compares them, the slowest as
            the unit.
    """
    drift = result.drift
    figure, axes = _panels(2 + (drift is not None) + (speeds is not None), title)
    _draw_energy(axes[0], result)
    _draw_temperature(axes[1], result)
    if drift is not None:
        _draw_drift(axes[2], result, drift)
    if speeds is not None:
        _draw_speeds(axes[-1], speeds)
    figure.savefig(path, format="png")


def draw_relaxation(result: RelaxResult, path: Path, *, title: str) -> None:
    """Write a PNG with the energy and the largest force of ``result`` over its steps."""
    figure, axes = _panels(2, title)
    steps = [row.step for row in result.rows]
    end = result.rows[-1].energy
    axes[0].plot(steps, [(row.energy - end) * 1000 / result.num_atoms for row in result.rows], color=_BLUE, lw=1.6)
    axes[0].set(xlabel="step", ylabel="energy above the end (meV/atom)")
    axes[0].set_title("Energy", loc="left", fontsize=11)
    axes[1].plot(steps, [row.largest_force for row in result.rows], color=_RED, lw=1.4)
    axes[1].axhline(result.settings.fmax, color=_GREY, lw=1, ls="--")
    axes[1].set(xlabel="step", ylabel="largest force (eV/A)")
    if all(row.largest_force > 0 for row in result.rows):
        axes[1].set_yscale("log")
    axes[1].set_title("Force", loc="left", fontsize=11)
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path, format="png")


def _panels(count: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.6 * count, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _draw_energy(axis: Axes, result: MDResult) -> None:
    times = [sample.time_ps for sample in result.samples]
    start = result.samples[0].total_energy
    scale = 1000 / result.num_atoms
    potential_start = result.samples[0].potential_energy
    total = [(sample.total_energy - start) * scale for sample in result.samples]
    potential = [(sample.potential_energy - potential_start) * scale for sample in result.samples]
    axis.plot(times, potential, color=_GREY, lw=1.2, label="potential")
    axis.plot(times, total, color=_BLUE, lw=1.6, label="total")
    axis.set(xlabel="time (ps)", ylabel="energy above the start (meV/atom)")
    axis.set_title("Energy", loc="left", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)


def _draw_temperature(axis: Axes, result: MDResult) -> None:
    times = [sample.time_ps for sample in result.samples]
    temperatures = [sample.temperature for sample in result.samples]
    axis.plot(times, temperatures, color=_RED, lw=1.4)
    if result.settings.has_thermostat:
        target = result.settings.temperature
        # A sample of 3N momenta fluctuates by this much around the thermostat's temperature.
        spread = target * np.sqrt(2 / (3 * result.num_atoms))
        axis.axhspan(target - spread, target + spread, color=_RED, alpha=0.10, lw=0)
        axis.axhline(target, color=_GREY, lw=1, ls="--")
    axis.set(xlabel="time (ps)", ylabel="temperature (K)")
    axis.set_title("Temperature", loc="left", fontsize=11)
    axis.grid(alpha=0.25)


def _draw_drift(axis: Axes, result: MDResult, drift: float) -> None:
    times = np.array([sample.time_ps for sample in result.samples])
    # Never None here: a result with a drift conserves something.
    energies = np.array([sample.conserved_energy for sample in result.samples], dtype=float)
    energies = (energies - energies[0]) * 1000 / result.num_atoms
    axis.plot(times, energies, color=_BLUE, lw=1.2)
    axis.plot(times, drift * (times - times.mean()) + energies.mean(), color=_GREY, lw=1, ls="--")
    axis.annotate(f"{drift:+.3g} meV/atom/ps", (0.03, 0.03), xycoords="axes fraction", color=_BLUE)
    axis.set(xlabel="time (ps)", ylabel="conserved energy above the start (meV/atom)")
    axis.set_title("Drift", loc="left", fontsize=11)
    axis.grid(alpha=0.25)


def _draw_speeds(axis: Axes, speeds: Mapping[str, float]) -> None:
    slowest = max(speeds.values())
    names = list(speeds)
    milliseconds = [1000 * speeds[name] for name in names]
    fastest = min(milliseconds)
    colors = [_GREEN if value == fastest else _GREY for value in milliseconds]
    bars = axis.barh(names, milliseconds, color=colors, height=0.55)
    labels = [_speed_label(speeds[name], slowest) for name in names]
    axis.bar_label(bars, labels=labels, padding=4, fontsize=10)
    axis.set_xlim(0, 1.45 * max(milliseconds))
    axis.invert_yaxis()
    axis.set(xlabel="wall time of one MD step (ms)")
    axis.set_title("Speed, same structure, same run", loc="left", fontsize=11)


def _speed_label(seconds: float, slowest: float) -> str:
    milliseconds = 1000 * seconds
    text = f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
    return text if seconds == slowest else f"{text}\n{slowest / seconds:.1f} times faster"
