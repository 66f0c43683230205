"""Several adapters on one base: which act, how strongly, what trains, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank
from lowrank import Policy, presets
from lowrank.formats.folder import CONFIG, checksum
from lowrank.integrations.transformers import AdapterCallback
from lowrank.layers import Adapter, LoRALinear
from tests import zoo
from tests.helpers import frozen_logits, logits, perturb

compiling = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

POLICIES = {"a": presets.lora(rank=2), "b": presets.pissa(rank=3, target=("query", "value"))}


def pair(family: str = "llama", **policies: Policy) -> nn.Module:
    """A model with adapters "a" and "b", each moved its own way; "a" acts."""
    model = zoo.build(family)
    for name, policy in (policies or POLICIES).items():
        lowrank.add_adapter(model, policy, name=name, progress=False)
        with torch.no_grad():
            for parameter in lowrank.adapter_parameters(model, name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def alone(model: nn.Module, name: str, batch: Any) -> Tensor:
    with lowrank.use_adapters(model, name):
        return logits(model, batch)


# -- which act ------------------------------------------------------------------------------------------


def test_the_first_acts_and_others_wait() -> None:
    model, batch = pair(), zoo.batch("llama")
    assert lowrank.adapter_names(model) == ["a", "b"]
    assert torch.equal(logits(model, batch), alone(model, "a", batch))
    assert not torch.equal(logits(model, batch), alone(model, "b", batch))
    lowrank.set_adapters(model, ())
    assert torch.equal(logits(model, batch), frozen_logits(zoo.build("llama"), batch))


def test_a_layer_without_the_acting_adapter_is_the_base() -> None:
    model = pair()
    lowrank.set_adapters(model, "b")
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(2, 32)
    assert torch.equal(layer(x), layer.base(x)) and layer.weight is layer.base.weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder"])
def test_mixing_is_linear_in_the_update(family: str) -> None:
    policies = {"a": presets.lora(rank=2), "b": presets.pissa(rank=3)}
    model, batch, mixed = pair(family, **policies), zoo.batch(family), zoo.build(family).double()
    lowrank.set_adapters(model, {"a": 0.7, "b": -0.3})
    with torch.no_grad():
        for name, weight in (("a", 0.7), ("b", -0.3)):
            for p, adapter in lowrank.adapters.adapters_of(model, name).items():
                lowrank.models.storage.as_rows(mixed.get_submodule(p.module), p.param)[slice(*p.rows)] += (
                    weight * adapter.product().double()
                )
    torch.testing.assert_close(
        logits(model, batch).double(), frozen_logits(mixed, batch), rtol=1e-4, atol=1e-5
    )
    merged = lowrank.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert not lowrank.adapted_layers(merged)


@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_the_weight_one_has_the_bits_of_no_weight(family: str) -> None:
    model, batch = pair(family), zoo.batch(family)
    plain = alone(model, "a", batch)
    lowrank.set_adapters(model, {"a": 1.0})
    assert torch.equal(logits(model, batch), plain)
    lowrank.set_adapters(model, {"a": 0})
    assert torch.equal(logits(model, batch), frozen_logits(zoo.build(family), batch))


def test_what_acted_acts_again_after_an_error() -> None:
    model, batch = pair(), zoo.batch("llama")
    lowrank.set_adapters(model, {"a": 0.5, "b": 2.0})
    before = logits(model, batch)
    with pytest.raises(KeyError), lowrank.use_adapters(model, ["b"]), lowrank.disable_adapters(model):
        raise KeyError
    assert torch.equal(logits(model, batch), before)
    with lowrank.use_adapters(model, "b"):
        lowrank.remove_adapter(model, "a")
    lowrank.set_adapters(model, "b")
    assert lowrank.adapter_names(model) == ["b"]


def test_one_dropout_for_each_adapter() -> None:
    base = nn.Linear(4, 3, bias=False).requires_grad_(False)
    a, b = (Adapter(torch.eye(4), torch.zeros(3, 4), 1.0, rows=(0, 3)) for _ in range(2))
    with torch.no_grad():
        base.weight.zero_()
        a.B[0, 0] = b.B[1, 1] = 1
    layer = LoRALinear(base, [a], in_features=4, out_features=3, name="a", dropout=0.5)
    layer.put("b", [b])
    layer.acting.names = ("a", "b")
    y = layer.train()(torch.ones(4000, 4))
    assert set(y[:, 0].unique().tolist()) == {0.0, 2.0} and 0.4 < (y[:, 0] == 0).float().mean() < 0.6
    assert (y[:, 1] == 1).all() and not y[:, 2].any()
    assert (layer.eval()(torch.ones(2, 4)) == torch.tensor([1.0, 1.0, 0.0])).all()


# -- what trains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_choosing_does_not_touch_what_trains(family: str) -> None:
    model = pair(family)
    for parameter in lowrank.adapter_parameters(model, "a"):
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for chosen in ("b", {"a": 0.5, "b": 2.0}, (), ["b", "a"]):
        lowrank.set_adapters(model, chosen)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    lowrank.add_adapter(model, presets.lora(rank=1), name="c", progress=False)
    now = dict(model.named_parameters())
    assert {name: now[name].requires_grad for name in flags} == flags
    assert all(p.requires_grad for p in lowrank.adapter_parameters(model, "c"))


@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_parameters_by_adapter(family: str) -> None:
    model = pair(family)
    own = {name: list(lowrank.adapter_parameters(model, name)) for name in ("a", "b")}
    everything = list(lowrank.adapter_parameters(model))
    assert {id(p) for p in everything} == {id(p) for held in own.values() for p in held}
    assert len(everything) == len(own["a"]) + len(own["b"])
    for name, held in own.items():
        assert sum(p.numel() for p in held) == lowrank.plan_of(model, name).trainable_parameters


@pytest.mark.parametrize("frozen", [False, True])
def test_training_one_while_another_acts(frozen: bool) -> None:
    """The gradient of b beside a is that on a base into which a was merged."""
    model, batch = pair(), zoo.batch("llama")
    if frozen:
        for parameter in lowrank.adapter_parameters(model, "a"):
            parameter.requires_grad_(False)
    lowrank.set_adapters(model, ["a", "b"])
    model(**batch).loss.backward()
    got = [parameter.grad for parameter in lowrank.adapter_parameters(model, "b")]
    assert all((p.grad is None) == frozen for p in lowrank.adapter_parameters(model, "a"))
    model.zero_grad()
    lowrank.merge(model, "a")
    assert lowrank.adapter_names(model) == ["b"]
    model(**batch).loss.backward()
    wanted = [parameter.grad for parameter in lowrank.adapter_parameters(model, "b")]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_weight_scales_the_gradient(name: str) -> None:
    model, x = pair(), torch.randn(3, 32)
    layer, found = model.model.layers[0].self_attn.q_proj, []
    for weight in (1.0, 0.25):
        with lowrank.use_adapters(model, {name: weight}):
            y = layer(x)
        found.append(torch.autograd.grad(y.sum(), list(layer.part(name).parameters())))
    torch.testing.assert_close(tuple(0.25 * gradient for gradient in found[0]), found[1])
    assert all(gradient.any() for gradient in found[1])


# -- what it costs ---------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Every operation by name, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder"])
def test_one_that_acts_costs_what_it_costs_alone(family: str) -> None:
    batch, run = zoo.batch(family), []
    one = lowrank.wrap_model(zoo.build(family), presets.pissa(rank=2), progress=False)
    two = lowrank.wrap_model(zoo.build(family), presets.pissa(rank=2), progress=False)
    lowrank.add_adapter(two, presets.lora(rank=3), name="waits", progress=False)
    for model in (one, two):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel() * tensor.itemsize)
            return tensor

        with Operations() as operations, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(**batch).loss.backward()
        run.append((operations.names, saved))
    assert run[0] == run[1]


@compiling
@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_other_weights_do_not_compile_again(family: str) -> None:
    torch.compiler.reset()
    model = pair(family)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = zoo.batch(family)["input_ids"]
    seen = []
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 1.0}, {"a": 0.25, "b": -3}):
        lowrank.set_adapters(model, weights)
        got = compiled(input_ids=ids).logits
        torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        seen.append(got)
    assert counter.frame_count == 1
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
    lowrank.set_adapters(model, "b")
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


# -- modules trained in full -----------------------------------------------------------------------------


HEADS = {
    "a": presets.lora(rank=2, train=("classifier",)),
    "b": presets.lora(rank=2, train=("classifier",)),
    "c": presets.lora(rank=2, target=("query", "classifier")),
}


def test_each_has_its_own_copy_of_a_module_trained_in_full() -> None:
    model, batch = pair("bert", **HEADS), zoo.batch("bert")
    base = frozen_logits(zoo.build("bert"), batch)
    with torch.no_grad():
        model.classifier.copies["a"].bias.add_(1)
    moved = alone(model, "a", batch)
    assert not torch.allclose(moved, alone(model, "b", batch))
    assert torch.equal(alone(model, "c", batch), alone(lowrank.remove_adapter(model, "b"), "c", batch))
    lowrank.remove_adapter(model, "c")
    assert torch.equal(logits(model, batch), moved)
    lowrank.unwrap(model)
    assert torch.equal(frozen_logits(model, batch), base)


def test_a_head_that_one_trains_and_another_adapts_is_itself_alone() -> None:
    model, batch = pair("bert", **HEADS), zoo.batch("bert")
    lone = zoo.build("bert")
    lowrank.add_adapter(lone, HEADS["c"], name="c", progress=False)
    for mine, theirs in zip(
        lowrank.adapter_parameters(lone), lowrank.adapter_parameters(model, "c"), strict=True
    ):
        mine.data.copy_(theirs)
    assert torch.equal(alone(model, "c", batch), logits(lone, batch))
    assert (lone.classifier.delta_weight("c") != 0).any()


def test_adapters_that_cannot_act_together() -> None:
    model, batch = pair("bert", **HEADS), zoo.batch("bert")
    before = logits(model, batch)
    with pytest.raises(ValueError, match="classifier is trained in full by both 'a' and 'b'"):
        lowrank.set_adapters(model, ["a", "b"])
    for names in (["a", "c"], ["c", "a"]):
        with pytest.raises(ValueError, match="classifier is trained in full by 'a', and 'c' adapts it"):
            lowrank.set_adapters(model, names)
    with pytest.raises(ValueError, match=r"'a' trains classifier in full.*expected weight 1, got 0.5"):
        lowrank.set_adapters(model, {"a": 0.5})
    with pytest.raises(ValueError, match="trained in full by both"):
        lowrank.merge(model, ["a", "b"])
    assert torch.equal(logits(model, batch), before)
    lowrank.set_adapters(model, {"a": 1.0})
    assert torch.equal(logits(model, batch), before)


# -- names -----------------------------------------------------------------------------------------------


def test_with_several_a_name_is_asked_for(tmp_path: Path) -> None:
    model = pair()
    for act in (
        lowrank.plan_of,
        lambda m: lowrank.save_adapter(m, tmp_path / "x"),
        lambda m: lowrank.export_peft(m, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match="several adapters, so name one of them: a, b"):
            act(model)
    for act in (
        lambda m: lowrank.plan_of(m, "c"),
        lambda m: lowrank.set_adapters(m, ["a", "c"]),
        lambda m: list(lowrank.adapter_parameters(m, "c")),
        lambda m: lowrank.remove_adapter(m, "c"),
        lambda m: lowrank.merge(m, "c"),
        lambda m: lowrank.save_adapter(m, tmp_path / "x", "c"),
    ):
        with pytest.raises(ValueError, match="no adapter 'c'; it has a, b"):
            act(model)
    for layer in lowrank.adapted_layers(model).values():
        if len(layer.adapters) == 2:
            with pytest.raises(ValueError, match="expected the name of an adapter"):
                layer.delta_weight()
            assert not torch.equal(layer.delta_weight("a"), layer.delta_weight("b"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True, None])
def test_weights_that_are_none(weight: Any) -> None:
    model = pair()
    with pytest.raises(ValueError, match="expected a finite number as the weight of 'b'"):
        lowrank.set_adapters(model, {"b": weight})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a", "has an adapter 'a' already"),
        ("x.y", "string without dots"),
        ("", "string without dots"),
        (3, "string without dots"),
        ("keys", "'keys' is a name that PyTorch's modules use"),
        ("training", "'training' is a name that PyTorch's modules use"),
    ],
)
def test_names_that_cannot_be(name: Any, message: str, tmp_path: Path) -> None:
    model = pair()
    lowrank.save_adapter(model, tmp_path / "ours", "a")
    lowrank.export_peft(model, tmp_path / "peft", name="a")
    state = model.state_dict().keys()
    for act in (
        lambda: lowrank.add_adapter(model, presets.lora(rank=1), name=name),
        lambda: lowrank.load_adapter(model, tmp_path / "ours", name),
        lambda: lowrank.import_peft(model, tmp_path / "peft", name),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    assert model.state_dict().keys() == state


def test_a_failure_while_adding_leaves_the_model_as_it_was() -> None:
    model, batch = pair("bert", **HEADS), zoo.batch("bert")
    modules = dict(model.named_modules())
    kinds, before = {path: type(m) for path, m in modules.items()}, logits(model, batch)
    for policy, message in (
        (presets.lora(rank=2, target="nothing"), "matches no projection"),
        (presets.eva(rank=2), "pass calibration batches"),
        (presets.lora(rank=2, dropout=0.1, train=("nothing",)), "names no module"),
    ):
        with pytest.raises(ValueError, match=message):
            lowrank.add_adapter(model, policy, name="d", progress=False)
    assert dict(model.named_modules()) == modules
    assert {path: type(m) for path, m in model.named_modules()} == kinds
    assert lowrank.adapter_names(model) == ["a", "b", "c"] and torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("others", [0, 2])
def test_a_failure_while_installing_leaves_the_model_as_it_was(others: int) -> None:
    """A module trained in full that cannot be copied: the adapters of the others are made by then."""
    model, batch = zoo.build("bert"), zoo.batch("bert")
    for name in ("b", "c")[:others]:
        perturb(
            lowrank.add_adapter(model, presets.lora(rank=2, target=("query",)), name=name, progress=False)
        )
    model.classifier.lock = threading.Lock()
    modules, kinds = dict(model.named_modules()), [type(m) for m in model.modules()]
    flags, before = {n: p.requires_grad for n, p in model.named_parameters()}, frozen_logits(model, batch)
    with pytest.raises(TypeError, match="lock"):
        lowrank.add_adapter(model, HEADS["a"], name="a", progress=False)
    assert dict(model.named_modules()) == modules and [type(m) for m in model.modules()] == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(frozen_logits(model, batch), before)
    if others:
        assert lowrank.adapter_names(model) == ["b", "c"]
    else:
        assert "_lowrank" not in model.__dict__


# -- files, merging, copies --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "torch_encoder", "bert"])
def test_folders_beside_others(family: str, tmp_path: Path) -> None:
    policies = HEADS if family == "bert" else POLICIES
    model, batch = pair(family, **policies), zoo.batch(family)
    wanted = {name: alone(model, name, batch) for name in policies}
    for name in policies:
        lowrank.save_adapter(model, tmp_path / name, name)
    fresh = zoo.build(family)
    for name in reversed(policies):
        lowrank.load_adapter(fresh, tmp_path / name, name)
    for name, output in wanted.items():
        assert torch.equal(alone(fresh, name, batch), output), name
        assert torch.equal(logits(lowrank.load_adapter(zoo.build(family), tmp_path / name), batch), output)
    assert torch.equal(logits(fresh, batch), wanted[next(reversed(policies))])
    with pytest.raises(lowrank.AdapterError, match="other weights"):
        lowrank.load_adapter(pair(family, a=presets.lora(rank=1)).apply(_shift), tmp_path / name, "new")


def _shift(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.add_(1)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_peft_folders_beside_others(family: str, tmp_path: Path) -> None:
    policies = HEADS if family == "bert" else POLICIES
    model, batch = pair(family, **policies), zoo.batch(family)
    for name in policies:
        lowrank.export_peft(model, tmp_path / name, name=name)
    fresh = zoo.build(family)
    for name in reversed(policies):
        lowrank.import_peft(fresh, tmp_path / name, name)
    for name in policies:
        torch.testing.assert_close(alone(fresh, name, batch), alone(model, name, batch), rtol=1e-4, atol=1e-5)


def test_merging_some_leaves_the_others() -> None:
    model, batch = pair("bert", **HEADS), zoo.batch("bert")
    wanted = alone(model, "a", batch)
    lowrank.merge(model, "a")
    assert lowrank.adapter_names(model) == ["b", "c"]
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no adapter acts now: name those to merge, of b, c"):
        lowrank.merge(model)
    lowrank.merge(model, "c")
    lowrank.unwrap(model)
    assert not lowrank.adapted_layers(model) and lowrank.adapter_names(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_rounded_once(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(16, 12, bias=False).to(dtype))
    weight = base[0].weight.detach().clone()
    for name in ("a", "b"):
        perturb(lowrank.add_adapter(base, presets.lora(rank=2), name=name, progress=False))
    lowrank.set_adapters(base, {"a": 0.5, "b": 2.0})
    delta = 0.5 * base[0].delta_weight("a") + 2 * base[0].delta_weight("b")
    read = base[0].weight.detach().clone()
    lowrank.merge(base)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(base[0].weight.detach(), (weight.float() + delta).to(dtype), **tolerance)
    torch.testing.assert_close(read, base[0].weight.detach(), **tolerance)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_choose_for_themselves(how: str) -> None:
    model, batch = pair("torch_encoder"), zoo.batch("torch_encoder")
    lowrank.set_adapters(model, {"a": 0.5, "b": 2.0})
    wanted = logits(model, batch)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, batch), wanted)
    lowrank.set_adapters(twin, "b")
    assert torch.equal(logits(model, batch), wanted) and not torch.equal(logits(twin, batch), wanted)
    lowrank.unwrap(twin)
    assert torch.equal(logits(model, batch), wanted)


def test_the_first_of_version_one_is_still_read(tmp_path: Path) -> None:
    """A folder of version 1 says no name; everything else is the same."""
    model, batch = pair(), zoo.batch("llama")
    lowrank.save_adapter(model, tmp_path, "a")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["version"], config.pop("name")) == (2, "a")
    config["version"] = 1
    config["checksum"] = checksum(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = lowrank.load_adapter(zoo.build("llama"), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


# -- new values in the same tensors -------------------------------------------------------------------------


@compiling
@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_swapping_changes_values_only(family: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    model, other = pair(family), perturb(pair(family), 0.3)
    lowrank.save_adapter(other, tmp_path, "b")
    lowrank.set_adapters(model, {"a": 0.5, "b": 1.0})
    lowrank.set_adapters(other, {"a": 0.5, "b": 1.0})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = zoo.batch(family)["input_ids"]
    before = compiled(input_ids=ids).logits
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    lowrank.swap_adapter(model, tmp_path, "b")
    with torch.no_grad():  # so that a is the same in both
        for mine, theirs in zip(
            lowrank.adapter_parameters(model, "a"), lowrank.adapter_parameters(other, "a"), strict=True
        ):
            mine.copy_(theirs)
    after = compiled(input_ids=ids).logits
    torch.testing.assert_close(after, other(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before) and counter.frame_count == 1
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places


def test_swapping_another_plan_is_refused(tmp_path: Path) -> None:
    model, batch = pair(), zoo.batch("llama")
    lowrank.save_adapter(model, tmp_path, "a")
    before = alone(model, "b", batch)
    with pytest.raises(ValueError, match=r"another plan(.|\n)*q_proj.*rank=2.*expected.*rank=3(.|\n)*up"):
        lowrank.swap_adapter(model, tmp_path, "b")
    assert torch.equal(alone(model, "b", batch), before)


def test_swapping_onto_another_base_is_refused(tmp_path: Path) -> None:
    model = pair("gpt2", a=presets.lora(rank=2, target="query"))
    lowrank.save_adapter(model, tmp_path)
    lowrank.swap_adapter(model, tmp_path, "a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in lowrank.adapter_parameters(model):
        parameter.data.add_(1)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias.add_(1)
    moved = model.transformer.h[0].attn.c_attn.part("a")[0].A.clone()
    with pytest.raises(lowrank.AdapterError, match=r"what is not adapted(.|\n)*h\.1\.attn\.c_attn\.bias"):
        lowrank.swap_adapter(model, tmp_path, "a")
    assert torch.equal(model.transformer.h[0].attn.c_attn.part("a")[0].A, moved)
    assert not torch.equal(moved, before["transformer.h.0.attn.c_attn.adapters.a.0.A"])


def test_a_callback_saves_the_adapter_that_it_is_told(tmp_path: Path) -> None:
    model, batch = pair(), zoo.batch("llama")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    AdapterCallback(name="b").on_save(SimpleNamespace(output_dir=tmp_path), state, None, model=model)
    loaded = lowrank.load_adapter(zoo.build("llama"), tmp_path / "checkpoint-3")
    assert torch.equal(logits(loaded, batch), alone(model, "b", batch))
