"""An adapted model that FSDP2 has sharded: saving, swapping, taking adapters out, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Policy, presets
from lowrank.processes import part, whole
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb, wrapped
from tests.parallel.processes import refusal, sharded, together

CASES: dict[str, tuple[str, Policy]] = {
    "lora": ("llama", presets.lora(rank=4)),
    "anchored": ("llama", presets.pissa(rank=4)),
    "with a module trained in full": ("bert", presets.lora(rank=2, train=("classifier",))),
    "with magnitudes": ("llama", presets.dora(rank=4)),
    "tied": ("tied_llama", presets.lora(rank=2)),
}


def adapted(case: str) -> nn.Module:
    family, policy = CASES[case]
    return perturb(lowrank.wrap_model(zoo.build(family), policy, progress=False))


def saved_and_swapped(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        model = sharded(adapted(case))
        lowrank.save_adapter(model, folder / case)
    model = sharded(adapted("lora"))
    batch = zoo.batch("llama")
    found["merge"] = refusal(lambda: lowrank.merge(model))
    found["merged"] = refusal(lambda: lowrank.merged(model).__enter__())
    found["export"] = refusal(lambda: lowrank.export_peft(model, folder / "peft"))
    found["load"] = refusal(lambda: lowrank.load_adapter(model, folder / "lora", name="other"))

    with torch.no_grad():
        for p in lowrank.adapter_parameters(model):
            p.mul_(0.5)
    lowrank.swap_adapter(model, folder / "lora", "default")
    found["swapped"] = [whole(p) for p in lowrank.adapter_parameters(model)]

    target = folder / "unwritable"
    if rank == 0:
        target.write_text("a file")
    found["unwritable"] = refusal(lambda: lowrank.save_adapter(model, target))
    if rank == 1:
        part(next(lowrank.adapter_parameters(model))).fill_(float("nan"))
    found["NaN"] = refusal(lambda: lowrank.save_adapter(model, folder / "lora"))

    model = sharded(adapted("with magnitudes"))
    found["magnitudes"] = logits(model, batch)
    model(**batch).loss.backward()
    found["their gradients"] = [whole(p.grad) for p in lowrank.adapter_parameters(model)]

    model = sharded(adapted("anchored"))
    model(**batch).loss.backward()
    lowrank.unwrap(model)
    found["unwrapped"] = {name: whole(p).clone() for name, p in model.state_dict().items()}
    found["logits"] = frozen_logits(model, batch)
    return found


def several(rank: int, folder: Path) -> dict[str, Any]:
    """Two adapters beside each other, with different parts of the model."""
    model = perturb(lowrank.wrap_model(zoo.build("llama"), presets.lora(rank=2), name="fr", progress=False))
    lowrank.add_adapter(model, presets.pissa(rank=3, target="query"), name="de", progress=False)
    perturb(model)
    model = sharded(model)
    found: dict[str, Any] = {}
    for weights in ((), ("fr",), ("de",), {"fr": 0.5, "de": 2.0}):
        with lowrank.use_adapters(model, weights):
            found[str(weights)] = model(**zoo.batch("llama")).logits.detach()
    lowrank.save_adapter(model, folder / "de", name="de")
    lowrank.remove_adapter(model, "fr")
    found["names"] = lowrank.adapter_names(model)
    with lowrank.use_adapters(model, "de"):
        found["left"] = model(**zoo.batch("llama")).logits.detach()
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, together(saved_and_swapped, folder, folder)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_adapter_is_saved_as_one_process_saves_it(case: str, done: Any, tmp_path: Path) -> None:
    """The same files, bit for bit, and they load onto a fresh base."""
    folder, _ = done
    lowrank.save_adapter(adapted(case), tmp_path)
    ours, theirs = ({f.name: f.read_bytes() for f in at.iterdir()} for at in (tmp_path, folder / case))
    assert ours == theirs
    base = zoo.build(CASES[case][0])
    lowrank.load_adapter(base, folder / case)
    for got, wanted in zip(base.parameters(), adapted(case).parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_magnitudes_act_and_train_on_a_sharded_base(done: Any) -> None:
    model, batch = adapted("with magnitudes"), zoo.batch("llama")
    wanted = logits(model, batch)
    model(**batch).loss.backward()
    for found in done[1]:
        torch.testing.assert_close(found["magnitudes"], wanted)
        for got, p in zip(found["their gradients"], lowrank.adapter_parameters(model), strict=True):
            torch.testing.assert_close(got, p.grad)


def test_swapping_fills_the_shards(done: Any) -> None:
    wanted = list(lowrank.adapter_parameters(adapted("lora")))
    for found in done[1]:
        for got, value in zip(found["swapped"], wanted, strict=True):
            assert torch.equal(got, value)


def test_what_fails_in_one_process_fails_in_all(done: Any) -> None:
    one, two = done[1]
    assert one["unwritable"][0] == two["unwritable"][0] == "ValueError"
    assert "is a file: name a folder" in one["unwritable"][1]
    assert "save_adapter failed in rank 0" in two["unwritable"][1]
    assert one["NaN"] == two["NaN"] and "contains NaN or Inf" in one["NaN"][1]


def test_an_unwrapped_sharded_model_is_its_base(done: Any) -> None:
    base = zoo.build("llama")
    wanted = frozen_logits(base, zoo.batch("llama"))
    for found in done[1]:
        assert found["unwrapped"].keys() == base.state_dict().keys()
        for name, value in base.state_dict().items():
            assert torch.equal(found["unwrapped"][name], value)
        assert torch.equal(found["logits"], wanted)


@pytest.mark.parametrize("act", ["merge", "merged", "export", "load"])
def test_what_needs_the_whole_model_is_refused(act: str, done: Any) -> None:
    for found in done[1]:
        kind, message = found[act]
        assert kind == "ValueError"
        if act == "load":
            assert "adapt the model first, then make it parallel" in message
        else:
            assert "sharded: call save_adapter(model, path) in every process" in message


@pytest.mark.slow
def test_several_adapters_act_on_a_sharded_base(tmp_path: Path) -> None:
    one, two = together(several, tmp_path, tmp_path)
    model = wrapped("llama", presets.lora(rank=2), name="fr")
    perturb(model)
    lowrank.add_adapter(model, presets.pissa(rank=3, target="query"), name="de", progress=False)
    perturb(model)
    batch = zoo.batch("llama")
    for weights in ((), ("fr",), ("de",), {"fr": 0.5, "de": 2.0}):
        with lowrank.use_adapters(model, weights), torch.no_grad():
            wanted = model(**batch).logits
        torch.testing.assert_close(one[str(weights)], wanted)
        torch.testing.assert_close(two[str(weights)], wanted)
    assert one["names"] == ["de"]
    torch.testing.assert_close(one["left"], one["('de',)"])
    fresh = lowrank.load_adapter(zoo.build("llama"), tmp_path / "de", name="de")
    for got, value in zip(
        lowrank.adapter_parameters(fresh), lowrank.adapter_parameters(model, "de"), strict=True
    ):
        assert torch.equal(got, value)
