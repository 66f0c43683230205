"""Every family, all the way: wrap, train, save, reload, export where PEFT can hold it, and generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import lowrank
from lowrank import Policy, presets
from lowrank.models.projections import Role
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

PHI3 = {"qkv_proj": {"query": 32, "key": 16, "value": 16}}


@dataclass(frozen=True)
class Case:
    """What a family needs beside "all-linear", and what of it PEFT can hold."""

    exclude: tuple[str, ...] = ()
    fused: Any = None
    train: tuple[str, ...] = ()
    not_for_peft: tuple[str, ...] = ()  # left out for the export
    why: str = ""  # what the refusal says of them

    def policy(self, family: str, preset: Any = presets.lora, **options: Any) -> Policy:
        chosen = {"rank": 2, "exclude": self.exclude, "train": self.train, "fused": self.fused or {}}
        return preset(**{**chosen, **options})


HEAD = Case(train=("classifier",))
BY_WEIGHT = "its weight is read without a call"
CASES: dict[str, Case] = {
    **dict.fromkeys(zoo.FAMILIES, Case()),
    **dict.fromkeys(["bert", "minilm", "roberta", "distilbert", "deberta", "vit"], HEAD),
    "phi3": Case(fused=PHI3),
    "mamba": Case(not_for_peft=("x_proj", "dt_proj", "out_proj"), why=BY_WEIGHT),
    "torch_encoder": Case(train=("head",), not_for_peft=("encoder",), why=BY_WEIGHT),
    "torch_transformer": Case(
        train=("head",), not_for_peft=("encoder", "self_attn", "multihead_attn"), why=BY_WEIGHT
    ),
}


def wrapped(family: str, **options: Any) -> nn.Module:
    return lowrank.wrap_model(zoo.build(family), CASES[family].policy(family, **options), progress=False)


@pytest.mark.parametrize("preset", [presets.lora, presets.ailora], ids=["lora", "ailora"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_wrap_train_save_and_reload(family: str, preset: Any, tmp_path: Path) -> None:
    roles = {p.role for p in lowrank.find_projections(zoo.build(family), CASES[family].fused)}
    if preset is presets.ailora and not {Role.QUERY, Role.VALUE} <= roles:
        with pytest.raises(ValueError, match="target='query' (matches no projection|may mean rows)"):
            wrapped(family, preset=preset, exclude=())
        return
    batch, exclude = zoo.batch(family), CASES[family].exclude if preset is presets.lora else ()
    base = zoo.build(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = frozen_logits(base, batch)
    model = lowrank.wrap_model(base, CASES[family].policy(family, preset, exclude=exclude), progress=False)
    assert torch.equal(logits(model, batch), plain)

    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, reached = [], set()
    adapters = lowrank.adapters.adapters_of(model)
    for _ in range(2):  # the first step moves only one factor of a pair
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        for p, adapter in lowrank.adapters.adapters_of(model).items():
            if any(factor.grad is not None and factor.grad.any() for factor in adapter.parameters()):
                reached.add(p)
        optimizer.step()
    model.eval()
    trained = logits(model, batch)
    assert losses[1] != losses[0] and not torch.equal(trained, plain)
    assert {p for p, adapter in adapters.items() if adapter.product().any()} == reached

    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(zoo.build(family), tmp_path)
    assert torch.equal(logits(again, batch), trained)

    lowrank.unwrap(model)
    assert torch.equal(frozen_logits(model, batch), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(lowrank.merge(again), batch), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_export_and_import(family: str, tmp_path: Path) -> None:
    case, batch = CASES[family], zoo.batch(family)
    if case.why:
        with pytest.raises(ValueError, match=case.why) as raised:
            lowrank.export_peft(perturb(wrapped(family)), tmp_path / "peft")
        assert all(
            any(name in line for name in case.not_for_peft) for line in str(raised.value).splitlines()[1:]
        )
        assert not (tmp_path / "peft").exists()
        if family == "torch_encoder":  # all of it is
            return
    model = perturb(wrapped(family, exclude=case.exclude + case.not_for_peft))
    assert lowrank.export_peft(model, tmp_path / "peft").error < 1e-6
    again = lowrank.import_peft(zoo.build(family), tmp_path / "peft")
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


# How rows of the role lie among all rows, in einops' words.
INTERLEAVED = {
    "neox": ("(heads three d) i -> three (heads d) i", {"heads": 4, "three": 3}, "query key value"),
    "bloom": ("(heads three d) i -> three (heads d) i", {"heads": 4, "three": 3}, "query key value"),
    "codegen": ("(cores three d) i -> three (cores d) i", {"cores": 4, "three": 3}, "query value key"),
}


@pytest.mark.parametrize("family", INTERLEAVED)
def test_merging_one_role_changes_its_rows_alone(family: str) -> None:
    layout, sizes, order = INTERLEAVED[family]
    for place, role in enumerate(order.split()):
        model, before = zoo.build(family), zoo.build(family).state_dict()
        lowrank.wrap_model(model, presets.pissa(rank=2, target=role), progress=False)
        layers = {
            path: layer.delta_weight() for path, layer in lowrank.adapted_layers(perturb(model)).items()
        }
        lowrank.merge(model)
        assert len(layers) == 2
        for path, delta in layers.items():
            after, was = model.state_dict()[f"{path}.weight"], before[f"{path}.weight"]
            torch.testing.assert_close(after, was + delta)
            changed = rearrange((after != was).any(1, keepdim=True), layout, **sizes).flatten(1)
            assert changed.all(1).tolist() == changed.any(1).tolist() == [i == place for i in range(3)]


# -- generation ---------------------------------------------------------------------------------------

GENERATING = [
    "llama", "tied_llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "phi3", "opt", "gpt2",
    "neox", "bloom", "codegen", "falcon40b", "falcon", "mixtral", "mamba", "t5",
]  # fmt: skip
LENGTH = 10


def generated(model: nn.Module, family: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``(batch, LENGTH)`` and their scores ``(LENGTH, batch, vocabulary)``."""
    batch = zoo.batch(family)
    prompt = {
        "input_ids": batch["input_ids"]
    }  # the same length for all: padding on the right is not for generation
    with torch.random.fork_rng():
        output: Any = model.generate(
            **prompt,
            attention_mask=torch.ones_like(prompt["input_ids"]),
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return output.sequences[:, -LENGTH:], torch.stack(output.scores)


@pytest.mark.parametrize("family", GENERATING)
def test_generation_with_a_cache(family: str) -> None:
    model = zoo.build(family).requires_grad_(False)  # what a wrapped model equals bit for bit
    tokens, scores = generated(model, family)
    lowrank.wrap_model(model, CASES[family].policy(family, presets.pissa), progress=False)
    same, same_scores = generated(model, family)
    assert torch.equal(same, tokens) and torch.equal(same_scores, scores), "an untrained adapter changed it"

    perturb(model)
    tokens, scores = generated(model, family)
    best, second = scores.topk(2).values.unbind(-1)
    assert (best - second).min() > 2e-5, "a near tie: which token wins would depend on the processor"
    assert not torch.allclose(scores, same_scores, atol=1e-3)
    assert torch.equal(generated(model, family, use_cache=False)[0], tokens), "the cache changed it"
    if family == "tied_llama":
        assert not any("lm_head" in p.module for p in lowrank.plan_of(model))
    merged, merged_scores = generated(lowrank.merge(model), family)
    assert torch.equal(merged, tokens)
    torch.testing.assert_close(merged_scores, scores, rtol=1e-3, atol=1e-3)
