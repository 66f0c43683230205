"""One more token for each sequence of a batch, with a key-value cache: ours against PEFT, unmerged.

    python benchmarks/bench_generate.py [--quick] [--threads 2] [--compile [--layers 4]]

All contenders have equal factors on all linear projections. With `--compile` each is compiled for one token,
with static shapes and a static cache. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from models import FROZEN, OURS, OURS_ANCHORED, PEFT, PEFT_HALF, Case, adapted, frozen, twin
from timing import Step, interleaved, result_name, surroundings, verdict, write_results
from torch import Tensor, nn

import lowrank

MERGED = "ours, merged copies"
CONTENDERS = (FROZEN, PEFT, PEFT_HALF, OURS, OURS_ANCHORED, MERGED)
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


def prompt(model: Any, batch: int, device: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, PROMPT), generator=draw).to(device)


def generating(model: Any, batch: int, device: str) -> Step:
    """A step that computes the next token of a prompt, and takes it out of the cache again."""
    ids = prompt(model, batch, device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step(index: int) -> Tensor:
        logits = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def generating_compiled(model: Any, batch: int, device: str) -> Step:
    """The same in compiled code, where each token is written to the same place of a static cache."""
    ids = prompt(model, batch, device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=2 * PROMPT)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def next_token(token: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    # A code object of its own: the compiler would look for this step among those of all contenders.
    next_token.__code__ = next_token.__code__.replace(co_name=f"next_token_{id(model)}_{batch}")
    compiled = torch.compile(next_token, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(index: int) -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        return compiled(ids[:, :1])

    return step


def check_equal(steps: dict[str, Step]) -> None:
    """Raises ValueError unless contenders of equal factors compute the same, to the dtype's rounding."""
    wanted: Any = steps[OURS](0)
    for name in (PEFT, MERGED):
        got: Any = steps[name](0)
        if (error := float((got - wanted).abs().max() / wanted.abs().max())) > 0.05:
            raise ValueError(f"{name} is not {OURS}: the logits differ by {error:.2g} of the largest")


def measure(
    models: dict[str, nn.Module], batch: int, device: str, repeats: int, *, compiled: bool
) -> list[Row]:
    generate = generating_compiled if compiled else generating
    steps: dict[str, Step] = {name: generate(model, batch, device) for name, model in models.items()}
    check_equal(steps)
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
    parser.add_argument("--compile", action="store_true", help="compile one token of each contender")
    parser.add_argument("--layers", type=int, help="of the 30 of the model; all by default")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    layers = 2 if options.quick else options.layers
    case = Case("SmolLM2-135M shapes", torch.bfloat16, 1, 1, layers=layers)
    base = Case.base(case).to(options.device).eval()
    every = {FROZEN: frozen(base), **adapted(base, case.rank, half=False)}
    every[MERGED] = twin(every[OURS])
    models = {name: every[name].eval() for name in CONTENDERS}
    cases = {}
    repeats, batches = (5, BATCHES[:1]) if options.quick else (options.repeats, options.batches)
    of_layers = f" ({layers} of 30 layers)" if layers else ""
    with lowrank.merged(models[MERGED]) as copies:
        for batch in batches:
            rows = measure(models, batch, options.device, repeats, compiled=options.compile)
            cases[f"SmolLM2-135M shapes{of_layers}, bfloat16, batch {batch}, r={case.rank}"] = rows
            facts = surroundings(options.device) | {"load average at the start": f"{load:.1f}"}
            facts["merged copies"] = f"{copies.bytes / 2**20:.0f} MiB"
            name = result_name("generate", options, "compiled" if options.compile else "")
            report = markdown(facts, cases)
            # After each batch: compiling all contenders of one takes minutes.
            write_results(options.out, name, report, {"surroundings": facts, "cases": cases})
    print(report)


if __name__ == "__main__":
    main()
