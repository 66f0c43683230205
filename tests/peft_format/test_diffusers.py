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


@pytest.mark.parametrize(
    ("name", "prefix"), [("unet", "unet"), ("sd3", "transformer"), ("flux", "transformer")]
)
def test_diffusers_reads_it(name: str, prefix: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.censuses.denoisers import denoiser

    (made, inputs), (other, _) = denoiser(name), denoiser(name)
    roles = ("query", "key", "value", "output")
    model = perturb(lowrank.wrap_model(made, presets.pissa(rank=2, target=roles), progress=False))
    file = lowrank.export_diffusers(model, tmp_path / "lora.safetensors", prefix=prefix)
    assert ("add_q_proj" in "".join(load_file(file))) == (name != "unet")
    with torch.no_grad():
        base = other(**inputs).sample
        other.load_lora_adapter(load_file(file), prefix=prefix)
        got, wanted = other(**inputs).sample, model(**inputs).sample
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
