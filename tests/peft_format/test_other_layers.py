"""Embeddings and convolutions in PEFT's folders, both ways, held against what PEFT itself computes."""

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
from lowrank.init import Kaiming, Principal
from tests import zoo
from tests.helpers import logits, perturb

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

CASES = {
    "llama": ("q_proj", "embed_tokens"),
    "gpt2": ("c_attn", "wte"),
    "gemma3": ("embed_tokens", "v_proj"),
    "vit": ("query", "conv"),
}


@pytest.mark.parametrize("init", [Kaiming(), Principal()], ids=["kaiming", "pissa"])
@pytest.mark.parametrize("family", CASES)
def test_peft_computes_what_was_exported(family: str, init: Any, tmp_path: Path) -> None:
    model, batch = zoo.build(family), zoo.batch(family)
    lowrank.wrap_model(model, Policy(target=CASES[family], rank=3, init=init), progress=False)
    perturb(model)
    lowrank.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(zoo.build(family), tmp_path / "peft").eval()
    assert torch.allclose(logits(theirs, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    ours = lowrank.import_peft(zoo.build(family), tmp_path / "peft")
    assert torch.allclose(logits(ours, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", ["q_proj", "embed_tokens"]),
        ("tied_llama", ["q_proj", "embed_tokens"]),
        ("vit", ["query", "patch_embeddings.projection"]),
    ],
)
def test_what_peft_saved_is_imported_exactly(family: str, target: list[str], tmp_path: Path) -> None:
    batch = zoo.batch(family)
    theirs = peft.get_peft_model(zoo.build(family), peft.LoraConfig(r=3, target_modules=target))
    perturb(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours = lowrank.import_peft(zoo.build(family), tmp_path)
    assert torch.allclose(logits(ours, batch), logits(theirs, batch), rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload().state_dict() if family != "tied_llama" else {}
    if merged:
        lowrank.merge(ours)
        for key, tensor in ours.state_dict().items():
            assert torch.allclose(tensor, merged[key], atol=1e-5)


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(AdapterError, match="made for a base with other embeddings: model.embed_tokens"):
        lowrank.import_peft(zoo.build("llama", seed=1), tmp_path)


def test_what_pefts_convolution_leaves_out_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3, dilation=2), nn.Linear(6, 3))
    lowrank.wrap_model(model, Policy(target="conv", rank=2), progress=False)
    with pytest.raises(ValueError, match="0: PEFT leaves out the dilation"):
        lowrank.export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_folder_that_ties_adapters_is_refused_by_name(tmp_path: Path) -> None:
    model = zoo.build("tied_llama")
    lowrank.wrap_model(model, Policy(target="embed_tokens", rank=2), progress=False)
    lowrank.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": True}))
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        lowrank.import_peft(zoo.build("tied_llama"), tmp_path)
