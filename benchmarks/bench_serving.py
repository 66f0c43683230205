"""Many adapters on one base: their memory, choosing among them, and batches whose examples differ in theirs.

    python benchmarks/bench_serving.py [--quick]

64 adapters of rank 16 on every projection of MiniLM, and a batch of 16 examples: with one adapter for all of
them, and with one adapter each, beside PEFT's mixed batches (``adapter_names=``). Before anything is timed,
each example's output is compared with that of a run with its adapter alone. Writes JSON and Markdown to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from models import MODELS
from timing import interleaved, result_name, surroundings, verdict, write_results
from torch import Tensor, nn

import lowrank
from lowrank import presets

RESULTS = Path(__file__).parent / "results"
RANK, EXAMPLES, TOKENS = 16, 16, 64
MIXED_TARGET = 1.5  # the time of a mixed batch over that of one adapter, at most

LEGEND = """\
One forward of 16 examples without a graph. Over one: the time over that of one adapter for the whole batch in
the same library. Memory: bytes of all that the adapters added to the model, over the bytes of their factors
alone. Switching: `set_adapters` from one adapter to another."""


@dataclass(frozen=True)
class Row:
    """One way to run the batch; `over_one` is its time over that with one adapter for all examples."""

    contender: str
    seconds: float
    p10: float
    p90: float
    over_one: float


@dataclass(frozen=True)
class Added:
    """What the adapters added, in bytes, and what choosing one of them takes, in seconds."""

    adapters: int
    parameters_bytes: int
    model_bytes: int
    switch: float

    @property
    def ratio(self) -> float:
        return self.model_bytes / self.parameters_bytes


def names(count: int) -> list[str]:
    return [f"user_{i}" for i in range(count)]


def factors(count: int, shape: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same numbers for both libraries, one pair for each adapter of a projection."""
    draw = torch.Generator().manual_seed(shape[0] + shape[1])
    for _ in range(count):
        A = torch.randn(RANK, shape[1], generator=draw) / shape[1] ** 0.5
        yield A, 0.1 * torch.randn(shape[0], RANK, generator=draw) / RANK**0.5


def bytes_of(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def ours(count: int) -> tuple[nn.Module, Added]:
    model = MODELS["MiniLM-L6"][0](6, 6).eval()
    before = bytes_of(model)
    policy = presets.lora(rank=RANK, alpha=2.0 * RANK)
    for name in names(count):
        lowrank.add_adapter(model, policy, name=name, progress=False)
    for layer in lowrank.adapted_layers(model).values():
        pairs = factors(count, (layer.out_features, layer.in_features))
        for name, (A, B) in zip(names(count), pairs, strict=True):
            (adapter,) = layer.part(name).held()
            adapter.A.copy_(A)
            adapter.B.copy_(B)
    size = sum(p.numel() * p.itemsize for p in lowrank.adapter_parameters(model))
    rounds = 1000
    start = time.perf_counter()
    for i in range(rounds):
        lowrank.set_adapters(model, f"user_{i % count}")
    return model, Added(count, size, bytes_of(model) - before, (time.perf_counter() - start) / rounds)


@torch.no_grad()
def theirs(count: int) -> nn.Module:
    base = MODELS["MiniLM-L6"][0](6, 6).eval()
    plan = lowrank.plan_model(base, presets.lora(rank=RANK, alpha=2.0 * RANK))
    config = peft.LoraConfig(**plan.to_peft())
    first, *rest = names(count)
    model = peft.get_peft_model(base, config, adapter_name=first)
    for name in rest:
        model.add_adapter(name, config)
    for p in plan.adapted:
        layer: Any = model.get_submodule(f"base_model.model.{p.module}")
        for name, (A, B) in zip(names(count), factors(count, p.shape), strict=True):
            layer.lora_A[name].weight.copy_(A)
            layer.lora_B[name].weight.copy_(B)
    return model.eval()


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, Tensor], _: int, **options: Any) -> Tensor:
    output = model(**batch, **options)
    return output.logits if "logits" in output else output.last_hidden_state


def one(model: nn.Module, batch: dict[str, Tensor], name: str, index: int) -> Tensor:
    with lowrank.use_adapters(model, name):
        return forward(model, batch, index)


def mixed(model: nn.Module, batch: dict[str, Tensor], chosen: Sequence[str | None], index: int) -> Tensor:
    with lowrank.adapters_for_rows(model, chosen):
        return forward(model, batch, index)


def check(model: nn.Module, other: nn.Module, batch: dict[str, Tensor], chosen: Sequence[str]) -> None:
    """Stops where a mixed batch of either library is not, example by example, that of its adapter alone."""
    wanted = torch.stack([one(model, batch, name, 0)[i] for i, name in enumerate(chosen)])
    others = forward(other, batch, 0, adapter_names=list(chosen))
    for who, got in (("ours", mixed(model, batch, chosen, 0)), ("PEFT", others)):
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
            raise SystemExit(
                f"{who}: a mixed batch gives another output than each adapter alone; nothing was timed"
            )


def measure(count: int, *, tokens: int, warmups: int, repeats: int) -> tuple[list[Row], Added]:
    (model, added), other = ours(count), theirs(count)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (EXAMPLES, tokens), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chosen = [names(count)[i % count] for i in range(EXAMPLES)]
    check(model, other, batch, chosen)
    other.set_adapter(chosen[0])
    steps = {
        "ours, one adapter": partial(one, model, batch, chosen[0]),
        "ours, one each": partial(mixed, model, batch, chosen),
        "ours, the base": partial(mixed, model, batch, [None] * EXAMPLES),
        "PEFT, one adapter": partial(forward, other, batch),
        "PEFT, one each": partial(forward, other, batch, adapter_names=chosen),
    }
    times = interleaved(steps, warmups=warmups, repeats=repeats, device="cpu", after=lambda: None)
    rows = []
    for name, t in times.items():
        alone = times[f"{name.partition(',')[0]}, one adapter"].median
        rows.append(Row(name, t.median, t.quantile(0.1), t.quantile(0.9), t.median / alone))
    return rows, added


def markdown(facts: dict[str, str], rows: list[Row], added: Added, title: str) -> str:
    lines = ["# Many adapters on one base", "", LEGEND, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- memory: {added.model_bytes / 2**20:.1f} MiB for {added.adapters} adapters, {added.ratio:.4f} × "
        f"their factors ({verdict(added.ratio, 1.0)})",
        f"- switching: {1e6 * added.switch:.1f} µs",
        *("", f"## {title}", ""),
        "| | ms | p10–p90 | over one | target |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        target = verdict(r.over_one, MIXED_TARGET) if r.contender == "ours, one each" else "–"
        span = f"{1e3 * r.p10:.1f}–{1e3 * r.p90:.1f}"
        lines.append(f"| {r.contender} | {1e3 * r.seconds:.1f} | {span} | {r.over_one:.2f} | {target} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few adapters, tokens and repeats: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    count, tokens = (4, 8) if options.quick else (64, TOKENS)
    repeats = 3 if options.quick else options.repeats
    rows, added = measure(count, tokens=tokens, warmups=1 if options.quick else 5, repeats=repeats)
    title = f"MiniLM-L6, {count} adapters of rank {RANK}, {EXAMPLES} examples of {tokens} tokens"
    facts = surroundings(options.device)
    name = result_name("serving", options)
    report = markdown(facts, rows, added, title)
    data = {"surroundings": facts, "added": added, "cases": {title: rows}}
    write_results(options.out, name, report, data)
    print(f"\n{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
