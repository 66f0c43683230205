"""Rows of embeddings that train alone, as PEFT's ``trainable_token_indices``: held against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lowrank
from lowrank import AdapterError, Policy
from tests import zoo
from tests.helpers import logits, perturb
from tests.test_token_rows import CASES, IDS, batch_of, offsets, policy, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
FAMILIES = ["llama", "tied_llama", "gemma3", "gpt2", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_was_exported(family: str, tmp_path: Path) -> None:
    model, batch = perturb(wrapped(family)), batch_of(family)
    lowrank.export_peft(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == {CASES[family][1]: list(IDS)}
    theirs = peft.PeftModel.from_pretrained(zoo.build(family), tmp_path).eval()
    assert torch.allclose(logits(theirs, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    ours = lowrank.import_peft(zoo.build(family), tmp_path)
    assert torch.allclose(logits(ours, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    path = CASES[family][1]
    assert torch.allclose(offsets(ours, path), offsets(model, path), atol=1e-6)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "the input embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_trained_is_imported(family: str, named: bool, tmp_path: Path) -> None:
    name, path, _ = CASES[family]
    batch, ids = batch_of(family), [30, 4, 9]
    target = {"gpt2": "c_attn", "t5": "q"}.get(family, "q_proj")
    config = peft.LoraConfig(
        r=2, target_modules=[target], trainable_token_indices={name: ids} if named else ids
    )
    theirs = peft.get_peft_model(zoo.build(family), config)
    perturb(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours = lowrank.import_peft(zoo.build(family), tmp_path)
    assert torch.allclose(logits(ours, batch), logits(theirs, batch), rtol=1e-4, atol=1e-5)
    assert lowrank.plan_of(ours).rows[0].ids == IDS
    wrong = lowrank.wrap_model(zoo.build(family), Policy(target=target, rank=2), progress=False)
    assert not torch.allclose(logits(wrong, batch), logits(theirs, batch), rtol=1e-2, atol=1e-2)
    rows = theirs.merge_and_unload().get_submodule(path).weight
    lowrank.merge(ours)
    assert torch.allclose(ours.get_submodule(path).weight, rows, atol=1e-6)


def test_a_tied_head_that_is_named_too_follows_its_embedding(tmp_path: Path) -> None:
    said = {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=said)
    theirs, batch = peft.get_peft_model(zoo.build("tied_llama"), config), batch_of("tied_llama")
    perturb(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours = lowrank.import_peft(zoo.build("tied_llama"), tmp_path)
    assert torch.allclose(logits(ours, batch), logits(theirs, batch), rtol=1e-4, atol=1e-5)


def test_a_plan_gives_peft_the_same_rows() -> None:
    plan = lowrank.plan_model(zoo.build("tied_llama"), policy("tied_llama", target="q_proj"))
    theirs = peft.get_peft_model(zoo.build("tied_llama"), peft.LoraConfig(**plan.to_peft()))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == plan.trainable_parameters


class WithBias(nn.Module):
    """A head with a bias, tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(self.inner(self.embed(ids)))


def test_what_peft_would_train_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    model = lowrank.wrap_model(
        WithBias(), Policy(target="inner", rank=2, rows={"embed": [3]}), progress=False
    )
    with pytest.raises(
        ValueError, match=r"embed: the modules that have its weight are \['head'\].*tied to it \[\]"
    ):
        lowrank.export_peft(model, tmp_path / "peft")
    untied = zoo.build("tied_llama")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    lowrank.wrap_model(untied, policy("tied_llama"), progress=False)
    with pytest.raises(ValueError, match=r"have its weight are \[\], and those that PEFT .* \['lm_head'\]"):
        lowrank.export_peft(untied, tmp_path / "peft")
    both = wrapped("tied_llama", target=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match="lm_head: PEFT cannot adapt it and move rows of its weight"):
        lowrank.export_peft(both, tmp_path / "peft")
    with pytest.raises(ValueError, match="serving engines refuse or ignore .*embed_tokens"):
        lowrank.export_peft(wrapped("llama"), tmp_path / "peft", serving=True)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"embed_tokens": [4, 9]}, r"embed_tokens: its rows are \(3, 32\) F32, expected 2"),
        ({"embed_tokens": [4, 9, 64]}, "embed_tokens: it has the rows 0 to 63, got 64"),
        ({"embed_tokens": [4, 9, 9]}, "has an id twice"),
        ({"embed_tokens": [4, 9, -1]}, "expected a list of token ids"),
        (
            {"embed_tokens": IDS, "lm_head": IDS},
            "lm_head: trainable_token_indices names it, but the folder has no",
        ),
        (None, "embed_tokens: the folder has rows of it, which trainable_token_indices does not name"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(said: Any, why: str, tmp_path: Path) -> None:
    lowrank.export_peft(wrapped("llama"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = said
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = zoo.build("llama")
    with pytest.raises(AdapterError, match=why):
        lowrank.import_peft(model, tmp_path)
    assert not lowrank.adapted_layers(model)
