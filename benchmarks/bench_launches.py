"""How many operations one adapted projection dispatches: what a GPU launches, counted on a CPU.

    python benchmarks/bench_launches.py

Small models on a GPU wait for launches, not for arithmetic. Views and allocations launch nothing and are left
out. No clock is read, so the figures are the same on every machine. Writes JSON and Markdown to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import FROZEN, OURS, OURS_ANCHORED, OURS_FROZEN_A, PEFT, PEFT_HALF, QueryKeyValue, adapted
from timing import result_name, surroundings, write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.layers import inference

RESULTS = Path(__file__).parent / "results"
TOKENS = 2048  # as in training: fewer take another way on a CPU
SILENT = {
    "new_empty",
    "empty_like",
    "empty",
    "empty_strided",
    "detach",
    "new_empty_strided",
    "_unsafe_view",
    "alias",
}


class Launches(TorchDispatchMode):
    """Counts the operations that do something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in SILENT:
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    """Operations of one projection in a training step, and of one that builds no graph."""

    contender: str
    forward: int
    backward: int
    no_grad: int


def counted(contender: str, layer: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Row:
    x = torch.randn(TOKENS, 1024, dtype=dtype).requires_grad_()
    with Launches() as forward:
        y = layer(x)
    dY = torch.ones_like(y)
    with Launches() as backward:
        y.backward(dY)
    with torch.no_grad():
        layer(x)
        with Launches() as alone:  # a later call, which finds the factors laid out
            layer(x)
    return Row(contender, forward.count, backward.count, alone.count)


def measure(dtype: torch.dtype) -> list[Row]:
    torch.manual_seed(0)
    inference.KEPT_ON_CPU = 10**9  # as on a GPU
    base: Any = QueryKeyValue().to(dtype).requires_grad_(False)
    models: dict[str, Any] = adapted(base, 16, half=False)
    rows = [counted(FROZEN, base.q_proj, dtype)]
    chosen = (PEFT, PEFT_HALF, OURS, OURS_FROZEN_A, OURS_ANCHORED)
    return rows + [counted(name, models[name].q_proj, dtype) for name in chosen]


def markdown(facts: dict[str, str], cases: dict[str, list[Row]]) -> str:
    lines = ["# Operations dispatched by one projection", "", *__doc__.splitlines()[4:7], ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in cases.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| contender | forward | backward | without grad |",
            "|---|---|---|---|",
        ]
        lines += [f"| {row.contender} | {row.forward} | {row.backward} | {row.no_grad} |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="operations are counted on the CPU")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    cases = {
        f"{str(dtype).removeprefix('torch.')}, r=16": measure(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    facts, name = surroundings("cpu"), result_name("launches", options)
    report = markdown(facts, cases)
    data = {"surroundings": facts, "cases": cases}
    write_results(options.out, name, report, data)
    print(report)


if __name__ == "__main__":
    main()
