"""Convert and freeze every public architecture, with random weights, and prove each.

    python scripts/verify_zoo.py --device cuda --output zoo.json
    python scripts/verify_zoo.py mp0-small mh-1 --device cpu

A model in float32 is compared with mace-torch in float64 and in float32. The exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import torch

from mace_fast import convert, verify, zoo
from mace_fast.inference import FrozenMACE, verify_frozen


def prove(name: str, device: torch.device) -> dict[str, object]:
    """One architecture, converted and frozen: whether all is equal, and how long that took."""
    begin = time.perf_counter()
    model = zoo.build(name, dtype=torch.float32).to(device)
    fast = convert(model, verify=False)
    reports = {"converted": verify(model, fast), "frozen": verify_frozen(model, FrozenMACE(fast))}
    row: dict[str, object] = {"architecture": name, "passed": all(report.passed for report in reports.values())}
    for kind, report in reports.items():
        # What is exactly zero in mace-torch has no tolerance.
        results = max(found.error / found.tolerance for found in report.rows if found.tolerance)
        modules = max((found.error / found.tolerance for found in report.modules if found.tolerance), default=0.0)
        row[f"{kind}_worst_of_allowed"] = float(f"{max(results, modules):.3g}")
        row |= {} if report.passed else {f"{kind}_report": str(report)}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    names = sorted(zoo.architectures())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[], help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="write JSON rows here")
    args = parser.parse_args()
    unknown = set(args.names) - set(names)
    if unknown:
        parser.error(f"no architecture is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    device = torch.device(args.device)
    rows = []
    for name in args.names or names:
        try:
            rows.append(prove(name, device))
        except torch.cuda.OutOfMemoryError:
            rows.append({"architecture": name, "passed": None, "error": "out of memory"})
        print(rows[-1], flush=True)
        if args.output:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            found = {"command": " ".join(["python", *sys.argv]), "device": where, "torch": torch.__version__}
            args.output.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
    sys.exit(0 if all(row["passed"] is not False for row in rows) else 1)


if __name__ == "__main__":
    main()
