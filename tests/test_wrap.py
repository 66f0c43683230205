"""Wrapping is all or nothing, and can be undone: bad input, shared and tied modules, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Policy, presets
from lowrank.init import Factors, Kaiming
from lowrank.layers.weight import AdaptedWeight
from lowrank.projections import Role
from tests import zoo


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def perturb(model: nn.Module) -> nn.Module:
    """Adapters that do something."""
    with torch.no_grad():
        for p in lowrank.adapter_parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return model


def wrapped(family: str = "llama", policy: Policy | None = None, **kwargs: Any) -> nn.Module:
    return lowrank.wrap_model(zoo.build(family), policy or presets.lora(rank=4), progress=False, **kwargs)


# -- bad input ------------------------------------------------------------------------------------------


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
    "factors of a wrong shape": (presets.lora(init=WrongShape()), {}, "the initializer made A"),
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
    with pytest.raises((ValueError, RuntimeError), match=message):
        lowrank.wrap_model(model, policy, progress=False, **kwargs)  # type: ignore[arg-type]
    assert {name: (module, type(module)) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert "_lowrank" not in model.__dict__


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank must be"),
        ("rank", 2.5, "rank must be"),
        ("alpha", 0.0, "alpha must be positive"),
        ("alpha", float("nan"), "alpha must be positive"),
        ("alpha", "16", "alpha must be positive"),
        ("dropout", None, "dropout must be"),
        ("fused", {"qkv_proj": 3}, "fused says rows by role"),
        ("fused", {"qkv_proj": {"q": 4}}, "fused says rows by role"),
        ("fused", {"qkv_proj": {"query": 4.0}}, "fused says rows by role"),
        ("fused", ["qkv_proj"], "fused says rows by role"),
        ("dropout", 1.0, "dropout must be"),
        ("dropout", -0.1, "dropout must be"),
        ("budget", 0, "budget is a count"),
        ("budget", 1.5, "budget is a count"),
        ("budget", True, "budget is a count"),
        ("seed", 0.5, "seed must be"),
        ("init", Kaiming, "init takes an instance"),
        ("allocate", "uniform", "allocate takes an instance"),
    ],
)
def test_a_policy_checks_itself(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**{field: value})


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


def test_what_is_not_wrapped_cannot_be_taken_out() -> None:
    for act in (
        lowrank.unwrap,
        lowrank.merge,
        lowrank.plan_of,
        lambda m: lowrank.disable_adapters(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="not wrapped"):
            act(zoo.build("llama"))


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


# -- planning -------------------------------------------------------------------------------------------


def test_planning_touches_nothing_and_predicts_the_wrapped_model() -> None:
    model, batches = zoo.build("llama"), [zoo.batch("llama")]
    names = [name for name, _ in model.named_modules()]
    plan = lowrank.plan_model(model, presets.tlora(rank=4), batches=batches, progress=False)
    assert [name for name, _ in model.named_modules()] == names
    lowrank.wrap_model(model, presets.tlora(rank=4), batches=batches, progress=False)
    assert lowrank.plan_of(model) == plan
    assert plan.trainable_parameters == sum(p.numel() for p in lowrank.adapter_parameters(model))
    assert plan.trainable_parameters <= 4 * sum(p.out_features for p in plan)


def test_a_plan_wraps_as_its_policy_does(tmp_path: Any) -> None:
    batches = [zoo.batch("llama")]
    policy = presets.tlora(rank=4, seed=3)
    plan = lowrank.plan_model(zoo.build("llama"), policy, batches=batches, progress=False)
    plan.save(tmp_path / "plan.json")
    from_policy = wrapped(policy=policy, batches=batches)
    from_plan = wrapped(policy=lowrank.Plan.load(tmp_path / "plan.json"), batches=batches)
    a, b = from_policy.state_dict(), from_plan.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_plan_for_another_model_lists_every_mismatch() -> None:
    plan = lowrank.plan_model(zoo.build("llama"), presets.lora(target=("q_proj", "up_proj")))
    with pytest.raises(ValueError, match=r"made for another model(.|\n)*h\.|q_proj(.|\n)*up_proj"):
        lowrank.wrap_model(zoo.build("gpt2"), plan)


def test_a_fractional_budget_is_of_the_models_parameters() -> None:
    model = zoo.build("llama")
    whole = sum(p.numel() for p in model.parameters())
    plan = lowrank.plan_model(model, presets.lora(budget=0.2))
    assert plan.budget == int(0.2 * whole)
    assert 0.15 * whole < plan.trainable_parameters <= 0.2 * whole


def test_a_sensitive_budget_is_spent_to_within_one_rank() -> None:
    plan = lowrank.plan_model(
        zoo.build("llama"), presets.tlora(budget=4000), batches=[zoo.batch("llama")], progress=False
    )
    assert plan.budget == 4000
    assert 0 <= 4000 - plan.trainable_parameters < max(plan.costs.values())


def test_a_projection_that_the_loss_does_not_reach_is_left_alone() -> None:
    model = zoo.build("deberta")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.deberta(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        model.pooler(hidden)  # called, and ignored
        return model.classifier(hidden[:, 0]).square().mean()

    lowrank.wrap_model(
        model, presets.tlora(rank=2), batches=[zoo.batch("deberta")], loss=loss, progress=False
    )
    plan = lowrank.plan_of(model)
    (pooler,) = [p for p in plan if p.module == "pooler.dense"]
    assert plan[pooler].rank == 0
    assert type(model.pooler.dense) is nn.Linear
    assert "left alone" in next(line for line in str(plan).splitlines() if line.startswith("pooler.dense"))


def test_each_projection_draws_for_itself() -> None:
    some = wrapped(policy=presets.lora(target="q_proj", rank=2)).state_dict()
    more = wrapped(policy=presets.lora(rank=2)).state_dict()
    other = wrapped(policy=presets.lora(rank=2, seed=1)).state_dict()
    key = "model.layers.1.self_attn.q_proj.adapters.0.A"
    assert torch.equal(some[key], more[key])
    assert not torch.equal(other[key], more[key])


def test_wrapping_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    wrapped(policy=presets.ailora(rank=2))
    wrapped(policy=presets.tlora(rank=2), batches=[zoo.batch("llama")])
    assert torch.equal(torch.get_rng_state(), before)


# -- shared and tied ------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.inner = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](self.second(self.inner[0](self.first(x))))


def test_a_shared_module_is_adapted_once_and_stays_shared() -> None:
    model, x = Shared(), torch.randn(3, 8)
    before = model(x)
    original = model.first
    lowrank.wrap_model(model, presets.pissa(rank=2), progress=False)
    assert len(lowrank.adapted_layers(model)) == 2
    assert model.first is model.second is model.inner[0]
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()  # one layer used three times in a graph
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    assert model.first is model.second is model.inner[0] is original


class Aside(nn.Module):
    """Calls its layers by way of a plain list, a tuple or an attribute that hides them from `modules`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__["hidden"] = {
            "list": [self.a, self.b],
            "tuple": ((self.a,), self.b),
            "attribute": self.a,
        }[kind]
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attribute":
            return self.b(self.hidden(x))
        first, second = self.hidden
        return second(first[0](x) if self.kind == "tuple" else first(x))


