"""One file for diffusers: what it holds, and, where diffusers is installed, what its loader computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank import presets
from tests.helpers import perturb
from tests.peft_format.common import adapted, mixed
from tests.zoo import build


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_the_file_holds_every_update_with_scaling_one_and_one_rank(family: str, tmp_path: Path) -> None:
    model = adapted(family, mixed(family))
    file = lowrank.export_diffusers(model, tmp_path / "lora.safetensors", prefix="unet")
    tensors, layers = load_file(file), lowrank.adapted_layers(model)
    assert len(tensors) == 2 * len(layers)
    assert len({t.shape[0] for key, t in tensors.items() if "lora_A" in key}) == 1
    for path, layer in layers.items():
        A, B = (tensors[f"unet.{path}.lora_{factor}.weight"] for factor in "AB")
        delta: Any = layer
        torch.testing.assert_close(B @ A, delta.delta_weight(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dora": True}, "no place for magnitudes"), ({"train": ("lm_head",)}, "lm_head")],
)
def test_what_the_file_cannot_hold_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    model = perturb(lowrank.wrap_model(build("llama"), presets.lora(rank=2, **options), progress=False))
    with pytest.raises(ValueError, match=message):
        lowrank.export_diffusers(model, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_diffusers_reads_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def unet() -> Any:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        sizes = {"block_out_channels": (32,), "cross_attention_dim": 16, "norm_num_groups": 8}
        return diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **blocks, **sizes).eval()

    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    model = perturb(lowrank.wrap_model(unet(), presets.pissa(rank=2, target=targets), progress=False))
    file = lowrank.export_diffusers(model, tmp_path / "lora.safetensors", prefix="unet")
    other = unet()
    with torch.no_grad():
        base = other(*inputs).sample
        other.load_lora_adapter(load_file(file), prefix="unet")
        got, wanted = other(*inputs).sample, model(*inputs).sample
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
