"""One adapter of several is trained: what it trains, what a run says that trains another, bad choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lowrank
from lowrank import presets
from lowrank.train import EarlyStopping, KeepBest, fit
from tests import zoo
from tests.peft_format.common import warnings_of_peft


def two(family: str = "bert") -> nn.Module:
    """Both train the head in full."""
    model = zoo.build(family)
    for name in ("a", "b"):
        lowrank.add_adapter(model, presets.lora(rank=2, train=("classifier",)), name=name, progress=False)
    return model


def train(model: nn.Module, **options: Any) -> None:
    fit(model, [zoo.batch("bert", seed=i) for i in range(3)], lr=1e-2, progress=False, **options)


def test_what_one_adapter_trains_has_its_heads_where_they_are_asked_for() -> None:
    model = two()
    alone, both = (list(lowrank.adapter_parameters(model, "b", train=head)) for head in (False, True))
    heads = list(model.classifier.copies["b"].parameters())
    assert not any(p is head for p in alone for head in heads)
    assert {id(p) for p in both} == {id(p) for p in [*alone, *heads]} and len(both) == len(alone) + 2
    every = list(lowrank.adapter_parameters(model, train=True))
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(every) == 2 * len(both)


def test_one_of_two_is_trained_and_the_other_stays() -> None:
    model = two()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lowrank.set_adapters(model, "b")
    train(model, parameters=lowrank.adapter_parameters(model, "b", train=True))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = {id(p) for p in lowrank.adapter_parameters(model, "b", train=True)}
    assert moved == {name for name, p in model.named_parameters() if id(p) in own}


@pytest.mark.parametrize("resting", ["a", "b"])
def test_a_run_that_trains_what_does_not_act_says_so(resting: str) -> None:
    model = two()
    lowrank.set_adapters(model, "b" if resting == "a" else "a")
    message = rf"no gradient to 14 of .* and 6 more; the adapter '{resting}' does not act"
    with pytest.raises(ValueError, match=message) as raised:
        train(model)
    assert "allow_unused" not in str(raised.value) and len(str(raised.value)) < 1000
    lowrank.set_adapters(model, ())
    with pytest.raises(ValueError, match="the adapters 'a' and 'b' do not act"):
        train(model)


def test_a_parameter_that_no_adapter_holds_is_said_as_before() -> None:
    model = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    with pytest.raises(
        ValueError, match="to 1 of what is to train: spare; freeze it, or pass allow_unused=True"
    ):
        train(model)


def test_lora_plus_of_one_adapter() -> None:
    model = two()
    slow, fast = lowrank.lora_plus(model, 1e-3, ratio=4, name="b")
    assert {id(p) for group in (slow, fast) for p in group["params"]} == {
        id(p) for p in lowrank.adapter_parameters(model, "b", train=True)
    }
    assert all(p.shape[1] == 2 for p in fast["params"]) and (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    lowrank.set_adapters(model, "b")
    train(model, parameters=[slow, fast])
    with pytest.raises(ValueError, match="no adapter 'c'"):
        lowrank.lora_plus(model, name="c")
    for p in lowrank.adapter_parameters(model, "b"):
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="the adapter 'b' has no factor B that requires grad"):
        lowrank.lora_plus(model, name="b")


@pytest.mark.parametrize("names", [None, 3, object()])
@pytest.mark.parametrize("choose", [lowrank.set_adapters, lambda *a: lowrank.use_adapters(*a).__enter__()])
def test_what_is_no_choice_is_refused(choose: Callable[..., Any], names: Any) -> None:
    with pytest.raises(ValueError, match="expected a name, several, or a mapping from names to weights"):
        choose(two(), names)


def test_an_export_takes_a_name_as_saving_does(tmp_path: Path) -> None:
    model = two()
    assert lowrank.export_peft(model, tmp_path / "b", "b").path == tmp_path / "b"
    with pytest.raises(ValueError, match="several adapters, so name one"):
        lowrank.export_peft(model, tmp_path / "none")


@pytest.mark.parametrize("kind", [EarlyStopping, KeepBest])
def test_a_callback_that_watches_scores_needs_some(kind: Any) -> None:
    model = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs evaluate="):
        train(model, callbacks=[kind("accuracy")])


def test_an_optimizer_that_is_made_already_is_refused() -> None:
    model = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    made = torch.optim.SGD(lowrank.adapter_parameters(model), lr=1.0)
    with pytest.raises(ValueError, match="optimizer: expected a function from parameter groups .* got SGD"):
        train(model, optimizer=made)


def test_no_plan_is_no_memory_report() -> None:
    with pytest.raises(ValueError, match="plan: expected a Plan, .* got Policy"):
        lowrank.memory_report(zoo.build("bert"), presets.lora(rank=2), batch=zoo.batch("bert"))  # type: ignore[arg-type]


@warnings_of_peft
def test_a_model_with_adapters_of_peft_is_refused(tmp_path: Path) -> None:
    lowrank.save_adapter(
        lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False), tmp_path
    )
    model = peft.get_peft_model(zoo.build("bert"), peft.LoraConfig(target_modules=["query"]))
    inside = nn.Sequential(model)
    for act in (
        lambda: lowrank.wrap_model(model, presets.lora(rank=2)),
        lambda: lowrank.plan_model(model, presets.lora(rank=2)),
        lambda: lowrank.load_adapter(model, tmp_path),
        lambda: lowrank.import_peft(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"the model is PEFT's: take its adapters out first \(unload"):
            act()
    with pytest.raises(ValueError, match="0 is PEFT's"):
        lowrank.wrap_model(inside, presets.lora(rank=2))
    assert lowrank.wrap_model(model.unload(), presets.lora(rank=2), progress=False)


def test_what_acts_can_be_asked() -> None:
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="not wrapped"):
        lowrank.acting_adapters(model)
    for name in ("a", "b"):
        lowrank.add_adapter(model, presets.lora(rank=2), name=name, progress=False)
    assert lowrank.acting_adapters(model) == {"a": 1.0}
    lowrank.set_adapters(model, {"b": 0.25, "a": 2})
    assert lowrank.acting_adapters(model) == {"b": 0.25, "a": 2.0}
    with lowrank.disable_adapters(model):
        assert lowrank.acting_adapters(model) == {}
    with lowrank.adapters_for_rows(model, ["a", None]):
        assert lowrank.acting_adapters(model) == {}
    assert lowrank.acting_adapters(nn.Sequential(model)) == {"b": 0.25, "a": 2.0}
    lowrank.set_adapters(model, lowrank.acting_adapters(model))
    lowrank.remove_adapter(model, "b")
    assert lowrank.acting_adapters(model) == {"a": 2.0}
