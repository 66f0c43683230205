"""One more token for each sequence of a batch, with a key-value cache: ours against PEFT, unmerged.

    python benchmarks/bench_generate.py [--quick] [--threads 2]

All contenders have equal factors on all linear projections. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import FROZEN, OURS, OURS_ANCHORED, PEFT, PEFT_HALF, Case, adapted, frozen
from timing import Step, interleaved, result_name, surroundings, verdict, write_results
from torch import nn

RESULTS = Path(__file__).parent / "results"
TARGET = 1.15  # of the frozen model's time, for ours
BATCHES, PROMPT = (1, 8, 32), 32


@dataclass(frozen=True)
class Row:
    contender: str
    seconds: float
    p10: float
    p90: float
    over_frozen: float


def generating(model: Any, batch: int, device: str) -> Step:
    """A step that computes the next token of a prompt, and takes it out of the cache again."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=draw)
    ids = ids.to(device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step(index: int) -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def measure(models: dict[str, nn.Module], batch: int, device: str, repeats: int) -> list[Row]:
    steps: dict[str, Callable[[int], object]] = {n: generating(m, batch, device) for n, m in models.items()}
    times = interleaved(steps, warmups=3, repeats=repeats, device=device, after=lambda: None)
    floor = times[FROZEN].median
    return [
        Row(name, taken.median, taken.quantile(0.1), taken.quantile(0.9), taken.median / floor)
        for name, taken in times.items()
    ]


def aim(row: Row) -> float | None:
    return TARGET if row.contender.startswith("ours") else None


def markdown(facts: dict[str, str], cases: dict[str, list[Row]]) -> str:
    lines = ["# One more token with a key-value cache", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in cases.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| contender | ms | p10–p90 | × frozen | target |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.contender} | {1e3 * row.seconds:.2f} | {1e3 * row.p10:.2f}–{1e3 * row.p90:.2f} | "
            f"{row.over_frozen:.2f} | {verdict(row.over_frozen, aim(row))} |"
            for row in rows
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers and few repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    case = Case("SmolLM2-135M shapes", torch.bfloat16, 1, 1, layers=2 if options.quick else None)
    base = Case.base(case).to(options.device).eval()
    every = {FROZEN: frozen(base), **adapted(base, case.rank, half=False)}
    models = {name: every[name].eval() for name in (FROZEN, PEFT, PEFT_HALF, OURS, OURS_ANCHORED)}
    cases = {
        f"SmolLM2-135M shapes, bfloat16, batch {batch}, r={case.rank}": measure(
            models, batch, options.device, 5 if options.quick else options.repeats
        )
        for batch in (BATCHES[:1] if options.quick else BATCHES)
    }
    facts = surroundings(options.device) | {"load average at the start": f"{load:.1f}"}
    name = result_name("generate", options)
    report = markdown(facts, cases)
    data = {"surroundings": facts, "cases": cases}
    write_results(options.out, name, report, data)
    print(report)


if __name__ == "__main__":
    main()
