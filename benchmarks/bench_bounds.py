"""What two ideas that are not built could win at most, on the projections of one transformer layer.

    python benchmarks/bench_bounds.py [--quick]

Shared inputs: query, key and value (gate and up) read the same x, so one product could make all their S, one
all their dA, and one accumulation all of dX. No casts: masters in fp32 are cast each time they are used;
factors that are in half precision already show what remembering the casts could save. A whole training step
does more than these projections, so its gain is smaller. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, result_name, surroundings, write_results
from torch import Tensor

from lowrank.layers.functional import Block, fused_lora

RESULTS = Path(__file__).parent / "results"
Shape = tuple[int, int]  # (out, in)

LAYERS: dict[str, list[list[Shape]]] = {  # the projections of a layer, those of one input together
    "MiniLM-L6": [[(384, 384)] * 3, [(384, 384)], [(1536, 384)], [(384, 1536)]],
    "SmolLM2-135M": [[(576, 576), (192, 576), (192, 576)], [(576, 576)], [(1536, 576)] * 2, [(576, 1536)]],
    "Llama-3-8B": [
        [(4096, 4096), (1024, 4096), (1024, 4096)],
        [(4096, 4096)],
        [(14336, 4096)] * 2,
        [(4096, 14336)],
    ],
}


@dataclass(frozen=True)
class Case:
    layer: str
    tokens: int
    dtype: torch.dtype
    rank: int = 16
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.layer}, {str(self.dtype).removeprefix('torch.')}, N={self.tokens}, r={self.rank}"


@dataclass(frozen=True)
class Row:
    """One way to run the layer's projections; `gain` is the share of the separate ones' time saved."""

    contender: str
    seconds: float
    p10: float
    p90: float
    gain: float


@dataclass(frozen=True)
class Group:
    """Projections that read the same x."""

    x: Tensor
    weights: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    dY: list[Tensor]


class SharedProduct(torch.autograd.Function):
    """Several adapted projections of one x: S, dA and dX in one product each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, s: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, A, B = (tensors[i * count : (i + 1) * count] for i in range(3))
        S = x @ torch.cat(A).to(x.dtype).t()
        outputs = []
        for weight, b, part in zip(weights, B, S.split([len(a) for a in A], 1), strict=True):
            outputs.append(F.linear(x, weight).addmm_(part, b.to(x.dtype).t(), alpha=s))
        ctx.count, ctx.s = count, s
        ctx.save_for_backward(x, S, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dY: Tensor) -> tuple[Tensor | None, ...]:
        x, S, *tensors = ctx.saved_tensors
        weights, A, B = (tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
        widths = [len(a) for a in A]
        dS, dB = torch.empty_like(S), []
        for dy, b, part, grad in zip(dY, B, S.split(widths, 1), dS.split(widths, 1), strict=True):
            torch.mm(dy, b.to(dy.dtype) * ctx.s, out=grad)
            dB.append(torch.empty_like(b).copy_((ctx.s * (part.t() @ dy)).t()))
        dA = (dS.t() @ x).to(A[0].dtype).split(widths)
        dX = dS @ torch.cat(A).to(x.dtype)
        for dy, weight in zip(dY, weights, strict=True):
            dX.addmm_(dy, weight)
        return dX, None, None, *(None for _ in weights), *dA, *dB


def frozen(group: Group) -> list[Tensor]:
    return [F.linear(group.x, weight) for weight in group.weights]


def separate(group: Group) -> list[Tensor]:
    pairs = zip(group.weights, group.A, group.B, strict=True)
    return [fused_lora(group.x, w, None, [Block((0, len(w)), a, b, 2.0)]) for w, a, b in pairs]


def shared(group: Group) -> list[Tensor]:
    if len(group.weights) == 1:
        return separate(group)
    return list(SharedProduct.apply(group.x, len(group.weights), 2.0, *group.weights, *group.A, *group.B))


def make(case: Case, *, factors: torch.dtype) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        return values.to(case.device, dtype)

    return [
        Group(
            normal(case.tokens, shapes[0][1]).requires_grad_(),
            [normal(*shape) for shape in shapes],
            [normal(case.rank, shape[1], dtype=factors).requires_grad_() for shape in shapes],
            [normal(shape[0], case.rank, dtype=factors).requires_grad_() for shape in shapes],
            [normal(case.tokens, shape[0]) for shape in shapes],
        )
        for shapes in LAYERS[case.layer]
    ]


def step(run: Any, groups: list[Group], index: int) -> list[tuple[Tensor, ...]]:
    """Forward and backward of a layer's projections. Gradients of one x are summed as in a model."""
    grads = []
    for group in groups:
        leaves = [group.x] if run is frozen else [group.x, *group.A, *group.B]
        grads.append(torch.autograd.grad(run(group), leaves, group.dY))
    return grads


def measure(case: Case, *, warmups: int, repeats: int) -> list[Row]:
    groups, half = make(case, factors=torch.float32), make(case, factors=case.dtype)
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.05
    for ours, wanted in zip(step(shared, groups, 0), step(separate, groups, 0), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            if not ((a - b).norm() < tolerance * b.norm()):
                raise SystemExit(f"{case.name}: the shared product has other gradients; nothing was timed")
    steps = {
        "frozen": partial(step, frozen, groups),
        "separate (what is built)": partial(step, separate, groups),
        "shared inputs": partial(step, shared, groups),
    }
    if case.dtype != torch.float32:
        steps["separate, no casts"] = partial(step, separate, half)
    times = interleaved(steps, warmups=warmups, repeats=repeats, device=case.device, after=lambda: None)
    whole = times["separate (what is built)"].median
    return [
        Row(name, t.median, t.quantile(0.1), t.quantile(0.9), 1 - t.median / whole)
        for name, t in times.items()
    ]


def markdown(facts: dict[str, str], measured: dict[str, list[Row]]) -> str:
    lines = ["# What ideas that are not built could win at most", ""]
    lines += [
        "Forward and backward of the projections of one transformer layer. Gain: share of time saved.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in measured.items():
        lines += ["", f"## {name}", "", "| | ms | p10–p90 | gain |", "|---|---|---|---|"]
        lines += [
            f"| {r.contender} | {1e3 * r.seconds:.2f} | {1e3 * r.p10:.2f}–{1e3 * r.p90:.2f} | {r.gain:.1%} |"
            for r in rows
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(LAYERS) if options.device == "cuda" else ["MiniLM-L6", "SmolLM2-135M"]
    sizes = [128] if options.quick else [512, 2048] if options.device == "cpu" else [512, 4096]
    dtypes = [torch.bfloat16] if options.device == "cuda" else [torch.float32, torch.bfloat16]
    measured = {}
    for case in (Case(n, size, d, device=options.device) for n in names for size in sizes for d in dtypes):
        repeats = 5 if options.quick else options.repeats
        measured[case.name] = measure(case, warmups=2 if options.quick else 10, repeats=repeats)
        print(f"{case.name}: " + ", ".join(f"{r.contender} {r.gain:.1%}" for r in measured[case.name]))
    facts = surroundings(options.device)
    name = result_name("bounds", options)
    report = markdown(facts, measured)
    data = {"surroundings": facts, "cases": measured}
    write_results(options.out, name, report, data)
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
