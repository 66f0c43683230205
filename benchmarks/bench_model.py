"""A whole training step (forward, backward, AdamW) of real models: ours against PEFT.

    python benchmarks/bench_model.py [--quick] [--minutes N]

Before anything is timed, losses and gradients are checked: equal factors give equal ones, none zero. Writes
JSON and Markdown to benchmarks/results/. `bench_linear` says what a single projection costs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from models import (
    FROZEN,
    OURS,
    OURS_FROZEN_A,
    OURS_HALF,
    PEFT,
    PEFT_HALF,
    Case,
    QueryKeyValue,
    adapted,
    factors_of,
    frozen,
)
from timing import interleaved, kept_bytes, peak_bytes, result_name, surroundings, verdict, write_results
from torch import Tensor, nn

from lowrank.adapters import plan_of

RESULTS = Path(__file__).parent / "results"
FP32, BF16 = torch.float32, torch.bfloat16
MINILM, SMOLLM2 = "MiniLM-L6", "SmolLM2-135M shapes"
SPEED_TARGET, MEMORY_TARGET = 1.25, 0.85  # over PEFT's default, in bf16
KEPT_TARGETS = {OURS: 9.0, OURS_FROZEN_A: 1.0}  # MiB, query, key and value on one bf16 input of 8 MiB
COMPILED = (FROZEN, PEFT, PEFT_HALF, OURS, OURS_FROZEN_A)  # the contenders that are also compiled

LEGEND = f"""\
Forward, backward and AdamW. Speed-up and memory are over PEFT's default in the same case; the targets, for
bf16, are ≥ {SPEED_TARGET} and ≤ {MEMORY_TARGET}. Kept: distinct storages that backward keeps, parameters and
buffers excluded. Step: the most that torch's allocator holds in a step beyond what it held before; on a CPU
that is summed from the profiler's allocations, without the scratch space inside operations. Peak adds
weights, factors and optimizer state. Frozen: nothing is trained, and backward goes through every layer. Half
factors: no casts, at the price of factors and updates in bf16."""
COLUMNS = (
    "contender | step ms | p10–p90 | tokens/s | speed-up | target | kept MiB | step MiB | peak MiB | memory"
)


def cases(device: str, *, quick: bool) -> list[Case]:
    if quick:
        small = {"batch": 2, "length": 32, "device": device}
        return [Case(MINILM, FP32, layers=2, **small), Case(SMOLLM2, BF16, layers=2, **small)]
    if device == "cpu":
        return [
            Case(MINILM, FP32, 16, 128),
            Case(MINILM, BF16, 16, 128),
            Case(MINILM, BF16, 4, 128, accumulate=4),
            Case(SMOLLM2, BF16, 2, 128),
            Case(SMOLLM2, BF16, 2, 512),
        ]
    return [
        Case("Llama-3-8B shapes", BF16, 2, 2048, layers=4, device=device),
        Case("Llama-2-7B shapes", BF16, 2, 2048, layers=4, device=device),
        Case(SMOLLM2, BF16, 8, 512, device=device),
        Case(MINILM, BF16, 64, 128, device=device),
        Case(SMOLLM2, BF16, 8, 128, accumulate=4, device=device),
    ]


@dataclass(frozen=True)
class Row:
    """What one contender took. Speed-up and memory are over PEFT's default in the same case."""

    contender: str
    seconds: float
    p10: float
    p90: float
    tokens_per_second: float
    speedup: float
    kept_MiB: float
    step_MiB: float  # at most held by the allocator during a step, beyond what was held before it
    peak_MiB: float  # that, and the weights, factors and optimizer state
    memory: float


