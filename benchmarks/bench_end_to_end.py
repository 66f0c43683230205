"""PiSSA, AILoRA and TLoRA from a base on disk to an adapter on disk and back, at the size of Llama-3.2-1B.

    python benchmarks/bench_end_to_end.py [--layers N] [--threads N] [--quick]

Random bf16 weights whose singular values fall off; TLoRA calibrates on short batches. The stages are
reading the base, wrapping it, two steps of training, saving, and loading onto the base read anew, whose
logits must be the trained model's bit for bit. Memory is the most that the process holds (Linux only, else
0). Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import resident, result_name, surroundings, write_results
from torch import Tensor, nn

import lowrank
from lowrank import Policy, presets
from lowrank.train import fit

RESULTS = Path(__file__).parent / "results"
RANK, TOKENS, BATCHES = 16, 64, 4
MEMORY = 1 << 30  # bytes of TLoRA's covariances at once; all of them would take 5 GiB
METHODS: dict[str, Callable[..., Policy]] = {
    "PiSSA": presets.pissa, "AILoRA": presets.ailora, "TLoRA": presets.tlora,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    method: str
    stage: str
    seconds: float
    resident_MiB: float


def llama(layers: int, quick: bool) -> Any:
    if quick:
        return transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, vocab_size=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    return transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=layers, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip


@torch.no_grad()
def write_base(config: Any, folder: Path) -> None:
    """A base whose linear weights have columns of falling size, in random order: so fall singular values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            sizes = torch.arange(1, module.in_features + 1).pow(-0.25)
            sizes *= sizes.square().mean().rsqrt()
            module.weight.mul_(sizes[torch.randperm(len(sizes))].to(torch.bfloat16))
    model.save_pretrained(folder)


def read_base(folder: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def batches(config: Any) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (BATCHES, 1, TOKENS), generator=draw)
    return [{"input_ids": each, "labels": each} for each in ids]


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(input_ids=batch["input_ids"], use_cache=False).logits


class Stages:
    """Runs one stage after the other and writes down what each took."""

    def __init__(self, method: str) -> None:
        self.method, self.rows = method, list[Row]()

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        result, seconds, _, most = resident(run)
        self.rows.append(Row(self.method, name, seconds, most))
        print(f"{self.method}, {name}: {seconds:.1f} s, {most:.0f} MiB", flush=True)
        return result


def measure(method: str, base: Path, given: list[dict[str, Tensor]], folder: Path) -> list[Row]:
    stage = Stages(method)
    trained = train(stage, base, given, folder)
    fresh = stage("read the base again", lambda: read_base(base))
    untrained = logits(fresh, given[0])
    stage("load", lambda: lowrank.load_adapter(fresh, folder))
    if not torch.equal(logits(fresh, given[0]), trained):
        raise RuntimeError(f"{method}: the loaded adapter gives other logits than the one that was saved")
    if torch.equal(untrained, trained):
        raise RuntimeError(f"{method}: the two steps changed no logit")
    return stage.rows


def train(stage: Stages, base: Path, given: list[dict[str, Tensor]], folder: Path) -> Tensor:
    """The logits of the trained model, which is let go here."""
    method = stage.method
    calibration = {"batches": given, "memory": MEMORY} if method == "TLoRA" else {}
    model, policy = stage("read the base", lambda: read_base(base)), METHODS[method](rank=RANK)
    stage("wrap", lambda: lowrank.wrap_model(model, policy, progress=False, **calibration))
    stage("two steps", lambda: fit(model, given, steps=2, progress=False))
    stage("save", lambda: lowrank.save_adapter(model, folder))
    return logits(model, given[0])


def markdown(facts: dict[str, str], config: Any, rows: list[Row]) -> str:
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size} and {config.intermediate_size}"
    lines = ["# From a base to a trained adapter and back", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- model: {shape}, vocabulary {config.vocab_size}, tied, bf16; rank {RANK}",
        f"- batches: {BATCHES} of 1×{TOKENS} tokens; TLoRA with memory={MEMORY >> 20} MiB",
        "- logits of the loaded adapter: those of the saved one, bit for bit, in all rows",
        "",
        "| method | stage | s | resident MiB at most |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.method} | {r.stage} | {r.seconds:.1f} | {r.resident_MiB:.0f} |" for r in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = llama(options.layers, options.quick)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_base(config, base)
        for method in options.only:
            rows += measure(method, base, batches(config), Path(folder) / method)
            facts = surroundings("cpu")
            data = {"surroundings": facts, "rows": rows}
            write_results(
                options.out, result_name("end-to-end", options), markdown(facts, config, rows), data
            )


if __name__ == "__main__":
    main()
