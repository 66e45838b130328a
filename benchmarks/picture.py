"""Pictures of results that are there: times beside the peers', and the roofline of the convolutions.

python -m benchmarks.picture               # benchmarks/results/h100-*.json -> h100-speed.png, h100-conv.png
python -m benchmarks.picture --gpu h200    # the same of an H200, as far as there are results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.roofline import plot_roofline

_NAMES = {
    "e3nn": "mace-torch",
    "mace-torch": "mace-torch",
    "cueq": "with cuEquivariance",
    "oeq": "with OpenEquivariance",
    "mace_fast": "mace_fast",
    "mace_fast_inference": "mace_fast",
}
_COLOURS = {
    "mace-torch": "#a0aec0",
    "with cuEquivariance": "#718096",
    "with OpenEquivariance": "#4a5568",
    "mace_fast": "#2f855a",
}
_THICK = 0.8
_SPAN_MS = (0.1, 2000)

Times = dict[str, dict[str, float]]
"""Name of what was timed -> name of who was timed -> ms."""


def times_of(rows: Sequence[Mapping[str, Any]]) -> Times:
    """The times of rows of benchmarks/step.py or benchmarks/model.py that have others beside ours, slowest last."""
    found: Times = {}
    for row in rows:
        if row["backend"] in _NAMES and row.get("ms") is not None:
            label = f"{row['model']}, {row['natoms']} atoms" + (", float64" if row["dtype"] == "float64" else "")
            found.setdefault(label, {})[_NAMES[row["backend"]]] = float(row["ms"])
    beside = {label: entry for label, entry in found.items() if len(entry) > 1 and "mace_fast" in entry}
    return dict(sorted(beside.items(), key=lambda item: item[1]["mace_fast"]))


def draw_times(panels: Mapping[str, Times], title: str, target: Path) -> None:
    """Bars of ms on a logarithmic scale, a panel for each title."""
    heights = [sum(len(entry) + 1 for entry in times.values()) for times in panels.values()]
    figure = Figure(figsize=(8, 1.2 + 0.17 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for where, (name, times) in zip(axes, panels.items(), strict=True):
        _draw_panel(where, times)
        where.set_title(name, loc="left", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[-1].set_xlabel("ms (logarithmic)")
    figure.legend(unique.values(), unique.keys(), fontsize=8, loc="outside lower center", ncols=len(unique))
    figure.savefig(target, dpi=110)


def _draw_panel(axes: Axes, times: Times) -> None:
    place, ticks = 0.0, []
    for entry in times.values():
        first = place
        for who in _COLOURS:
            if who in entry:
                axes.barh(place, entry[who], height=_THICK, color=_COLOURS[who], label=who)
                text = f" {entry[who]:.3g}"
                if who == "mace_fast":
                    best = min(ms for other, ms in entry.items() if other != who)
                    text += f"  ({best / entry[who]:.0f} times)"
                axes.text(entry[who], place, text, va="center", fontsize=7)
                place += 1
        ticks.append((first + place - 1) / 2)
        place += 1
    axes.set(xscale="log", xlim=_SPAN_MS, yticks=ticks, yticklabels=list(times), ylim=(place - 1.2, -0.8))
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIRECTORY")
    parser.add_argument("--gpu", default="h100", help="how the results' names begin (default: h100)")
    args = parser.parse_args()
    paths = {name: args.results / f"{args.gpu}-{name}.json" for name in ("step", "model", "model-float64", "conv")}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    rows = {name: result["rows"] for name, result in found.items()}
    panels = {
        "A step of ASE dynamics, neighbour list included": times_of(rows.get("step", [])),
        "Energy, forces and stress, the graph on the device": times_of(
            [*rows.get("model", []), *rows.get("model-float64", [])]
        ),
    }
    panels = {name: times for name, times in panels.items() if times}
    if panels:
        title = f"{found['model']['device']} (in brackets: how many times as fast as the fastest peer)"
        draw_times(panels, title, args.results / f"{args.gpu}-speed.png")
    if "conv" not in found:
        return
    conv = found["conv"]
    peaks = [row["fwd_TFLOPs"] / row["fwd_peak_fraction"] for row in conv["rows"] if row.get("fwd_peak_fraction")]
    peak = 1e12 * max(peaks) if peaks else None
    target = args.results / f"{args.gpu}-conv.png"
    plot_roofline(conv["rows"], conv["device"], conv["copy_TBs"] * 1e12, peak, target)


if __name__ == "__main__":
    main()
