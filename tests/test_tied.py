"""Weights that two modules share: adapting one end, merging it, and what a saved folder says afterwards."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import lowrank
from lowrank import Policy
from lowrank.layers.tree import original
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb
from tests.peft_format.common import warnings_of_peft

TIED = ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")


@pytest.mark.parametrize("target", TIED, ids="+".join)
def test_merging_unties_when_asked_and_the_saved_folder_is_read_as_it_was(
    target: tuple[str, ...], tmp_path: Path
) -> None:
    model, batch = zoo.build("tied_llama"), zoo.batch("tied_llama")
    base = frozen_logits(model, batch)
    shared = model.lm_head.weight.clone()
    lowrank.wrap_model(model, Policy(target=target, rank=4), progress=False)
    assert torch.equal(logits(model, batch), base)
    perturb(model)
    trained = logits(model, batch)
    deltas = {path: layer.delta_weight() for path, layer in lowrank.adapted_layers(model).items()}
    with pytest.raises(ValueError, match=r"is tied to another module's weight.*untie=True"):
        lowrank.merge(model)
    assert torch.equal(logits(model, batch), trained), "a refused merge changed something"

    lowrank.merge(model, untie=True)
    assert (logits(model, batch) - trained).abs().max() < 1e-5
    embedding = shared + deltas.get("model.embed_tokens", torch.zeros(32, zoo.VOCABULARY)).T
    head = shared + deltas.get("lm_head", torch.zeros(zoo.VOCABULARY, 32))
    assert torch.allclose(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(model.lm_head.weight, head)

    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(frozen_logits(again, batch), frozen_logits(model, batch))


ENDS: dict[str, dict[str, Any]] = {
    "embedding": dict(target="embed_tokens"),
    "head": dict(target="lm_head"),
    "both": dict(target=("embed_tokens", "lm_head")),
    "rows": dict(target="query", rows={"embed_tokens": [3, 5]}),
    "neither": dict(target="query"),
}


@pytest.mark.parametrize("ends", ENDS)
def test_tying_again_leaves_the_adapters_where_they_are(ends: str) -> None:
    batch = zoo.batch("tied_llama")
    model = perturb(lowrank.wrap_model(zoo.build("tied_llama"), Policy(rank=2, **ENDS[ends]), progress=False))
    wanted = logits(model, batch)
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        modules = dict(made.named_modules())
        made.tie_weights()
        assert dict(made.named_modules()) == modules
        assert torch.equal(logits(made, batch), wanted)
        base = original(made.model.embed_tokens).weight
        assert original(made.lm_head).weight is base
        assert lowrank.unwrap(made).lm_head.weight is base


@pytest.mark.parametrize("ends", ENDS)
def test_weights_that_come_after_wrapping_are_tied(ends: str) -> None:
    """As docs/bases.md has it for the meta device: assigning separates what was tied."""
    family, policy = "tied_llama", Policy(rank=2, **ENDS[ends])
    base = zoo.build(family)
    with torch.device("meta"):
        model = zoo.FAMILIES[family][0]().eval()
    lowrank.wrap_model(model, policy, progress=False)
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    model.tie_weights()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = base.get_submodule(path)._buffers[name]
    assert original(model.lm_head).weight is original(model.model.embed_tokens).weight
    usual = perturb(lowrank.wrap_model(zoo.build(family), policy, progress=False))
    assert torch.equal(logits(perturb(model), zoo.batch(family)), logits(usual, zoo.batch(family)))


def test_what_is_not_tied_keeps_its_parameter() -> None:
    model = zoo.build("tied_llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    lowrank.wrap_model(model, Policy(target="q_proj", rank=4), progress=False)
    lowrank.merge(model, untie=True)
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_tokens_added_by_resizing_are_adapted_with_the_others(tmp_path: Path) -> None:
    model, batch = zoo.build("tied_llama"), zoo.batch("tied_llama")
    model.resize_token_embeddings(zoo.VOCABULARY + 3)
    fresh = zoo.build("tied_llama")
    fresh.resize_token_embeddings(zoo.VOCABULARY + 3)
    fresh.load_state_dict(model.state_dict())
    batch["input_ids"][0, :3] = torch.arange(zoo.VOCABULARY, zoo.VOCABULARY + 3)
    lowrank.wrap_model(model, Policy(target="embedding", rank=4), progress=False)
    perturb(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    with pytest.raises(lowrank.AdapterError):
        lowrank.load_adapter(zoo.build("tied_llama"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [{"target": ("embed_tokens",)}, {"target": ("lm_head",)}, {"rows": {"embed_tokens": (3, 4)}}],
    ids=["embedding", "head", "rows"],
)
def test_resizing_what_is_adapted_is_refused_and_changes_nothing(options: dict[str, Any]) -> None:
    model, batch = zoo.build("tied_llama"), zoo.batch("tied_llama")
    lowrank.wrap_model(model, Policy(**{"target": "q_proj", **options}, rank=4), progress=False)
    trained = logits(perturb(model), batch)
    with pytest.raises(ValueError, match="resize_token_embeddings would drop .* resize before wrap_model"):
        model.resize_token_embeddings(zoo.VOCABULARY + 3)
    assert torch.equal(logits(model, batch), trained)
    lowrank.unwrap(model).resize_token_embeddings(zoo.VOCABULARY + 3)
    assert logits(model, batch).shape[-1] == zoo.VOCABULARY + 3


def test_resizing_beside_adapters_of_other_layers_keeps_them(tmp_path: Path) -> None:
    model, batch = zoo.build("tied_llama"), zoo.batch("tied_llama")
    lowrank.wrap_model(model, Policy(target="q_proj", rank=4), progress=False)
    trained = logits(perturb(model), batch)
    model.resize_token_embeddings(zoo.VOCABULARY + 3)
    assert torch.equal(logits(model, batch)[..., : zoo.VOCABULARY], trained)
    lowrank.save_adapter(model, tmp_path)
    with pytest.raises(lowrank.AdapterError, match=r"expected the shape \(67, 32\), got \(64, 32\)"):
        lowrank.load_adapter(zoo.build("tied_llama"), tmp_path)


@pytest.mark.parametrize(("saved", "loaded"), [(3, 0), (0, 3)])
@pytest.mark.parametrize("target", TIED, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "tied_llama"])
def test_an_adapter_of_another_number_of_tokens_is_refused_by_name(
    family: str, target: tuple[str, ...], saved: int, loaded: int, tmp_path: Path
) -> None:
    def resized(more: int) -> torch.nn.Module:
        model = zoo.build(family)
        if more:
            model.resize_token_embeddings(zoo.VOCABULARY + more, mean_resizing=False)
        return model

    def policy() -> Policy:
        return Policy(target=(*target, "q_proj"), rank=2)

    perturb(lowrank.wrap_model(model := resized(saved), policy(), progress=False))
    lowrank.save_adapter(model, tmp_path / "ours")
    fresh, batch = resized(loaded), zoo.batch(family)
    base = frozen_logits(fresh, batch)
    then, now = zoo.VOCABULARY + saved, zoo.VOCABULARY + loaded
    tokens = f"it was adapted for {then} tokens, and this model has {now}: .*resize_token_embeddings.{then}."
    for other in ("same", "other"):
        with pytest.raises(lowrank.AdapterError) as refused:
            lowrank.load_adapter(fresh, tmp_path / "ours", base=other)  # type: ignore[arg-type]
        for name in target:
            assert re.search(f"{name}: {tokens}", str(refused.value))
    lowrank.export_peft(model, tmp_path / "peft")
    with pytest.raises(lowrank.AdapterError) as refused:
        lowrank.import_peft(fresh, tmp_path / "peft")
    assert all(f"{name}: expected factors" in str(refused.value) for name in target)
    assert torch.equal(frozen_logits(fresh, batch), base)
    lowrank.wrap_model(fresh, policy(), progress=False)
    with pytest.raises(lowrank.AdapterError) as refused:
        lowrank.swap_adapter(fresh, tmp_path / "ours", "default")
    for name in target:
        assert re.search(rf"{name}: of shape \(.*{then}.*\), expected \(.*{now}", str(refused.value))
    with pytest.raises(ValueError, match=tokens):
        lowrank.wrap_model(resized(loaded), lowrank.plan_of(model), progress=False)


@warnings_of_peft
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("target", [("q_proj",), *TIED], ids="+".join)
def test_peft_and_we_read_each_others_adapters_of_a_resized_base(
    target: tuple[str, ...], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")

    def resized() -> torch.nn.Module:
        model = zoo.build("tied_llama")
        model.resize_token_embeddings(zoo.VOCABULARY + 3, mean_resizing=False)
        if state:
            model.load_state_dict(state)
        return model

    state: dict[str, torch.Tensor] = {}
    model, batch = resized(), zoo.batch("tied_llama")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    batch["input_ids"][0, 0] = zoo.VOCABULARY + 1
    perturb(lowrank.wrap_model(model, Policy(target=target, rank=4), progress=False))
    lowrank.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "ours").eval()
    assert (logits(theirs, batch) - logits(model, batch)).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.import_peft(resized(), tmp_path / "theirs")
    assert (logits(ours, batch) - logits(model, batch)).abs().max() < 1e-5
