"""What holds for every preset on every layout. A new preset or layout adds one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.layers.trained import TrainedModule
from lowrank.models.projections import Role
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

PRESETS: dict[str, Callable[..., lowrank.Policy]] = {
    "lora": presets.lora,
    "pissa": presets.pissa,
    "milora": presets.milora,
    "olora": presets.olora,
    "ailora": presets.ailora,
    "tlora": presets.tlora,
    "eva": presets.eva,
    "corda": presets.corda,
    "lora_ga": presets.lora_ga,
    "lora_fa": presets.lora_fa,
    "rslora": presets.rslora,
    "dora": presets.dora,
    "pissa_dora": partial(presets.pissa, dora=True),
}
LAYOUTS = ["minilm", "llama", "gpt2", "t5", "vit", "torch_encoder", "neox", "bloom", "codegen", "falcon40b"]
HEADS = {"minilm": "classifier", "vit": "classifier", "torch_encoder": "head"}
ON_WEIGHTS = {"torch_encoder"}  # all of it is, where DoRA is refused
# Layers that are adapted only where they are asked for: layout, then what is asked for.
BESIDES = {
    "llama+embedding": ("llama", ("q_proj", "embedding")),
    "vit+conv": ("vit", ("query", "conv")),
}
# Rows of an embedding that train besides: layout, then the embedding and the tokens.
TOKENS = {
    "llama+rows": ("llama", {"embed_tokens": (5, 20, 41)}),
    "tied+rows": ("tied_llama", {"embed_tokens": (5, 20, 41)}),
}
# One adapter for all experts of a tensor: layout, then the family.
SHARED = {"mixtral+shared": "mixtral"}
WITHOUT_WEIGHTS = ["lora", "lora_fa", "rslora", "eva", "lora_ga"]
WITHOUT_BATCHES = ["lora", "pissa", "milora", "olora", "lora_fa", "rslora"]
PAIRS = [
    (preset, layout)
    for preset in PRESETS
    for layout in LAYOUTS
    if not ("dora" in preset and layout in ON_WEIGHTS)
]
ROWS = PAIRS + [(preset, layout) for preset in WITHOUT_BATCHES for layout in (*BESIDES, *TOKENS)]
ROWS += [("dora", layout) for layout in TOKENS]
ROWS += [(preset, layout) for preset in WITHOUT_WEIGHTS for layout in SHARED]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def policy_for(preset: str, layout: str) -> lowrank.Policy:
    if layout in TOKENS:
        return PRESETS[preset](rank=4, rows=TOKENS[layout][1])
    if layout in SHARED:
        return PRESETS[preset](rank=4, experts="shared")
    if layout in BESIDES:
        return PRESETS[preset](rank=4, target=BESIDES[layout][1])
    return PRESETS[preset](rank=4, train=(HEADS[layout],) if layout in HEADS else ())


def family_of(layout: str) -> str:
    return SHARED.get(layout) or (BESIDES | TOKENS).get(layout, (layout,))[0]


def build(layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return zoo.build(family_of(layout), dtype)


def batch_of(layout: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    return zoo.batch(family_of(layout), dtype, seed)


def wrap(model: nn.Module, preset: str, layout: str, dtype: torch.dtype) -> nn.Module:
    batches = [batch_of(layout, dtype, seed) for seed in (1, 2)]
    return lowrank.wrap_model(model, policy_for(preset, layout), batches=batches, progress=False)


@pytest.mark.parametrize("layout", sorted(ON_WEIGHTS))
def test_dora_refuses_weights_that_no_call_multiplies_by(layout: str) -> None:
    with pytest.raises(ValueError, match="dora=True cannot act on .* adapted on the weight"):
        wrap(zoo.build(layout), "dora", layout, torch.float32)


def train_a_little(model: nn.Module, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("preset", "layout"), ROWS)
def test_wrap_train_save_and_take_out(preset: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = build(layout, dtype), batch_of(layout, dtype)
    modules, before, base = dict(model.named_modules()), snapshot(model), frozen_logits(model, batch)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    assert wrap(model, preset, layout, dtype) is model
    assert torch.equal(logits(model, batch), base), "wrapping changed the output"

    train_a_little(model, batch)
    trained = logits(model, batch)
    assert not torch.equal(trained, base), "training changed nothing"
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base), "disabled adapters still act"
    assert torch.equal(logits(model, batch), trained)

    lowrank.save_adapter(model, tmp_path / "adapter")
    fresh = lowrank.load_adapter(build(layout, dtype), tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), trained), "the reloaded adapter has other bits"
    assert lowrank.plan_of(fresh) == lowrank.plan_of(model)

    assert lowrank.unwrap(model) is model
    assert torch.equal(frozen_logits(model, batch), base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules, "other module objects are back"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    merged = lowrank.merge(fresh)
    assert not any(isinstance(m, (lowrank.LoRALinear, TrainedModule)) for m in merged.modules())
    if dtype == torch.float32:
        assert (logits(merged, batch) - trained).abs().max() < 1e-4 * trained.abs().max().clamp_min(1)


@pytest.mark.parametrize(("preset", "layout"), ROWS)
def test_merged_copies_are_what_merge_makes(preset: str, layout: str) -> None:
    model, batch = build(layout, torch.bfloat16), batch_of(layout, torch.bfloat16)
    perturb(wrap(model, preset, layout, torch.bfloat16))
    state, trained = snapshot(model), logits(model, batch)
    layers = lowrank.adapted_layers(model)
    with lowrank.merged(model, progress=False) as copies:
        inside = logits(model, batch)
        made = {path: layers[path].copied.weight for path in copies.layers}
    assert {*made, *copies.by_factors} == set(layers)
    assert torch.equal(logits(model, batch), trained), "the context left something"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    lowrank.merge(model)
    for path, copy in made.items():
        weight = model.get_submodule(path).weight
        assert torch.equal(copy, weight if weight.stride() == copy.stride() else weight.t()), path
    if not copies.by_factors:
        assert not torch.equal(inside, trained), "the copies were not used"
        assert torch.equal(inside, logits(model, batch))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("preset", "layout"), ROWS)
def test_a_second_adapter_beside_a_trained_one(
    preset: str, layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    other = "eva" if layout in SHARED else "pissa"
    first = other if preset in ("lora", "lora_fa") else "lora"
    model, batch = build(layout, dtype), batch_of(layout, dtype)
    before, base = snapshot(model), frozen_logits(model, batch)
    modules = dict(model.named_modules())
    wrap(model, first, layout, dtype)
    train_a_little(model, batch)
    one = logits(model, batch)
    state = snapshot(model)

    batches = [batch_of(layout, dtype, seed) for seed in (1, 2)]
    policy = policy_for(preset, layout)
    assert lowrank.add_adapter(model, policy, name="second", batches=batches, progress=False) is model
    assert lowrank.adapter_names(model) == ["default", "second"]
    assert torch.equal(logits(model, batch), one), "it acts before it is chosen"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())

    lone = wrap(build(layout, dtype), preset, layout, dtype)
    lowrank.set_adapters(model, "second")
    assert lowrank.plan_of(model, "second") == lowrank.plan_of(lone)
    assert torch.equal(logits(model, batch), base), "the second does not start at the base"
    for each in (lone, model):
        train_a_little(each, batch)
    two = logits(model, batch)
    assert torch.equal(two, logits(lone, batch)), "it is another adapter than alone"
    assert not torch.equal(two, base) and not torch.equal(two, one)

    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base)
    with lowrank.use_adapters(model, "default"):
        assert torch.equal(logits(model, batch), one), "training the second moved the first"
    assert torch.equal(logits(model, batch), two)
    lowrank.save_adapter(model, tmp_path / "second", "second")
    fresh = lowrank.load_adapter(build(layout, dtype), tmp_path / "second")
    assert torch.equal(logits(fresh, batch), two)

    assert lowrank.remove_adapter(model, "second") is model
    lowrank.set_adapters(model, "default")
    assert torch.equal(logits(model, batch), one)
    lowrank.remove_adapter(model, "default")
    assert torch.equal(frozen_logits(model, batch), base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dict(model.named_modules()) == modules, "other module objects are back"


@pytest.mark.parametrize(("preset", "layout"), PAIRS)
def test_a_wrapped_base_is_frozen_and_adapters_train(preset: str, layout: str) -> None:
    model, batch = build(layout), batch_of(layout)
    wrap(model, preset, layout, torch.float32)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {id(p) for p in lowrank.adapter_parameters(model)}
    heads = {id(p) for m in model.modules() if isinstance(m, TrainedModule) for p in m.copy.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == adapters | heads
    assert (
        sum(p.numel() for p in lowrank.adapter_parameters(model))
        == lowrank.plan_of(model).trainable_parameters
    )

    model(**batch).loss.backward()
    named = dict(model.named_parameters())
    assert all(p.grad is None for name, p in named.items() if name not in trainable)
    # A has no gradient through a B that is zero, as it is at the first step where there is no anchor.
    for adapter in lowrank.adapters.adapters_of(model).values():
        assert adapter.B.grad.any()
        if adapter.A.requires_grad:
            assert bool(adapter.A.grad.any()) == adapter.anchored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ailora_touches_query_and_value_only(layout: str) -> None:
    model = wrap(build(layout), "ailora", layout, torch.float32)
    assert {p.role for p in lowrank.plan_of(model).adapted} == {Role.QUERY, Role.VALUE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tlora_does_not_train_a(layout: str) -> None:
    model, batch = build(layout), batch_of(layout)
    wrap(model, "tlora", layout, torch.float32)
    adapters = [m for m in model.modules() if isinstance(m, lowrank.layers.Adapter)]
    before = [adapter.A.clone() for adapter in adapters]
    train_a_little(model, batch)
    assert all(torch.equal(adapter.A, start) for adapter, start in zip(adapters, before, strict=True))
    assert any(adapter.B.any() for adapter in adapters)
