"""One file for diffusers: what it holds, and, where diffusers is installed, what its loader computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_what_diffusers_saved_computes_the_same_here(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from peft import LoraConfig

    from benchmarks.censuses.denoisers import denoiser

    (theirs, inputs), (ours, _) = denoiser(name), denoiser(name)
    targets = ["to_q", "to_v", "to_out.0"]
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        base, wanted = ours(**inputs).sample, theirs(**inputs).sample
    theirs.save_lora_adapter(tmp_path)
    lowrank.import_diffusers(ours, next(tmp_path.iterdir()))
    with torch.no_grad():
        got = ours(**inputs).sample
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    again = lowrank.export_diffusers(ours, tmp_path / "again.safetensors", prefix="unet")
    there = load_file(next(path for path in tmp_path.iterdir() if path != again))
    here = {key.removeprefix("unet."): value for key, value in load_file(again).items()}
    assert here.keys() == {key.removeprefix("transformer.").removeprefix("unet.") for key in there}


def test_alphas_and_ranks_say_the_scalings(tmp_path: Path) -> None:
    one, two = (f"unet.model.layers.{i}.self_attn.q_proj" for i in range(2))
    base = build("llama").get_submodule("model.layers.0.self_attn.q_proj").weight
    tensors = {}
    for module, rank in ((one, 4), (two, 2)):
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, base.shape[1])
        tensors[f"{module}.lora_B.weight"] = torch.randn(base.shape[0], rank)
    tensors[f"{two}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    model = lowrank.import_diffusers(build("llama"), tmp_path / "lora.safetensors")
    for module, scaling in ((one, 1.0), (two, 4.0)):
        layer: Any = lowrank.adapted_layers(model)[module.removeprefix("unet.")]
        product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(layer.delta_weight(), scaling * product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "prefix", "message"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", None, "expected keys that end with .*got lora_unet"),
        ("unet.to_q.lora_A.weight", "text_encoder", r"no key below 'text_encoder'.*\['unet'\]"),
        ("unet.nowhere.lora_A.weight", None, r"(?s)lora.safetensors was made for another base.*nowhere"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    key: str, prefix: str | None, message: str, tmp_path: Path
) -> None:
    save_file({key: torch.zeros(2, 8)}, tmp_path / "lora.safetensors")
    model = build("llama")
    with pytest.raises(lowrank.AdapterError, match=message):
        lowrank.import_diffusers(model, tmp_path / "lora.safetensors", prefix=prefix)
    assert not lowrank.adapted_layers(model)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lowrank.AdapterError, match="expected a safetensors file"):
        lowrank.import_diffusers(build("llama"), tmp_path / "none.safetensors")