@pytest.mark.parametrize("kind", ["list", "tuple", "attribute"])
def test_modules_are_replaced_where_no_module_dict_holds_them(kind: str) -> None:
    model, x = Aside(kind), torch.randn(2, 4)
    base = model(x)
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    assert not torch.equal(model(x), base)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lowrank.adapter_parameters(model))
    lowrank.unwrap(model)
    assert torch.equal(model(x), base)
    kept = model.hidden if kind == "attribute" else model.hidden[0]
    assert (kept[0] if kind == "tuple" else kept) is model.a


def test_parts_that_were_wrapped_apart_are_named_apart() -> None:
    pair = nn.ModuleDict({"a": wrapped("perceptron"), "b": wrapped("perceptron")})
    for act in (lowrank.unwrap, lowrank.merge, lowrank.plan_of):
        with pytest.raises(ValueError, match="wrapped apart, so name one of them: a, b"):
            act(pair)
    lowrank.unwrap(pair["a"])
    assert lowrank.plan_of(pair) is lowrank.plan_of(pair["b"])


def test_merging_into_experts_that_lie_out_of_order() -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.dim() == 3:
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
                assert name in ("gate_up_proj", "down_proj") and not weight.is_contiguous()
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    with torch.no_grad():
        wanted = logits(model, batch)
        torch.testing.assert_close(logits(lowrank.merge(model), batch), wanted, rtol=1e-4, atol=1e-4)


