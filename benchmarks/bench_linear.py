"""One adapted projection, forward and backward: what it costs over the frozen one, for every contender.

    python benchmarks/bench_linear.py [--quick]

Gradients are checked against fp64 before anything is timed. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Case, Contender, contenders
from timing import (
    clocks,
    interleaved,
    kept_bytes,
    peak_bytes,
    result_name,
    surroundings,
    verdict,
    write_results,
)
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
FP32, BF16 = torch.float32, torch.bfloat16

TARGETS = {
    ("cpu", "float32 768×768 N=2048 r=16", "ours"): 1.14,
    ("cpu", "float32 384×384 N=2048 r=16", "ours"): 1.26,
    ("cpu", "bfloat16 768×768 N=2048 r=16", "ours"): 1.55,
    ("cpu", "bfloat16 384×384 N=2048 r=16", "ours"): 2.4,
    ("cuda", "bfloat16 4096×4096 N=8192 r=16", "ours"): 1.16,
    ("cuda", "bfloat16 4096×4096 N=8192 r=16", "ours, update first"): 1.16,
    ("cuda", "bfloat16 4096×4096 N=8192 r=16", "ours, A frozen"): 1.10,
}
KEPT_TARGETS = {"ours": 9.0, "ours, A frozen": 1.0}  # MiB, query, key and value on one bf16 input of 8 MiB


def cases(device: str, *, quick: bool, full: bool) -> Iterator[Case]:
    """The grid: whole with --full, otherwise each axis by itself around the middle of the targets."""
    if device == "cpu":
        for dtype in (FP32, BF16):
            for size in (384,) if quick else (768, 384, 2048):
                yield Case(size, size, 512 if quick else 2048, 16, dtype)
            if not quick:
                yield from (Case(768, 768, 2048, rank, dtype) for rank in (8, 64))
                yield Case(768, 768, 2048, 16, dtype, dropout=0.1)
        return
    middle = Case(4096, 4096, 8192, 16, BF16, device=device)
    shapes = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (1024, 1024)]
    if full:
        for out_features, in_features in shapes:
            for tokens in (512, 2048, 8192):
                for rank in (8, 16, 64):
                    for dropout in (0.0, 0.1):
                        yield Case(out_features, in_features, tokens, rank, BF16, dropout, device)
        return
    yield middle
    if quick:
        return
    yield from (replace(middle, out_features=out, in_features=into) for out, into in shapes[1:])
    yield from (replace(middle, tokens=tokens) for tokens in (512, 2048))
    yield from (replace(middle, rank=rank) for rank in (8, 64))
    yield replace(middle, dropout=0.1)


@dataclass(frozen=True)
class Row:
    """What one contender took in one case. Times are over the frozen projection's median."""

    contender: str
    ratio: float
    p10: float
    p90: float
    captured: float | None
    limit: float
    kept_MiB: float
    peak_MiB: float
    target: float | None
    undisturbed: bool


