"""Embeddings and convolutions as targets: what holds for linear layers holds for them, when asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Policy, Role, presets
from lowrank.init import Kaiming, Minor, Orthogonal, Principal
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb


class Convolutional(nn.Module):
    """A convolution of each dimension, each with options of its own, and a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 4, (1, 3, 3), padding=1, padding_mode="circular")
        self.image = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
        self.line = nn.Conv1d(6, 5, 3, padding="same", bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.volume(x).mean(2)
        return self.head(self.line(self.image(x).flatten(2)).mean(-1))


def convolutional() -> tuple[nn.Module, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutional().eval(), torch.randn(3, 2, 4, 9, 9)


def llama() -> tuple[nn.Module, Any]:
    return zoo.build("llama"), zoo.batch("llama")


def vit() -> tuple[nn.Module, Any]:
    return zoo.build("vit"), zoo.batch("vit")


def gemma() -> tuple[nn.Module, Any]:
    """Its embedding has a forward of its own, which multiplies by √dim; the head is tied to it."""
    return zoo.build("gemma3"), zoo.batch("gemma3")


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Any]] = {
    "llama": (llama, ("q_proj", "embed_tokens")),
    "gemma": (gemma, "embedding"),
    "vit": (vit, ("query", "conv")),
    "convolutional": (convolutional, "conv"),
}
STARTS = {"kaiming": Kaiming(), "pissa": Principal(), "milora": Minor(), "olora": Orthogonal()}


@pytest.mark.parametrize("init", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("name", MODELS)
def test_start_train_save_merge_and_unwrap(name: str, init: Any, tmp_path: Path) -> None:
    make, target = MODELS[name]
    model, batch = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base, modules = frozen_logits(model, batch), dict(model.named_modules())
    lowrank.wrap_model(model, Policy(target=target, rank=2, init=init), progress=False)
    assert torch.equal(logits(model, batch), base)
    plan = lowrank.plan_of(model)
    assert sum(p.numel() for p in lowrank.adapter_parameters(model)) == plan.trainable_parameters

    perturb(model)
    trained = logits(model, batch)
    assert not torch.allclose(trained, base, atol=1e-3)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base)
    lowrank.save_adapter(model, tmp_path / "adapter")
    fresh = lowrank.load_adapter(make()[0], tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), trained)
    assert lowrank.plan_of(fresh) == plan
    swapped = lowrank.wrap_model(make()[0], Policy(target=target, rank=2, init=init), progress=False)
    lowrank.swap_adapter(swapped, tmp_path / "adapter", "default")
    assert torch.equal(logits(swapped, batch), trained)

    if name != "gemma":  # tied
        lowrank.merge(fresh)
        assert (logits(fresh, batch) - trained).abs().max() < 1e-4 * trained.abs().max().clamp_min(1)
        assert dict(fresh.named_modules()).keys() == modules.keys()
    lowrank.unwrap(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_those_of_the_updated_weight(name: str) -> None:
    make, target = MODELS[name]
    model, _ = make()
    lowrank.wrap_model(model, Policy(target=target, rank=2, init=Principal()), progress=False)
    perturb(model)
    for layer in lowrank.adapted_layers(model).values():
        other = copy.deepcopy(layer).double()
        if isinstance(other.base, nn.Embedding):
            x = torch.tensor([[1, 5, 1], [2, 7, 9]])
        elif isinstance(other.base, nn.Linear):
            continue
        else:
            x = torch.randn(2, other.base.in_channels, *(9,) * (other.base.weight.dim() - 2)).double()
        y = other(x)
        draw = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        (y * draw).sum().backward()
        own = [p.grad.clone() for p in other.parameters() if p.requires_grad]
        other.zero_grad()
        (adapter,) = other.part().held()
        if isinstance(other.base, nn.Embedding):
            full = other.base.weight + adapter.product().T
        else:
            full = other.base.weight + adapter.product().view(other.base.weight.shape)
        assert torch.allclose(other.weight.detach(), full.detach())
        z = torch.func.functional_call(other.base, {"weight": full}, (x,))
        assert torch.allclose(y, z)
        (z * draw).sum().backward()
        for one, parameter in zip(own, (p for p in other.parameters() if p.requires_grad), strict=True):
            assert torch.allclose(one, parameter.grad)


@pytest.mark.parametrize("name", MODELS)
def test_several_adapters_add_up_and_combine(name: str) -> None:
    make, target = MODELS[name]
    model, batch = make()
    lowrank.wrap_model(model, Policy(target=target, rank=2), progress=False)
    other = Policy(target=target, rank=1, init=Principal(), seed=3)
    lowrank.add_adapter(model, other, name="b", progress=False)
    perturb(model)
    lowrank.combine_adapters(model, {"default": 0.5, "b": 2.0}, name="both")
    with lowrank.use_adapters(model, {"default": 0.5, "b": 2.0}):
        mixed = logits(model, batch)
    with lowrank.use_adapters(model, "both"):
        assert torch.allclose(logits(model, batch), mixed, rtol=1e-4, atol=1e-4)
    lowrank.remove_adapter(model, "default")
    lowrank.set_adapters(model, ())
    assert torch.equal(logits(model, batch), frozen_logits(make()[0], batch))


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_for_each_example_is_refused_by_name(name: str) -> None:
    make, target = MODELS[name]
    model, _ = make()
    lowrank.wrap_model(model, Policy(target=target, rank=2), progress=False)
    with pytest.raises(ValueError, match="default adapts this (Conv|Emb|Gemma)"):
        with lowrank.adapters_for_rows(model, ["default", None, "default"]):
            pass


@pytest.mark.parametrize("family", ["llama", "vit", "minilm"])
def test_they_are_targets_only_where_asked_for(family: str) -> None:
    plan = lowrank.plan_model(zoo.build(family), presets.lora())
    assert not {Role.EMBEDDING, Role.CONV} & {p.role for p in plan}
    everything = lowrank.plan_model(zoo.build(family), Policy(target=lambda p: True))
    assert not {Role.EMBEDDING, Role.CONV} & {p.role for p in everything}


def test_tokens_that_training_does_not_meet_keep_their_vectors() -> None:
    model, batch = llama()
    model.model.embed_tokens.padding_idx = 0
    lowrank.wrap_model(model, Policy(target="embedding", rank=4), progress=False)
    optimizer = torch.optim.AdamW(lowrank.adapter_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = lowrank.adapted_layers(model)["model.embed_tokens"].delta_weight().any(0)
    met = torch.zeros(zoo.VOCABULARY, dtype=torch.bool)
    met[batch["input_ids"][batch["attention_mask"] == 1]] = True
    met[0] = False
    assert moved.any() and not moved[~met].any()


def test_the_padding_vector_does_not_change_from_an_anchored_start() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2), nn.Linear(6, 3))
    lowrank.wrap_model(model, Policy(target="embedding", rank=3, init=Principal()), progress=False)
    for _ in range(2):
        model(torch.arange(9)).square().sum().backward()
        with torch.no_grad():
            for parameter in lowrank.adapter_parameters(model):
                parameter -= 0.1 * parameter.grad
    delta = lowrank.adapted_layers(model)["0"].delta_weight()
    assert not delta[:, 2].any() and delta[:, 3].any()