def test_merging_what_is_not_finite_is_refused() -> None:
    model = wrapped()
    next(lowrank.adapter_parameters(model)).data[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        lowrank.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "adapters" not in name)


def test_merging_a_shared_module_adds_its_update_once() -> None:
    model, x = Shared(), torch.randn(3, 8)
    perturb(lowrank.wrap_model(model, presets.lora(rank=2), progress=False))
    wanted = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), wanted)


def test_merging_into_a_tied_weight_is_refused_and_nothing_changes() -> None:
    model = wrapped("tied_llama", presets.lora(target=("lm_head", "q_proj"), rank=2))
    perturb(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head is tied to another module's weight"):
        lowrank.merge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert lowrank.adapted_layers(model)
    lowrank.unwrap(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_training_one_end_of_a_tie_is_refused() -> None:
    with pytest.raises(ValueError, match="train='model.embed_tokens': its weight is tied to lm_head"):
        wrapped("tied_llama", presets.lora(train=("embed_tokens",)))


# -- modules trained in full ----------------------------------------------------------------------------


def test_a_trained_sequential_can_be_indexed_and_walked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.head[0](self.body(x))
            for layer in list(self.head)[1 : len(self.head)]:
                x = layer(x)
            return x if self.head and self.body else -x

    model, x = Model(), torch.randn(3, 4)
    before = model(x)
    lowrank.wrap_model(model, presets.lora(rank=2, target="body", train=("head",)))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.copy.parameters())


def test_a_trained_head_leaves_the_original_alone() -> None:
    model, batch = zoo.build("bert"), zoo.batch("bert")
    head, base = model.classifier, logits(model, batch)
    start = head.weight.clone()
    lowrank.wrap_model(model, presets.lora(rank=2, train=("classifier",)), progress=False)
    assert torch.equal(logits(model, batch), base)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert model.classifier.out_features == 2, "what the head has is still seen"
    assert not torch.equal(logits(model, batch), base)
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model, batch), base)
    trained = logits(model, batch)
    merged = lowrank.merge(copy.deepcopy(model))
    assert torch.equal(logits(merged, batch), trained)
    lowrank.unwrap(model)
    assert model.classifier is head and torch.equal(head.weight, start)


# -- copies and conversions -------------------------------------------------------------------------------

COPIES = ["deepcopy", "pickle", "torch.save"]


def duplicate(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder", "bert"])
def test_copies_are_whole_and_apart(family: str, how: str) -> None:
    train = ("classifier",) if family == "bert" else ()
    model, batch = wrapped(family, presets.ailora(rank=2, train=train)), zoo.batch(family)
    perturb(model)
    wanted = logits(model, batch)
    twin = duplicate(model, how)
    assert torch.equal(logits(twin, batch), wanted)
    assert lowrank.plan_of(twin) == lowrank.plan_of(model)
    lowrank.merge(twin)
    torch.testing.assert_close(logits(twin, batch), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, batch), wanted), "merging a copy broke the original"
    lowrank.unwrap(duplicate(model, how))
    assert torch.equal(logits(model, batch), wanted), "unwrapping a copy broke the original"
    base = zoo.build(family)
    assert torch.equal(logits(lowrank.unwrap(model), batch), logits(base, batch))


@pytest.mark.parametrize("family", ["llama", "torch_encoder"])
def test_state_dicts_travel_between_wrapped_models(family: str) -> None:
    policy = presets.pissa(rank=2)
    one, two, batch = wrapped(family, policy), wrapped(family, policy), zoo.batch(family)
    perturb(one)
    assert not torch.equal(logits(one, batch), logits(two, batch))
    two.load_state_dict(one.state_dict())
    assert torch.equal(logits(one, batch), logits(two, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "torch_encoder", "vit"])
