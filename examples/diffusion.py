"""Adapt the attention of a diffusion model to new pictures, and hand the adapter to diffusers.

    python examples/diffusion.py           # a small U-Net with RANDOM weights: it shows how it is done
    python examples/diffusion.py --tiny    # a smaller one

With a pretrained model, replace `unet` by `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`
and `pictures` by latents of your pictures. Needs diffusers and PEFT.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank
from lowrank import presets

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet(tiny: bool) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32,) if tiny else (64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * (1 if tiny else 2),
        up_block_types=("CrossAttnUpBlock2D",) * (1 if tiny else 2),
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def pictures(count: int) -> dict[str, Tensor]:
    """Stripes as latents (count, 4, 16, 16), and the embedded prompt of each (count, 5, 32): made up."""
    phase = torch.rand(count, 1, 1, 1) * 6.28
    stripes = torch.sin(torch.arange(16) * 0.8 + phase).expand(count, 4, 16, 16)
    return {"latents": stripes.clone(), "prompt": torch.ones(count, 5, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a smaller model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/diffusion"), help="where results go")
    options = parser.parse_args()
    noising = DDPMScheduler(num_train_timesteps=1000)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The usual one: tell the noise that was added to a picture, at a random time."""
        latents, noise = batch["latents"], torch.randn_like(batch["latents"])
        times = torch.randint(0, 1000, (len(latents),), device=latents.device)
        predicted = model(noising.add_noise(latents, noise, times), times, batch["prompt"]).sample
        return F.mse_loss(predicted, noise)

    print("The U-Net has random weights: what it draws is noise, before and after.")
    model = lowrank.wrap_model(unet(options.tiny), presets.pissa(rank=4, target=ATTENTION))
    batches = [pictures(8) for _ in range(8)]
    history = lowrank.train.fit(model, batches, loss, steps=options.steps, lr=1e-3)
    print(f"loss {history.losses[0]:.3f} → {history.losses[-1]:.3f}")

    options.out.mkdir(parents=True, exist_ok=True)
    file = lowrank.export_diffusers(model, options.out / "adapter.safetensors", prefix="unet")
    other = unet(options.tiny)
    other.load_lora_adapter(file, prefix="unet")  # through PEFT, which diffusers needs for this
    batch = pictures(2)
    with torch.no_grad():
        inputs = batch["latents"], torch.tensor(500), batch["prompt"]
        before, trained, loaded = (net.eval()(*inputs).sample for net in (unet(options.tiny), model, other))
    print(f"training moved the output by {float((trained - before).abs().max()):.1e}")
    print(f"{file}, loaded by diffusers, gives the same within {float((trained - loaded).abs().max()):.1e}")


if __name__ == "__main__":
    main()
