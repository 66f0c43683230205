"""Tensors of experts: PEFT's target parameters, held against the ΔW that PEFT merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError, Allocation, Plan, presets
from tests.helpers import perturb
from tests.layers.test_experts import build
from tests.peft_format.common import CONFIG, TENSORS, warnings_of_peft, written

# PEFT 0.21 says of a pattern for a parameter that it was ignored, and follows it.
ignored = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
pytestmark = [warnings_of_peft, ignored]

MODELS = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "llama4"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def wrapped(name: str, preset: Any = presets.lora, **options: Any) -> nn.Module:
    policy = preset(**{"rank": 3, **options})
    return perturb(lowrank.wrap_model(build(name), policy, progress=False))


def merged_by_peft(name: str, folder: Path) -> dict[str, Tensor]:
    """The base's weights after PEFT merged the folder into them."""
    return peft.PeftModel.from_pretrained(build(name), folder).merge_and_unload().state_dict()


def made_by_peft(name: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Saves an adapter of PEFT's that chance trained; returns the weights that PEFT merges."""
    options = {"target_modules": ["q_proj"], "target_parameters": BOTH, "r": 3, "lora_alpha": 5, **options}
    model = perturb(peft.get_peft_model(build(name), peft.LoraConfig(**options, init_lora_weights=False)))
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> None:
    """Equal within 1e-4 of the largest change of each tensor; the tensors of experts have changed."""
    assert got.keys() == wanted.keys()
    for key, base in build(name).state_dict().items():
        change = (wanted[key] - base).abs().max()
        assert change > 1e-3 or "experts" not in key or "bias" in key, f"{key} is that of the base"
        assert (got[key] - wanted[key]).abs().max() <= 1e-4 * change, key


@pytest.mark.parametrize("preset", [presets.lora, presets.pissa], ids=["lora", "anchored"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_merges_what_is_exported(name: str, preset: Any, tmp_path: Path) -> None:
    model = wrapped(name, preset)
    export = lowrank.export_peft(model, tmp_path)
    assert export.error < 1e-5
    assert_same(merged_by_peft(name, tmp_path), lowrank.merge(model).state_dict(), name)


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_ranks_and_scalings_of_each_expert(name: str, serving: bool, tmp_path: Path) -> None:
    plan = lowrank.plan_model(build(name), presets.pissa(rank=2, target=("experts.*", "q_proj")))
    plan = Plan({p: Allocation(1 + i % 4, 0.5 + i % 3) for i, p in enumerate(plan)}, init=plan.init)
    model = perturb(lowrank.wrap_model(build(name), plan, progress=False))
    lowrank.export_peft(model, tmp_path, serving=serving)
    assert_same(merged_by_peft(name, tmp_path), lowrank.merge(model).state_dict(), name)


@pytest.mark.parametrize("target", ["gate", "up", "down"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_rows_that_are_not_adapted_stay_as_they_are(name: str, target: str, tmp_path: Path) -> None:
    model = wrapped(name, target=target)
    lowrank.export_peft(model, tmp_path)
    assert written(tmp_path)["target_modules"] == []
    merged, wanted = merged_by_peft(name, tmp_path), lowrank.merge(model).state_dict()
    for key, weight in wanted.items():
        torch.testing.assert_close(merged[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"target_parameters": BOTH[:1]}, {"target_parameters": BOTH[1:], "use_rslora": True},
     {"target_modules": [], "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 9}}],
    ids=["both", "gate and up", "down", "patterns"],
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_an_imported_adapter_is_what_peft_merges(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    wanted = made_by_peft(name, tmp_path, **options)
    model = lowrank.import_peft(build(name), tmp_path)
    got = lowrank.merge(model).state_dict()
    for key, weight in wanted.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_an_export_comes_back(name: str, tmp_path: Path) -> None:
    model = wrapped(name)
    lowrank.export_peft(model, tmp_path)
    again = lowrank.import_peft(build(name), tmp_path)
    assert_same(lowrank.merge(again).state_dict(), lowrank.merge(model).state_dict(), name)


def turned(folder: Path, version: str | None, experts: int = 4) -> None:
    """Rewrites the factors of experts as PEFT before 0.19 had them: in and out the other way round."""
    tensors = load_file(folder / TENSORS)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        up = key.replace("lora_A", "lora_B")
        A = tensors[key].unflatten(0, (experts, -1))
        B = tensors[up].unflatten(1, (-1, experts)).permute(2, 0, 1)
        tensors[key] = B.mT.flatten(0, 1).contiguous()
        tensors[up] = A.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    say(folder, version)


def say(folder: Path, version: str | None) -> None:
    config = written(folder) | {"peft_version": version}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", None])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_a_folder_of_an_older_peft(name: str, version: str | None, tmp_path: Path) -> None:
    wanted = made_by_peft(name, tmp_path)
    turned(tmp_path, version)
    got = lowrank.merge(lowrank.import_peft(build(name), tmp_path)).state_dict()
    for key, weight in wanted.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6)


SQUARE = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}  # 32 × 32 in qwen3_moe


@pytest.mark.parametrize("version", [None, "0.18.2.dev0", "0.19.0.dev0@UNKNOWN", "?"])
def test_square_experts_of_an_unknown_version_are_refused(version: str | None, tmp_path: Path) -> None:
    made_by_peft("qwen3_moe", tmp_path, **SQUARE)
    say(tmp_path, version)
    with pytest.raises(AdapterError, match=r"experts.gate_up_proj: PEFT before 0.19 .* Set peft_version"):
        lowrank.import_peft(build("qwen3_moe"), tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_square_experts_of_a_known_version(old: bool, tmp_path: Path) -> None:
    wanted = made_by_peft("qwen3_moe", tmp_path, **SQUARE)
    if old:
        turned(tmp_path, "0.18.1")
    got = lowrank.merge(lowrank.import_peft(build("qwen3_moe"), tmp_path)).state_dict()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_version_that_the_shapes_contradict_is_refused(tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path)
    say(tmp_path, "0.18.1")
    with pytest.raises(AdapterError, match=r"experts.down_proj: expected factors .*, got"):
        lowrank.import_peft(build("mixtral"), tmp_path)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["experts.gate_up_proj"], "expected factors|no such linear module|target_parameters does not name"),
        ([*BOTH, "experts.other"], "target_parameters = 'experts.other': the model has no such tensor"),
        ([*BOTH, "q_proj.weight"], "target_parameters = .*q_proj.weight': this is no tensor of experts"),
        ("experts.gate_up_proj", "target_parameters: expected a list of names, got 'experts.gate_up_proj'"),
    ],
)
def test_target_parameters_that_do_not_fit_are_refused(named: Any, message: str, tmp_path: Path) -> None:
    made_by_peft("mixtral", tmp_path)
    config = written(tmp_path) | {"target_parameters": named}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        lowrank.import_peft(build("mixtral"), tmp_path)