class Contender:
    """One adapted model with its optimizer, compiled or not."""

    def __init__(self, case: Case, model: nn.Module, batches: list[dict[str, Tensor]], compiled: bool):
        self.case, self.model, self.batches = case, model, batches
        self.run: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def loss(self, index: int = 0) -> Tensor:
        return self.run(**self.batches[index % len(self.batches)]).loss

    def step(self, index: int) -> None:
        for micro in range(self.case.accumulate):
            self.loss(index * self.case.accumulate + micro).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of weights, factors and optimizer state."""
        state = () if self.optimizer is None else self.optimizer.state.values()
        states = (value for held in state for value in held.values() if isinstance(value, Tensor))
        return sum(_storages(chain(self.model.parameters(), self.model.buffers(), states)).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def check(case: Case, models: dict[str, nn.Module], batch: dict[str, Tensor]) -> None:
    """Exits unless equal factors give ours and PEFT's default equal losses and gradients, none zero."""
    projections = plan_of(models[OURS]).adapted
    tolerance = 1e-3 if case.dtype == FP32 else 0.1
    seen: dict[str, tuple[float, list[Tensor]]] = {}
    for name, model in models.items():
        model.eval()  # dropout in the model would draw other numbers for each
        loss = model(**batch).loss
        loss.backward()
        grads = [factor.grad for pair in factors_of(model, projections) for factor in pair]
        seen[name] = loss.item(), grads[1::2] if name == OURS_FROZEN_A else grads
        model.zero_grad()
        model.train()
        if not all(grad is not None and grad.isfinite().all() and grad.any() for grad in seen[name][1]):
            raise SystemExit(f"{case.name}: {name!r} has a gradient that is missing or zero")
    for name in (PEFT_HALF, OURS, OURS_FROZEN_A, OURS_HALF):
        if name in seen:
            wanted = seen[PEFT][1][1::2] if name == OURS_FROZEN_A else seen[PEFT][1]
            loss_error = abs(seen[name][0] / seen[PEFT][0] - 1)
            error = (_flat(seen[name][1]) - _flat(wanted)).norm() / _flat(wanted).norm()
            if not (error < tolerance and loss_error < tolerance / 10):
                raise SystemExit(
                    f"{case.name}: {name!r} is not PEFT's: gradients {error:.2g} off, loss {loss_error:.2g}"
                )


def _flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for grad in grads])


