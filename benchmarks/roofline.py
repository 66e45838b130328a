"""The picture of benchmarks/conv.py: rates of the forward pass under the roofs of bandwidth and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_roofline(
    rows: Sequence[Mapping[str, Any]], device: str, bandwidth: float, peak: float | None, target: Path
) -> None:
    """Draw float32 rows on graphs of diamond.

    Args:
        rows: of benchmarks/conv.py, with ``fwd_TFLOPs`` and ``fwd_operations_per_byte``.
        device: its name, for the title.
        bandwidth: bytes per second of a copy.
        peak: operations per second, or None where it is not known.
        target: PNG file.
    """
    shown = [
        r
        for r in rows
        if "fwd_TFLOPs" in r
        and r["dtype"] == "float32"
        and r["graph"].startswith("diamond")
        and r["backend"] != "mace_fast-clusters"  # whose forward pass is that of mace_fast
    ]
    if not shown:
        raise ValueError("no float32 row on a diamond graph to draw")
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensities = [float(r["fwd_operations_per_byte"]) for r in shown]
    span = np.geomspace(min(intensities) / 2, max(intensities) * 4, 100)
    roof = span * bandwidth / 1e12
    axes.plot(span, roof if peak is None else np.minimum(roof, peak / 1e12), color="black", label="roof")
    for backend in dict.fromkeys(r["backend"] for r in shown):
        mine = [r for r in shown if r["backend"] == backend]
        x, y = ([float(r[key]) for r in mine] for key in ("fwd_operations_per_byte", "fwd_TFLOPs"))
        axes.scatter(x, y, label=backend, zorder=3)
    for problem in dict.fromkeys(r["problem"] for r in shown):
        best = max((r for r in shown if r["problem"] == problem), key=lambda r: r["fwd_TFLOPs"])
        at = (best["fwd_operations_per_byte"], best["fwd_TFLOPs"])
        axes.annotate(problem, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="operations per byte that has to move",
        ylabel="TFLOP/s, forward",
        title=f"Convolution, float32, {device}",
    )
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
