"""Wrapping is all or nothing: bad input raises before the model is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.init import Factors, Kaiming
from tests import zoo
from tests.helpers import perturb, wrapped


class NaN:
    needs = frozenset[str]()

    def __call__(self, weight: Tensor, rank: int, scaling: float, **_: Any) -> Factors:
        return Factors(torch.full((rank, weight.shape[1]), float("nan")), torch.zeros(weight.shape[0], rank))


class Late:
    """Works but for the last projection."""

    needs = frozenset[str]()

    def __init__(self, error: Exception) -> None:
        self.left, self.error = 13, error

    def __call__(self, *args: Any, **kwargs: Any) -> Factors:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return Kaiming()(*args, **kwargs)


class WrongShape:
    needs = frozenset[str]()

    def __call__(self, weight: Tensor, rank: int, scaling: float, **_: Any) -> Factors:
        return Factors(torch.zeros(rank + 1, weight.shape[1]), torch.zeros(weight.shape[0], rank))


BAD = {
    "misspelt target": (
        presets.lora(target="q_porj"),
        {},
        "matches no projection; the nearest names are q_proj",
    ),
    "no target": (presets.lora(target=()), {}, "no target"),
    "rank above every projection": (
        presets.lora(rank=33),
        {},
        "rank 33 is more than Kaiming.* can make of any target: the largest is 32, of .*q_proj with",
    ),
    "budget too small": (
        presets.lora(budget=40),
        {},
        "too small for one rank anywhere: the cheapest costs 48",
    ),
    "budget too small to be uniform": (presets.lora(budget=100), {}, "too small for rank 1 in each of 14"),
    "budget too small, measured": (
        presets.tlora(budget=10),
        {"batches": [zoo.batch("llama")]},
        "too small for one rank anywhere: the cheapest costs 16",
    ),
    "no batches": (presets.tlora(), {}, "measures covariance and sensitivity: pass calibration batches="),
    "empty loader": (presets.tlora(), {"batches": iter(())}, "calibration needs batches, and got none"),
    "a loss of several numbers": (
        presets.tlora(),
        {"batches": [zoo.batch("llama")], "loss": lambda m, b: m(**b).logits},
        "scalar",
    ),
    "a loss that is not finite": (
        presets.tlora(),
        {"batches": [zoo.batch("llama")], "loss": lambda m, b: m(**b).loss / 0},
        "not finite",
    ),
    "unknown module to train": (presets.lora(train=("hed",)), {}, "train='hed' names no module"),
    "factors of a wrong shape": (
        presets.lora(init=WrongShape()),
        {},
        "the initializer: expected factors .*, got A",
    ),
    "factors that are not finite": (presets.lora(init=NaN()), {}, "not finite"),
    "a failure half-way": (presets.lora(init=Late(RuntimeError("out of memory"))), {}, "out of memory"),
    "not a policy": ("lora", {}, "expected a Policy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_before_the_model_is_touched(case: str) -> None:
    policy, kwargs, message = BAD[case]
    model = zoo.build("llama").train()
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lowrank.wrap_model(model, policy, progress=False, **kwargs)  # type: ignore[arg-type]
    assert {name: (module, type(module)) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert "_lowrank" not in model.__dict__


def buffered() -> nn.Module:
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


class Around(nn.Linear):
    """As PEFT's layers are: a linear layer with linear layers inside."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "1: its weight is no parameter"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "1: its weight is no parameter"),
        (buffered, "1: its weight is no parameter"),
        (lambda: nn.LazyLinear(4), "1 has no shape yet: call the model"),
        (Around, "1.inner lies inside 1, which would be adapted too"),
    ],
)
def test_layers_that_cannot_be_adapted_say_why(layer: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(ValueError, match=message):
        lowrank.wrap_model(model, presets.lora(rank=1), progress=False)
    assert type(model[0]) is nn.Linear


def test_a_model_is_wrapped_once() -> None:
    model = wrapped()
    for again in (model, nn.ModuleList([model])):
        with pytest.raises(ValueError, match="wrapped already: unwrap"):
            lowrank.wrap_model(again, presets.lora())
    with pytest.raises(ValueError, match="wrapped already"):
        lowrank.plan_model(model, presets.lora())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_compiled_model_is_wrapped_before() -> None:
    with pytest.raises(ValueError, match="the model is compiled: wrap it first, then call torch.compile"):
        lowrank.wrap_model(torch.compile(zoo.build("llama")), presets.lora())
    model = zoo.build("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(ValueError, match=r"model\.layers\.1 is compiled: wrap first"):
        lowrank.wrap_model(model, presets.lora())
    lowrank.wrap_model(
        model, presets.lora(rank=2, target="layers.0.self_attn.q_proj")
    )  # what is not adapted may be


def test_what_would_not_train_is_refused() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    with torch.inference_mode():
        plan = lowrank.plan_model(model, presets.lora(rank=2))
        with pytest.raises(ValueError, match="cannot be trained: wrap outside"):
            lowrank.wrap_model(model, plan)
    lowrank.wrap_model(model, plan)
    model(**batch).loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_what_follows_a_layer_may_write_in_place_compiled_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    perturb(lowrank.wrap_model(model, presets.pissa(rank=2), progress=False))
    x, gradients = torch.randn(2, 3, 6), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in lowrank.adapter_parameters(model)])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_a_lone_projection_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ValueError, match="itself one projection"):
        lowrank.wrap_model(nn.Linear(4, 4), presets.lora(rank=1))


def test_dropout_on_a_weight_that_is_not_called() -> None:
    with pytest.raises(ValueError, match="cannot act on encoder.layers.0.self_attn.in_proj_weight"):
        wrapped("torch_encoder", presets.lora(rank=2, dropout=0.1))