@pytest.mark.parametrize(
    ("layer", "target", "why"),
    [
        (nn.Embedding(9, 6, max_norm=1.0), "embedding", "max_norm"),
        (nn.Conv1d(6, 6, 3, groups=2), "conv", "groups=2"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(layer: nn.Module, target: str, why: str) -> None:
    model = nn.Sequential(layer, nn.Linear(6, 3))
    with pytest.raises(ValueError, match=f"^0: .*{why}.*exclude="):
        lowrank.wrap_model(model, Policy(target=target, rank=2), progress=False)


@pytest.mark.parametrize("name", ["llama", "convolutional"])
def test_dora_is_refused_by_name(name: str) -> None:
    make, target = MODELS[name]
    model, _ = make()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"dora=True cannot act on (\S*embed_tokens|volume), of role"):
        lowrank.wrap_model(model, presets.dora(target=target, rank=2), progress=False)
    plan = lowrank.plan_model(model, presets.lora(target=target, rank=2))
    plan.dora = True
    with pytest.raises(ValueError, match=r"dora=True cannot act on (\S*embed_tokens|volume), of role"):
        lowrank.wrap_model(model, plan, progress=False)
    assert dict(model.named_modules()) == modules


def test_lora_fa_freezes_the_random_factor() -> None:
    """B of an embedding: with A frozen at zero it would learn nothing."""
    model, batch = llama()
    lowrank.wrap_model(model, presets.lora_fa(rank=2, target=("q_proj", "embedding")), progress=False)
    layers: Any = lowrank.adapted_layers(model)
    for path, layer in layers.items():
        (adapter,) = layer.part().held()
        assert adapter.frozen == ({"B"} if path.endswith("embed_tokens") else {"A"})
    model(**batch).loss.backward()
    assert all(parameter.grad.any() for parameter in lowrank.adapter_parameters(model))


def test_statistics_of_an_embedding_are_refused_by_name() -> None:
    model, batch = llama()
    with pytest.raises(ValueError, match="model.embed_tokens: covariance and sensitivity cannot be measured"):
        lowrank.wrap_model(model, presets.tlora(target="embedding"), batches=[batch], progress=False)


def test_dropout_acts_on_a_convolutions_input_alone() -> None:
    model, x = convolutional()
    lowrank.wrap_model(model, Policy(target="conv", rank=2, dropout=0.5), progress=False)
    base = frozen_logits(copy.deepcopy(model), x)
    model.train()
    assert torch.equal(logits(model, x), base)
    perturb(model)
    assert not torch.equal(logits(model, x), logits(model, x))
