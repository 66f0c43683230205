"""DoRA in PEFT's folders: both ways, and held against what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lowrank
from lowrank import presets
from tests import helpers, zoo
from tests.peft_format.common import (
    adapted,
    assert_same,
    frozen_base,
    logits,
    theirs,
    trained_by_peft,
    warnings_of_peft,
    written,
)

pytestmark = warnings_of_peft
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"preset": presets.pissa}),
    ("gpt2", {"target": ("query", "value")}),
    ("neox", {"target": "query"}),
    ("bert", {"train": ("classifier",)}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_peft_computes_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    model = adapted(family, options.pop("preset", presets.lora)(rank=3, dora=True, **options))
    lowrank.export_peft(model, tmp_path)
    assert written(tmp_path)["use_dora"] is True
    assert_same(logits(theirs(tmp_path, family), family), logits(model, family), frozen_base(family))
    again = lowrank.import_peft(zoo.build(family), tmp_path)
    assert_same(logits(again, family), logits(model, family), frozen_base(family))


@pytest.mark.parametrize(("family", "target"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_an_adapter_that_peft_trained(family: str, target: str, tmp_path: Path) -> None:
    wanted = trained_by_peft(
        family, tmp_path, r=3, use_dora=True, target_modules=[target], fan_in_fan_out=family == "gpt2"
    )
    model = lowrank.import_peft(zoo.build(family), tmp_path)
    assert_same(logits(model, family), wanted, frozen_base(family))
    assert lowrank.plan_of(model).dora


def test_gradients_are_pefts(tmp_path: Path) -> None:
    model = adapted("llama", presets.dora(rank=3, target="q_proj"))
    lowrank.export_peft(model, tmp_path)
    other = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path, is_trainable=True)
    for each in (model, other):
        each(**zoo.batch("llama")).loss.backward()
    ours = [a.magnitude.offset.grad for a in lowrank.adapters.adapters_of(model).values()]
    named = [p for name, p in other.named_parameters() if "magnitude" in name]
    assert len(ours) == len(named) == 2
    for grad, parameter in zip(ours, named, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("family", "target"), [("llama", "embed_tokens"), ("vit", "projection"), ("gpt2", "wte")]
)
def test_magnitudes_of_other_layers_are_refused_by_name(family: str, target: str, tmp_path: Path) -> None:
    trained_by_peft(family, tmp_path, r=3, use_dora=True, target_modules=[target])
    with pytest.raises(ValueError, match=rf"{target}: magnitudes \(DoRA\) of a \w+ are not supported"):
        lowrank.import_peft(zoo.build(family), tmp_path)


def test_serving_engines_have_no_magnitudes(tmp_path: Path) -> None:
    model = helpers.perturb(lowrank.wrap_model(zoo.build("llama"), presets.dora(rank=2), progress=False))
    with pytest.raises(ValueError, match="no magnitudes"):
        lowrank.export_peft(model, tmp_path / "new", serving=True)
    assert not (tmp_path / "new").exists()
