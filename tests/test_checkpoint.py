"""Folders: exact, atomic, and refused where they are not what they claim to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Allocation, Plan, presets
from lowrank.formats.folder import CONFIG, checksum
from lowrank.models.projections import Projection, Role
from tests import zoo
from tests.helpers import logits, perturb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved AILoRA adapter of the small BERT, with its head."""
    policy = presets.ailora(rank=2, train=("classifier",), dropout=0.1)
    model = perturb(lowrank.wrap_model(zoo.build("bert"), policy, progress=False))
    with torch.no_grad():
        model.classifier.weight.add_(0.3)
    lowrank.save_adapter(model, tmp_path / "adapter")
    torch.save(logits(model, zoo.batch("bert")), tmp_path / "logits.pt")
    return tmp_path / "adapter"


def tensors_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    config["checksum"] = checksum(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_reload_has_the_same_bits_and_settings(folder: Path) -> None:
    model = lowrank.load_adapter(zoo.build("bert"), folder)
    assert torch.equal(logits(model, zoo.batch("bert")), torch.load(folder.parent / "logits.pt"))
    layer = next(iter(lowrank.adapted_layers(model).values()))
    assert lowrank.plan_of(model).dropout == 0.1 == layer.part().dropout
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "adapters" not in name} == {
        "classifier.copies.default.weight",
        "classifier.copies.default.bias",
    }


def test_saving_what_was_loaded_writes_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    lowrank.save_adapter(lowrank.load_adapter(zoo.build("bert"), folder), tmp_path / "again")
    assert tensors_file(folder).name == tensors_file(tmp_path / "again").name
    assert tensors_file(folder).read_bytes() == tensors_file(tmp_path / "again").read_bytes()


def test_a_frozen_factor_stays_frozen(tmp_path: Path) -> None:
    policy = presets.tlora(rank=2)
    model = lowrank.wrap_model(zoo.build("llama"), policy, batches=[zoo.batch("llama")], progress=False)
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(zoo.build("llama"), tmp_path)
    count = sum(p.numel() for p in lowrank.adapter_parameters(again))
    assert count == lowrank.plan_of(model).trainable_parameters


