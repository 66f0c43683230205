"""Experts: a grouped product adapted by us, by forming W + ΔW, and frozen; and a step of a small Qwen3-MoE.

    python -m benchmarks.bench_experts [--repeats 20] [--threads 2]

Contenders run in turn within one process; the table has medians in ms and ratios to the frozen base. PEFT's
``target_parameters`` is beside ours where PEFT is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.layers.adapter import Adapter
from lowrank.layers.expert_stack import ExpertStacks, Layout
from lowrank.layers.expert_weight import adapted_experts

EXPERTS, IN, OUT, RANK, TOKENS = 64, 512, 1024, 8, 1024


def product(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Forward and backward of one grouped product: 64 experts, 512 → 1024, rank 8, 1024 tokens."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, OUT, IN).div_(IN**0.5).to(dtype)
    x = torch.randn(TOKENS, IN).to(dtype).requires_grad_()
    offs = torch.randint(EXPERTS, (TOKENS,)).bincount(minlength=EXPERTS).cumsum(0).int()
    dy = torch.randn(TOKENS, OUT).to(dtype)
    adapters = [
        Adapter(torch.randn(RANK, IN), torch.zeros(OUT, RANK), 2.0, rows=(e * OUT, (e + 1) * OUT))
        for e in range(EXPERTS)
    ]
    stacks = ExpertStacks(adapters, Layout(EXPERTS, OUT, False))

    def run(read: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            F.grouped_mm(x, read().transpose(-2, -1), offs=offs).backward(dy)
            x.grad = None
            stacks.zero_grad()

        return step

    return {
        "frozen": run(lambda: weight),
        "ours": run(lambda: adapted_experts(weight, [(stacks, None)])),
        "W + ΔW formed": run(lambda: stacks.add_to(weight, None).to(dtype)),
    }


def model() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config).train()


def steps() -> dict[str, Callable[[], None]]:
    """Forward and backward of a Qwen3-MoE, 256 wide, 32 experts, 4 active, 512 tokens, fp32."""
    targets = ["experts.*", "q_proj", "v_proj"]
    made = {
        "attention alone": lowrank.wrap_model(model(), presets.lora(target=targets[1:]), progress=False),
        "ours": lowrank.wrap_model(model(), presets.lora(target=targets), progress=False),
    }
    try:
        import peft
    except ImportError:
        pass
    else:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=8, target_modules=targets[1:], target_parameters=parameters)
        made["PEFT"] = peft.get_peft_model(model(), config)
    ids = torch.randint(512, (2, 256))

    def run(each: nn.Module) -> Callable[[], None]:
        def step() -> None:
            each(input_ids=ids, labels=ids).loss.backward()
            each.zero_grad()

        return step

    return {name: run(each) for name, each in made.items()}


def measured(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median time of each in ms."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + 2):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if i > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| what | contender | ms | ratio to the first |\n|---|---|---|---|")
    cases = {
        "one product, fp32": lambda: product(torch.float32),
        "one product, bf16": lambda: product(torch.bfloat16),
        "a step, fp32": steps,
    }
    for what, contenders in cases.items():
        found = measured(contenders(), options.repeats)
        first = next(iter(found.values()))
        for name, value in found.items():
            print(f"| {what} | {name} | {value:.1f} | {value / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