def measure(case: Case, *, compiled: bool, seconds: float, most: int) -> list[Row]:
    """One row a contender, from as many rounds as fit in `seconds` (at least three, at most `most`)."""
    torch.compiler.reset()
    gc.collect()  # PEFT's models are cycles, and hold a device's memory
    base = case.base()
    batches = case.batches(base)
    models = adapted(base, case.rank, half=case.dtype != FP32)
    check(case, models, batches[0])
    models = {FROZEN: frozen(base), **models}
    chosen = {name: (name, False) for name in models}
    if compiled:
        chosen = {PEFT: (PEFT, False), OURS: (OURS, False)}
        chosen |= {f"{name}, compiled": (name, True) for name in COMPILED}
    named = {name: Contender(case, models[model], batches, how) for name, (model, how) in chosen.items()}

    start = time.monotonic()
    for _ in range(2):  # the second shows what a round takes
        took = time.monotonic()
        for contender in named.values():
            contender.step(0)
        if case.device == "cuda":
            torch.cuda.synchronize()
        took = time.monotonic() - took
    left = seconds - (time.monotonic() - start)
    repeats = max(3, min(most, int(left / took)))
    warmups = min(20, repeats // 5)
    steps = {name: contender.step for name, contender in named.items()}
    times = interleaved(
        steps, warmups=warmups, repeats=repeats - warmups, device=case.device, after=lambda: None
    )

    memory = {name: peak_bytes(partial(contender.step, 0), case.device) for name, contender in named.items()}
    peaks = {name: memory[name] + contender.held() for name, contender in named.items()}
    return [
        Row(
            contender=name,
            seconds=times[name].median,
            p10=times[name].quantile(0.1),
            p90=times[name].quantile(0.9),
            tokens_per_second=case.tokens / times[name].median,
            speedup=times[PEFT].median / times[name].median,
            kept_MiB=kept_bytes(contender.loss, chain(contender.model.parameters(), base.buffers())) / 2**20,
            step_MiB=memory[name] / 2**20,
            peak_MiB=peaks[name] / 2**20,
            memory=peaks[name] / peaks[PEFT],
        )
        for name, contender in named.items()
    ]


def shared_input(device: str) -> dict[str, float]:
    """MiB kept for backward by adapted query, key and value layers on one bf16 input of 8 MiB."""
    torch.manual_seed(0)
    base = QueryKeyValue().to(device, BF16).requires_grad_(False)
    h = torch.randn(4, 1024, 1024, device=device).to(BF16).requires_grad_()
    return {
        name: kept_bytes(partial(model, h), chain(model.parameters(), model.buffers())) / 2**20
        for name, model in adapted(base, 16, half=True).items()
    }


def markdown(facts: dict[str, str], measured: dict[str, list[Row]], kept: dict[str, float]) -> str:
    lines = ["# A training step of a whole model", "", LEGEND, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in measured.items():
        lines += ["", f"## {name}", ""]
        lines += [f"| {COLUMNS} | target |", "|---" * (COLUMNS.count("|") + 2) + "|"]
        lines += list(_cells(rows, "bfloat16" in name and "quick" not in facts))
    lines += ["", "## Kept for backward: query, key and value on one bf16 input of 8 MiB", ""]
    lines += ["| contender | MiB | target |", "|---|---|---|"]
    lines += [
        f"| {name} | {MiB:.2f} | {verdict(MiB, KEPT_TARGETS.get(name))} |" for name, MiB in kept.items()
    ]
    return "\n".join([*lines, ""])


def _cells(rows: list[Row], aimed: bool) -> Iterator[str]:
    for row in rows:
        counts = aimed and row.contender.startswith("ours") and row.contender != OURS_HALF
        speed = verdict(-row.speedup, -SPEED_TARGET if counts else None)
        memory = verdict(row.memory, MEMORY_TARGET if counts else None)
        yield (
            f"| {row.contender} | {1e3 * row.seconds:.1f} | {1e3 * row.p10:.1f}–{1e3 * row.p90:.1f} | "
            f"{row.tokens_per_second:.0f} | {row.speedup:.2f} | {speed} | {row.kept_MiB:.1f} | "
            f"{row.step_MiB:.1f} | {row.peak_MiB:.1f} | {row.memory:.2f} | {memory} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers and few repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=50, help="at most so many rounds a case")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="for everything, shared out among the cases"
    )
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument(
        "--compile", action="store_true", help="compiled contenders instead; a GPU run has both"
    )
    parser.add_argument("--no-compile", action="store_true", help="on a GPU, leave the compiled ones out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    started, load = time.monotonic(), os.getloadavg()[0]
    chosen = [c for c in cases(options.device, quick=options.quick) if options.only in c.name]
    left = [] if options.compile else [(case, False) for case in chosen]
    both = options.device == "cuda" and not (options.quick or options.no_compile)
    if options.compile or both:
        left += [(case, True) for case in chosen if case.accumulate == 1]
    kept, measured = shared_input(options.device), dict[str, list[Row]]()
    while left and (remaining := 60 * options.minutes - (time.monotonic() - started)) > 0:
        share = remaining / len(left)
        case, compiled = left.pop(0)
        name = case.name + (", compiled" if compiled else "")
        most = 3 if options.quick else options.repeats
        measured[name] = measure(case, compiled=compiled, seconds=0.7 * share, most=most)
        print(f"{name}: " + ", ".join(f"{row.contender} {row.speedup:.2f}" for row in measured[name]))
        facts = surroundings(options.device) | {"load average at the start": f"{load:.1f}"}
        if options.quick:
            facts["quick"] = "layers left out, too little of everything for the targets"
        if left:
            facts["not measured for want of time"] = "; ".join(case.name for case, _ in left)
        report = write(options, facts, measured, kept)  # each time: a step that takes too long loses no other
    if not measured:
        raise SystemExit(
            f"nothing was measured: no case has {options.only!r} in its name, or there was no time"
        )
    print(f"\n{report}")


def write(
    options: argparse.Namespace, facts: dict[str, str], measured: dict[str, list[Row]], kept: dict[str, float]
) -> str:
    name = result_name("model", options, "compiled" if options.compile else "")
    report = markdown(facts, measured, kept)
    data: dict[str, Any] = {"surroundings": facts, "cases": measured, "kept MiB, shared input": kept}
    write_results(options.out, name, report, data)
    return f"{report}\nwritten to {options.out / name}.md and .json"


if __name__ == "__main__":
    main()
