"""How finding, planning, wrapping, saving, loading and unwrapping grow with the number of projections.

    python benchmarks/bench_scale.py [--quick] [--only counts | shapes]

Models of many projections 64×64 at rank 16, and the shapes of large ones on the meta device at rank 1, whose
factors are real: those of DeepSeek-V3 take 26 GB at rank 16. Such a model cannot be saved.
Memory is the most that the process holds in a stage beyond what it held before it (Linux only, else 0).
Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import resident, result_name, surroundings, write_results
from torch import nn

import lowrank
from lowrank import presets
from lowrank.models.projections import find_projections

RESULTS = Path(__file__).parent / "results"
COUNTS = (36, 360, 3600, 5760, 20_000)
SHAPES: dict[str, Callable[[int], Any]] = {
    "Llama-70B shapes": lambda layers: transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=layers or 80, vocab_size=128256,
    ),
    "Qwen3-30B-A3B shapes": lambda layers: transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=layers or 48, vocab_size=151936,
    ),
    "DeepSeek-V3 shapes": lambda layers: transformers.DeepseekV3Config(num_hidden_layers=layers or 61),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    stage: str
    projections: int
    seconds: float
    microseconds_each: float
    peak_MiB: float


def timed(rows: list[Row], stage: str, count: int, run: Callable[[], Any]) -> Any:
    result, seconds, before, most = resident(run)
    count = count or len(result)
    rows.append(Row(stage, count, seconds, 1e6 * seconds / count, max(0.0, most - before)))
    return result


def many(count: int) -> nn.Module:
    torch.manual_seed(0)  # what was saved loads onto the same weights only
    return nn.ModuleDict({f"p{i}": nn.Linear(64, 64, bias=False) for i in range(count)}).requires_grad_(False)


def measure(build: Callable[[], nn.Module], *, rank: int, saved: bool) -> list[Row]:
    rows: list[Row] = []
    model, policy = build(), presets.lora(rank=rank)
    count = len(timed(rows, "find", 0, lambda: find_projections(model)))
    plan = timed(rows, "plan", count, lambda: lowrank.plan_model(model, policy))
    timed(rows, "wrap", count, lambda: lowrank.wrap_model(model, plan, progress=False))
    if saved:
        with tempfile.TemporaryDirectory() as folder:
            timed(rows, "save", count, lambda: lowrank.save_adapter(model, folder))
            other = build()
            timed(rows, "load", count, lambda: lowrank.load_adapter(other, folder))
    timed(rows, "unwrap", count, lambda: lowrank.unwrap(model))
    return rows


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)


def markdown(facts: dict[str, str], cases: dict[str, list[Row]]) -> str:
    lines = ["# Growth with the number of projections", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, rows in cases.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| stage | projections | s | µs each | peak MiB |",
            "|---|---|---|---|---|",
        ]
        for r in rows:
            took = f"{r.seconds:.3f} | {r.microseconds_each:.0f} | {r.peak_MiB:.1f}"
            lines.append(f"| {r.stage} | {r.projections} | {took} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few projections: does it run?")
    parser.add_argument("--only", choices=["counts", "shapes"], help="one half of the cases")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs: dict[str, Callable[[], list[Row]]] = {}
    if options.only != "shapes":
        for count in COUNTS[:1] if options.quick else reversed(COUNTS):
            runs[f"{count} projections"] = partial(measure, partial(many, count), rank=16, saved=True)
    if options.only != "counts":
        for name, config in list(SHAPES.items())[: 1 if options.quick else None]:
            build = partial(on_meta, config(2 if options.quick else 0))
            runs[name] = partial(measure, build, rank=1, saved=False)
    cases: dict[str, list[Row]] = {}
    name = result_name("scale", options, options.only or "")
    for case, run in runs.items():
        cases[case] = run()
        print(f"{case}: " + ", ".join(f"{r.stage} {r.seconds:.2f} s" for r in cases[case]), flush=True)
        facts = surroundings("cpu")  # written each time, so that a run that is cut short leaves what it has
        write_results(options.out, name, markdown(facts, cases), {"surroundings": facts, "cases": cases})


if __name__ == "__main__":
    main()
