"""Adapt a vision transformer to a new task, with ranks where the task needs them, and a new head in full.

    python examples/vision.py           # a ViT with RANDOM weights; made-up pictures of stripes
    python examples/vision.py --tiny    # a smaller one

With a pretrained model, replace `vit` by `ViTForImageClassification.from_pretrained(folder, num_labels=3)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lowrank
from lowrank import presets

KINDS = ("upright", "level", "slanting")


def vit(tiny: bool) -> Any:
    torch.manual_seed(0)
    width = 32 if tiny else 128
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=4,
        num_labels=len(KINDS),
    )
    return ViTForImageClassification(config)


def pictures(count: int, seed: int) -> dict[str, Tensor]:
    """Noisy stripes (count, 1, 16, 16) and which of the three kinds they are."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, len(KINDS), (count,), generator=draw)
    along, down = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy")
    places = torch.stack([along, down, (along + down) / 2**0.5])[kinds]
    phase = torch.rand(count, 1, 1, generator=draw) * 6.28
    pixels = torch.sin(places * 1.2 + phase) + 0.3 * torch.randn(count, 16, 16, generator=draw)
    return {"pixel_values": pixels[:, None], "labels": kinds}


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    batch = pictures(256, seed=1000)
    right = model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a smaller model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/vision"), help="where results go")
    options = parser.parse_args()

    batches = [pictures(32, seed=i) for i in range(16)]
    model = vit(options.tiny)
    policy = presets.eva(rank=4, train=("classifier",))  # ranks by explained variance of the inputs
    lowrank.wrap_model(model, policy, batches=batches[:2])
    print(lowrank.plan_of(model))
    history = lowrank.train.fit(
        model,
        batches,
        steps=options.steps,
        lr=3e-3,
        evaluate=lambda model: {"accuracy": accuracy(model)},
        log=options.out / "log.jsonl",
    )
    lowrank.save_adapter(model, options.out / "adapter")
    again = lowrank.load_adapter(vit(options.tiny), options.out / "adapter")
    scores = list(history.evaluations.values())
    print(f"accuracy {scores[-1]['accuracy']:.3f}, of the reloaded adapter {accuracy(again.eval()):.3f}")
    print(f"the head is saved with the adapter in {options.out}/adapter")


if __name__ == "__main__":
    main()
