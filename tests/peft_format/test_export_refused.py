"""What PEFT cannot hold is refused by name, and an export is all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import Policy, presets
from lowrank.peft_format import export, written_config
from tests import zoo
from tests.helpers import perturb
from tests.layers.test_experts import build as experts
from tests.peft_format.common import (
    CONFIG,
    TENSORS,
    adapted,
    assert_same,
    frozen_base,
    logits,
    policy,
    theirs,
    warnings_of_peft,
)

pytestmark = warnings_of_peft

REFUSED: dict[str, tuple[Callable[[], nn.Module], Policy, str]] = {
    "attention": (
        lambda: zoo.build("torch_encoder"),
        presets.lora(rank=2),
        r"self_attn.in_proj_weight\[query\]: its weight is read without a call",
    ),
    "a fast path": (
        lambda: zoo.build("torch_encoder"),
        presets.lora(rank=2, target="linear1"),
        "encoder.layers.1.linear1: its weight is read without a call",
    ),
    "a shared module": (zoo.Shared, presets.lora(rank=2), "first: it is used in several places"),
    "another kind of layer": (
        lambda: nn.Sequential(zoo.Homemade(), nn.Linear(8, 8)),
        presets.lora(rank=2),
        "0: PEFT adapts nn.Linear, Conv1D, nn.Embedding and nn.Conv1d to 3d, not Homemade",
    ),
    "experts in two dimensions": (
        lambda: experts("dbrx"),
        presets.lora(rank=2),
        r"experts.mlp.w1\[0.gate\]: PEFT takes a tensor of experts in two dimensions for one matrix",
    ),
    "a name inside another's": (
        lambda: nn.ModuleDict({"head": nn.Linear(6, 6), "body_head": nn.ModuleDict({"fc": nn.Linear(6, 6)})}),
        presets.lora(rank=2, target="fc", train=("head",)),
        "body_head: it holds adapters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    build, how, message = REFUSED[case]
    model = perturb(lowrank.wrap_model(build(), how, progress=False))
    with pytest.raises(ValueError, match=message):
        lowrank.export_peft(model, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_all_of_them_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PEFT has no place for these adapters") as raised:
        lowrank.export_peft(adapted("mamba", presets.lora(rank=2)), tmp_path / "peft")
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 2 * 3 and all("_proj: its weight is read" in line for line in lines[1:])


class Reads(nn.Module):
    """Uses its layers' weights, and calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up.weight)), self.down.weight)


@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_which_all_are_only_read_are_refused_once_the_model_ran(grad: bool, tmp_path: Path) -> None:
    model = perturb(lowrank.wrap_model(Reads(), presets.lora(rank=2), progress=False))
    with torch.set_grad_enabled(grad):
        model(torch.randn(2, 6))
    with pytest.raises(ValueError, match="down: its weight is read without a call"):
        lowrank.export_peft(model, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_a_look_at_a_weight_is_no_run_of_the_model(tmp_path: Path) -> None:
    model = adapted("bert", policy("bert"))
    for layer in model.modules():
        if isinstance(layer, lowrank.LoRALinear):
            layer.weight.norm()
    assert lowrank.export_peft(model, tmp_path)


def test_serving_takes_no_trained_modules(tmp_path: Path) -> None:
    model = adapted("bert", policy("bert", train=("classifier",)))
    with pytest.raises(ValueError, match="refuse or ignore modules trained in full .classifier."):
        lowrank.export_peft(model, tmp_path, serving=True)


def test_an_unwrapped_model_and_bad_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is not wrapped"):
        lowrank.export_peft(zoo.build("bert"), tmp_path)
    model = adapted("bert", policy("bert"))
    with torch.no_grad():
        next(lowrank.adapter_parameters(model)).fill_(float("inf"))
    with pytest.raises(ValueError, match="refusing to export: .*lora_A.weight contains NaN or Inf"):
        lowrank.export_peft(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        lowrank.export_peft(adapted("bert", policy("bert")), tmp_path / "file")


def corrupt_tensor(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] * (1 + 1e-4)


def corrupt_head(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.classifier.bias"] = tensors["base_model.model.classifier.bias"] + 1e-6


def drop_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layer.1.intermediate" in name]:
        del tensors[name]


@pytest.mark.parametrize("damage", [corrupt_tensor, corrupt_head, drop_layer])
def test_an_export_that_is_not_the_model_leaves_nothing(
    damage: Callable[[dict[str, Tensor]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("bert", policy("bert", train=("classifier",)))
    packed = export.packed

    def damaged(tensors: dict[str, Tensor]) -> bytes:
        tensors = dict(tensors)
        damage(tensors)
        return packed(tensors)

    monkeypatch.setattr(export, "packed", damaged)
    with pytest.raises(ValueError, match="nothing was exported"):
        lowrank.export_peft(model, tmp_path / "below" / "peft")
    assert not list(tmp_path.iterdir())

    monkeypatch.undo()
    lowrank.export_peft(model, tmp_path / "below" / "peft")
    before = {file.name: file.read_bytes() for file in (tmp_path / "below" / "peft").iterdir()}
    monkeypatch.setattr(export, "packed", damaged)
    with pytest.raises(ValueError, match="nothing was exported"):
        lowrank.export_peft(model, tmp_path / "below" / "peft")
    assert {file.name: file.read_bytes() for file in (tmp_path / "below" / "peft").iterdir()} == before


def test_a_wrong_configuration_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = written_config.peft_patterns
    monkeypatch.setattr(
        written_config, "peft_patterns", lambda *a: {**patterns(*a), "lora_alpha": 1.0, "alpha_pattern": {}}
    )
    with pytest.raises(ValueError, match="give another ΔW"):
        lowrank.export_peft(adapted("gpt2", policy("gpt2")), tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    model = adapted("bert", policy("bert"))
    lowrank.export_peft(model, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    perturb(model)
    lowrank.export_peft(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}
    assert_same(logits(theirs(tmp_path, "bert"), "bert"), logits(model, "bert"), frozen_base("bert"))
