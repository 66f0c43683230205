"""Experts: a grouped product adapted by us, by forming W + ΔW, and frozen; and a step of a small Qwen3-MoE.

Contenders run in turn within one process; the table has medians in ms, ratios to the first, and what is kept
for backward beside parameters. PEFT's `target_parameters` is beside ours. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import lowrank
from benchmarks.timing import interleaved, kept_bytes, result_name, surroundings, write_results
from lowrank import presets
from lowrank.layers.adapter import Adapter
from lowrank.layers.expert_stack import ExpertStacks, Layout
from lowrank.layers.experts import adapted_experts

RESULTS = Path(__file__).parent / "results"
EXPERTS, IN, OUT, RANK, TOKENS = 64, 512, 1024, 8, 1024


class Contender(NamedTuple):
    """One step, and the tensors that are there without it."""

    step: Callable[[], None]
    own: list[Tensor]


def product(dtype: torch.dtype, device: str) -> dict[str, Contender]:
    """Forward and backward of one grouped product: 64 experts, 512 → 1024, rank 8, 1024 tokens."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, OUT, IN).div_(IN**0.5).to(device, dtype)
    x = torch.randn(TOKENS, IN).to(device, dtype).requires_grad_()
    offs = torch.randint(EXPERTS, (TOKENS,)).bincount(minlength=EXPERTS).cumsum(0).int().to(device)
    dy = torch.randn(TOKENS, OUT).to(device, dtype)
    adapters = [
        Adapter(torch.randn(RANK, IN), torch.zeros(OUT, RANK), 2.0, rows=(e * OUT, (e + 1) * OUT))
        for e in range(EXPERTS)
    ]
    stacks = ExpertStacks(adapters, Layout(EXPERTS, OUT, False)).to(device)
    one = ExpertStacks(adapters[:1], Layout(EXPERTS, OUT, False, shared=True)).to(device)

    def run(read: Callable[[], Tensor]) -> Contender:
        def step() -> None:
            F.grouped_mm(x, read().transpose(-2, -1), offs=offs).backward(dy)
            x.grad = None
            stacks.zero_grad()
            one.zero_grad()

        return Contender(step, [weight, x, offs, *stacks.parameters(), *one.parameters()])

    return {
        "frozen": run(lambda: weight),
        "ours": run(lambda: adapted_experts(weight, [(stacks, None)])),
        "ours, shared": run(lambda: adapted_experts(weight, [(one, None)])),
        "W + ΔW formed": run(lambda: stacks.add_to(weight, None).to(dtype)),
    }


def model(dtype: torch.dtype, device: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config).to(device, dtype).train()


def steps(dtype: torch.dtype, device: str) -> dict[str, Contender]:
    """Forward and backward of a Qwen3-MoE, 256 wide, 32 experts, 4 active, 512 tokens."""
    base = partial(model, dtype, device)
    targets = ["experts.*", "q_proj", "v_proj"]
    shared = presets.lora(target=targets, experts="shared")
    made = {
        "attention alone": lowrank.wrap_model(base(), presets.lora(target=targets[1:]), progress=False),
        "ours": lowrank.wrap_model(base(), presets.lora(target=targets), progress=False),
        "ours, shared": lowrank.wrap_model(base(), shared, progress=False),
    }
    try:
        import peft
    except ImportError:
        pass
    else:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=8, target_modules=targets[1:], target_parameters=parameters)
        made["PEFT"] = peft.get_peft_model(base(), config)
    ids = torch.randint(512, (2, 256), device=device)

    def run(each: nn.Module) -> Contender:
        def step() -> None:
            each(input_ids=ids, labels=ids).loss.backward()
            each.zero_grad()

        return Contender(step, [ids, *each.parameters(), *each.buffers()])

    return {name: run(each) for name, each in made.items()}


def measured(contenders: dict[str, Contender], repeats: int, device: str) -> list[dict[str, Any]]:
    """The times of each, in turn: median and the 10th and 90th percentile, in seconds; and bytes kept."""
    steps = {name: partial(_numbered, contender.step) for name, contender in contenders.items()}
    times = interleaved(steps, warmups=2, repeats=repeats, device=device, after=lambda: None)
    first = next(iter(times.values())).median
    return [
        {
            "contender": name,
            "seconds": taken.median,
            "p10": taken.quantile(0.1),
            "p90": taken.quantile(0.9),
            "kept": kept_bytes(contenders[name].step, contenders[name].own),
            "ratio": taken.median / first,
        }
        for name, taken in times.items()
    ]


def _numbered(step: Callable[[], None], index: int) -> None:
    step()


def markdown(facts: dict[str, str], cases: dict[str, list[dict[str, Any]]]) -> str:
    lines = [*(f"- {key}: {value}" for key, value in facts.items()), ""]
    for what, rows in cases.items():
        lines += [f"## {what}", "", "| contender | ms | p10 to p90 | ratio | MiB kept |"]
        lines.append("|---|---|---|---|---|")
        for row in rows:
            spread = f"{1e3 * row['p10']:.1f} to {1e3 * row['p90']:.1f}"
            lines.append(
                f"| {row['contender']} | {1e3 * row['seconds']:.1f} | {spread} | {row['ratio']:.2f} "
                f"| {row['kept'] / 2**20:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    made = {"one product": product, "a step of a Qwen3-MoE": steps}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    repeats = 3 if options.quick else options.repeats
    cases = {
        f"{what}, {short}": measured(contenders(dtype, options.device), repeats, options.device)
        for what, contenders in made.items()
        for short, dtype in dtypes.items()
    }
    facts, name = surroundings(options.device), result_name("experts", options)
    report = markdown(facts, cases)
    data = {"surroundings": facts, "cases": cases}
    write_results(options.out, name, report, data)
    print(f"{report}\nwritten to {options.out / name}.md and .json")


if __name__ == "__main__":
    main()