class Inputs:
    """As many x and dY as exceed the last-level cache of a GPU; one of each on the CPU."""

    def __init__(self, case: Case) -> None:
        bytes_each = case.tokens * case.in_features * case.dtype.itemsize
        sets = 1 if case.device == "cpu" else max(2, -(-(256 << 20) // bytes_each))
        generator = torch.Generator(case.device).manual_seed(1)

        def normal(features: int) -> Tensor:
            values = torch.randn(case.tokens, features, generator=generator, device=case.device)
            return values.to(case.dtype)

        self.x = [normal(case.in_features).requires_grad_() for _ in range(sets)]
        self.dY = [normal(case.out_features) for _ in range(sets)]

    def step(self, contender: Contender, index: int) -> None:
        contender.run(self.x[index % len(self.x)]).backward(self.dY[index % len(self.dY)])


def exact(contender: Contender, x: Tensor, dY: Tensor) -> list[Tensor]:
    """y, dX and the gradients of the factors, by the definition, in fp64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *contender.factors)]
    weight = contender.alive[0].double()
    if contender.update is not None:
        weight = weight + contender.update(*leaves[1:])
    y = leaves[0] @ weight.t()
    return [y.detach(), *torch.autograd.grad(y, leaves, dY.double())]


def check(case: Case, named: dict[str, Contender], inputs: Inputs) -> None:
    """Exits unless every output and gradient is that of fp64 to the dtype's accuracy, and none is zero."""
    x, dY = inputs.x[0], inputs.dY[0]
    tolerance = 1e-4 if case.dtype == FP32 else 0.05
    known: dict[object, list[Tensor]] = {}  # several contenders compute the same function
    for name, contender in named.items():
        if contender.update not in known:
            known[contender.update] = exact(contender, x, dY)
        y, wanted = contender.run(x), known[contender.update]
        for value, reference in zip(
            (y, *torch.autograd.grad(y, (x, *contender.factors), dY)), wanted, strict=True
        ):
            error = ((value.double() - reference).norm() / reference.norm()).item()
            if not error < tolerance or not value.any():
                raise SystemExit(f"{case.name}: {name!r} is {error:.2g} off fp64; nothing was timed")


def measure(case: Case, *, warmups: int, repeats: int, patience: float, compiled: bool) -> list[Row]:
    """One row a contender. The gradients are checked without dropout, whose masks differ."""
    torch.compiler.reset()
    inputs = Inputs(case)
    check(case, contenders(replace(case, dropout=0.0), compiled=compiled), inputs)
    named = contenders(case, compiled=compiled)
    leaves = [*inputs.x, *(factor for contender in named.values() for factor in contender.factors)]

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    steps = {name: partial(inputs.step, contender) for name, contender in named.items()}
    times = interleaved(
        steps, warmups=warmups, repeats=repeats, device=case.device, after=forget, patience=patience
    )
    floor = times["frozen"].median
    ratios = {name: taken.median / floor for name, taken in times.items()}
    rows = []
    for name, contender in named.items():
        room = ratios["naive"] - contender.limit
        kept = kept_bytes(lambda run=contender.run: run(inputs.x[0]), contender.alive)
        peak = peak_bytes(partial(steps[name], 0), case.device)
        forget()
        rows.append(
            Row(
                contender=name,
                ratio=ratios[name],
                p10=times[name].quantile(0.1) / floor,
                p90=times[name].quantile(0.9) / floor,
                captured=(ratios["naive"] - ratios[name]) / room if name != "frozen" and room > 0 else None,
                limit=contender.limit,
                kept_MiB=kept / 2**20,
                peak_MiB=peak / 2**20,
                target=TARGETS.get((case.device, case.name, name)),
                undisturbed=times[name].undisturbed,
            )
        )
    return rows


def shared_input(device: str) -> dict[str, float]:
    """MiB kept for backward by query, key and value of 1024 features on one bf16 input of 8 MiB."""
    case = Case(1024, 1024, 4096, 16, BF16, device=device)
    named = contenders(case, compiled=False)
    h = torch.zeros(case.tokens, case.in_features, dtype=BF16, device=device, requires_grad=True)

    def forward(contender: Contender) -> list[Tensor]:
        x = h * 1  # an activation, which only backward holds
        return [contender.run(x) for _ in range(3)]

    return {
        name: kept_bytes(partial(forward, contender), contender.alive) / 2**20
        for name, contender in named.items()
    }


def markdown(facts: dict[str, str], measured: dict[str, list[Row]], kept: dict[str, float]) -> str:
    lines = [
        "# One adapted projection",
        "",
        "Time of forward and backward over that of the frozen projection.",
    ]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in measured.items():
        lines += ["", f"## {name}", ""]
        if not rows[0].undisturbed:
            lines += ["Other processes took the processors during most of these steps.", ""]
        lines += [
            "| contender | T/T_frozen | p10–p90 | target | overhead captured | limit | kept MiB | peak MiB |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row.contender} | {row.ratio:.2f} | {row.p10:.2f}–{row.p90:.2f} | "
            f"{verdict(row.ratio, row.target)} | "
            f"{'–' if row.captured is None else format(row.captured, '.0%')} | {row.limit:.3f} | "
            f"{row.kept_MiB:.2f} | {row.peak_MiB:.1f} |"
            for row in rows
        ]
    lines += ["", "## Kept for backward: query, key and value on one bf16 input of 8 MiB", ""]
    lines += ["| contender | MiB | target |", "|---|---|---|"]
    lines += [
        f"| {name} | {MiB:.2f} | {f'≤ {KEPT_TARGETS[name]:g}' if name in KEPT_TARGETS else '–'} |"
        for name, MiB in kept.items()
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case and few repeats: does it run?")
    parser.add_argument("--full", action="store_true", help="on a GPU, every combination (about an hour)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument(
        "--patience",
        type=float,
        default=0,
        help="seconds a case to wait for steps that nothing disturbs (CPU)",
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case after this long")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    started, measured = time.monotonic(), {}
    grid = cases(options.device, quick=options.quick, full=options.full)
    left = [case for case in grid if options.only in case.name]
    clocks_before = clocks() if options.device == "cuda" else None
    while left and time.monotonic() - started < 60 * options.minutes:
        case = left.pop(0)
        warmups, repeats = (3, 10) if options.quick else (20, options.repeats)
        if case.device == "cpu" and case.in_features > 1024:  # long enough to vary little
            warmups, repeats = warmups // 4, repeats // 4
        measured[case.name] = measure(
            case,
            warmups=warmups,
            repeats=repeats,
            patience=options.patience,
            compiled=not options.no_compile,
        )
        print(f"{case.name}: " + ", ".join(f"{row.contender} {row.ratio:.2f}" for row in measured[case.name]))
    facts = surroundings(options.device)
    if clocks_before:
        facts["clocks before"] = clocks_before
    if left:
        facts["not measured for want of time"] = "; ".join(case.name for case in left)
    kept = shared_input(options.device)
    name = result_name("linear", options)
    report = markdown(facts, measured, kept)
    data: dict[str, Any] = {"surroundings": facts, "cases": measured, "kept MiB, shared input": kept}
    write_results(options.out, name, report, data)
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