def test_conversion_reaches_everything(family: str) -> None:
    model = wrapped(family, presets.pissa(rank=2)).to(torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    assert logits(model, zoo.batch(family, torch.bfloat16)).isfinite().all()
    moved = wrapped(family, presets.pissa(rank=2)).to("meta")
    assert all(p.is_meta for p in moved.parameters())


def test_masters_are_fp32_on_a_half_precision_base() -> None:
    model = lowrank.wrap_model(zoo.build("llama", torch.bfloat16), presets.lora(rank=2), progress=False)
    assert {p.dtype for p in lowrank.adapter_parameters(model)} == {torch.float32}
    assert logits(model, zoo.batch("llama")).dtype == torch.bfloat16


def test_small_updates_survive_on_a_half_precision_base() -> None:
    """A residual or merged weight in bf16 drops an update of 1e-4 of the weight; an offset keeps it."""
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    model = lowrank.wrap_model(nn.Sequential(layer), presets.pissa(rank=4), progress=False)
    (adapted,) = lowrank.adapted_layers(model).values()
    with torch.no_grad():
        for p in lowrank.adapter_parameters(model):
            p.add_(1e-5 * torch.randn(p.shape))
    delta = adapted.delta_weight()
    exact = adapted.adapters[0].product().double()
    assert 0 < delta.norm() / layer.weight.float().norm() < 1e-2
    assert (delta - exact).norm() < 1e-6 * exact.norm()


def test_disabling_nests_and_survives_an_error() -> None:
    model, batch = perturb(wrapped()), zoo.batch("llama")
    on = logits(model, batch)
    with pytest.raises(KeyError), lowrank.disable_adapters(model):
        with lowrank.disable_adapters(model):
            off = logits(model, batch)
        assert torch.equal(logits(model, batch), off)
        raise KeyError
    assert torch.equal(logits(model, batch), on) and not torch.equal(on, off)


def test_a_wrapped_part_is_found_inside_a_larger_module() -> None:
    class Trainer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    outer = Trainer(perturb(wrapped()))
    assert len(lowrank.adapted_layers(outer)) == 14
    assert lowrank.unwrap(outer) is outer
    assert not lowrank.adapted_layers(outer)


# -- adapting on the weight -------------------------------------------------------------------------------


def test_the_fast_path_of_the_torch_encoder_sees_the_adapters() -> None:
    model, batch = perturb(wrapped("torch_encoder", presets.lora(rank=2))), zoo.batch("torch_encoder")
    fast = logits(model, batch)
    with torch.enable_grad():
        slow = model(**batch).logits.detach()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    with lowrank.disable_adapters(model):
        assert not torch.allclose(logits(model, batch), fast, atol=1e-3)


def test_a_module_adapted_on_the_weight_is_still_what_it_was() -> None:
    model = wrapped("torch_encoder", presets.lora(rank=2))
    attention = model.encoder.layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention) and isinstance(attention, AdaptedWeight)
    plain = dict(zoo.build("torch_encoder").named_parameters())
    assert {n for n, _ in model.named_parameters() if "lora" not in n} == set(plain)
    delta = attention.delta_weight("in_proj_weight")
    assert delta.shape == (96, 32) and not delta.any()


def test_experts_learn() -> None:
    model, batch = zoo.build("mixtral"), zoo.batch("mixtral")
    base = logits(model, batch)
    lowrank.wrap_model(model, presets.pissa(rank=2, target="mlp.experts.*"), progress=False)
    assert torch.equal(logits(model, batch), base)
    model(**batch).loss.backward()
    roles = {p.role for p in lowrank.plan_of(model).adapted}
    assert roles == {Role.GATE, Role.UP, Role.DOWN}
    assert any(p.grad is not None and p.grad.any() for p in lowrank.adapter_parameters(model))
    torch.testing.assert_close(logits(lowrank.merge(perturb(model)), batch).shape, base.shape)