def test_saving_replaces_the_old_adapter(folder: Path) -> None:
    old = tensors_file(folder).name
    model = perturb(lowrank.load_adapter(zoo.build("bert"), folder))
    lowrank.save_adapter(model, folder)
    assert tensors_file(folder).name != old
    assert {file.name for file in folder.iterdir()} == {CONFIG, tensors_file(folder).name}
    again = lowrank.load_adapter(zoo.build("bert"), folder)
    assert torch.equal(logits(again, zoo.batch("bert")), logits(model, zoo.batch("bert")))


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_while_saving_leaves_the_old_adapter(
    folder: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturb(lowrank.load_adapter(zoo.build("bert"), folder))
    calls = 0
    import os

    replace = os.replace

    def crash(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk is full"):
        lowrank.save_adapter(model, folder)
    monkeypatch.undo()
    again = lowrank.load_adapter(zoo.build("bert"), folder)
    assert torch.equal(logits(again, zoo.batch("bert")), torch.load(folder.parent / "logits.pt"))


def test_an_adapter_with_nan_is_not_saved(folder: Path) -> None:
    model = lowrank.load_adapter(zoo.build("bert"), folder)
    with torch.no_grad():
        next(lowrank.adapter_parameters(model)).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^refusing to save: .* contains NaN or Inf$"):
        lowrank.save_adapter(model, folder)
    assert lowrank.load_adapter(zoo.build("bert"), folder)


def truncate(folder: Path) -> None:
    file = tensors_file(folder)
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = tensors_file(folder)
    blob = bytearray(file.read_bytes())
    blob[-5] ^= 1
    file.write_bytes(blob)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "holds no adapter.json"),
    "no tensors": (lambda f: tensors_file(f).unlink(), "is missing"),
    "truncated": (truncate, "it is truncated"),
    "a flipped bit": (flip, "is damaged: its content does not match the hash"),
    "truncated JSON": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:-9]), "cannot be read"),
    "JSON of absurd depth": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read"),
    "another format": (
        lambda f: edit(f, lambda c: c.update(format="x")),
        "does not describe a lowrank adapter",
    ),
    "another version": (lambda f: edit(f, lambda c: c.update(version=99)), "has format version 99"),
    "a file elsewhere": (
        lambda f: edit(f, lambda c: c.update(tensors="../x.safetensors")),
        "outside its folder",
    ),
    "a key is missing": (lambda f: edit(f, lambda c: c.pop("plan")), "does not hold a whole adapter"),
    "a plan of nonsense": (
        lambda f: edit(f, lambda c: c["plan"]["projections"][0].update(rank="two")),
        "does not hold a whole adapter",
    ),
    "a projection too few": (
        lambda f: edit(f, lambda c: c["plan"].update(projections=c["plan"]["projections"][:-1], matches={})),
        "tensors that its plan does not name",
    ),
    "an initializer of no kind": (
        lambda f: edit(f, lambda c: c["plan"].update(init=3)),
        "is not an initializer",
    ),
    "other weights": (
        lambda f: edit(f, lambda c: next(iter(c["fingerprint"].values()))["sample"].__setitem__(0, 9.0)),
        "made for a base with other weights",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_untouched(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    model = zoo.build("bert")
    modules = dict(model.named_modules())
    with pytest.raises(lowrank.AdapterError, match=message):
        lowrank.load_adapter(model, folder)
    assert dict(model.named_modules()) == modules
    assert "_lowrank" not in model.__dict__


def test_another_base_lists_all_mismatches(folder: Path) -> None:
    with pytest.raises(lowrank.AdapterError, match="another base") as raised:
        lowrank.load_adapter(zoo.build("roberta"), folder)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 4  # query and value of two layers; the classifier is there, if of another kind


def test_a_base_with_other_weights_lists_all_of_them(folder: Path) -> None:
    with pytest.raises(lowrank.AdapterError, match="other weights") as raised:
        lowrank.load_adapter(zoo.build("bert", seed=1), folder)
    assert len(str(raised.value).splitlines()) == 1 + 4


def test_another_precision_is_the_same_base(folder: Path) -> None:
    model = lowrank.load_adapter(zoo.build("bert", torch.bfloat16), folder)
    wanted = torch.load(folder.parent / "logits.pt")
    torch.testing.assert_close(logits(model, zoo.batch("bert")).float(), wanted, rtol=0.1, atol=0.05)


def test_a_fused_weight_that_was_adapted_whole_still_loads(tmp_path: Path) -> None:
    """As folders have it that were written when interleaved heads were not told apart."""
    paths = [f"gpt_neox.layers.{i}.attention.query_key_value" for i in (0, 1)]
    wholes = [Projection(path, "weight", (0, 96), Role.OTHER, 32, 96) for path in paths]
    plan = Plan({p: Allocation(2, 1.0) for p in wholes}, init=presets.pissa().init)
    model = perturb(lowrank.wrap_model(zoo.build("neox"), plan, progress=False))
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(zoo.build("neox"), tmp_path)
    assert torch.equal(logits(again, zoo.batch("neox")), logits(model, zoo.batch("neox")))


def test_interleaved_rows_of_another_base_are_named(tmp_path: Path) -> None:
    model = lowrank.wrap_model(zoo.build("neox"), presets.lora(rank=2, target="key"), progress=False)
    lowrank.save_adapter(model, tmp_path)
    other = zoo.build("neox")
    with torch.no_grad():
        other.gpt_neox.layers[1].attention.query_key_value.weight.view(4, 3, 8, 32)[:, 1].add_(0.5)
    with pytest.raises(lowrank.AdapterError, match=r"layers\.1.*\[key\]: its weights differ") as raised:
        lowrank.load_adapter(other, tmp_path)
    assert "layers.0" not in str(raised.value)


def test_a_peft_folder_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(lowrank.AdapterError, match="this is a PEFT adapter"):
        lowrank.load_adapter(zoo.build("bert"), tmp_path)


def test_a_name_is_taken_once(folder: Path) -> None:
    model: nn.Module = lowrank.load_adapter(zoo.build("bert"), folder)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        lowrank.load_adapter(model, folder)


def test_what_could_not_be_read_again_is_not_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = lowrank.load_adapter(zoo.build("bert"), folder)
    perturb(model)
    monkeypatch.setattr("lowrank.files.LARGEST_JSON", len(before[CONFIG]) // 2)
    with pytest.raises(ValueError, match=r"refusing to save: adapter\.json would have .* bytes"):
        lowrank.save_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
