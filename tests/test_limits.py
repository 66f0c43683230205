"""What rank a projection can have is known when planning, and errors say which projection they concern."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lowrank
from lowrank import Factors, Plan, Policy, Role, presets
from lowrank.allocate import EnergyRank, Sensitivity, StableRank, Uniform
from lowrank.init import ByRole, GradientAligned, Kaiming
from lowrank.init.base import largest_rank
from tests import zoo
from tests.helpers import frozen_logits, logits
from tests.test_quantized import KINDS, base, plain_base


class Narrow(nn.Module):
    """Two layers of 16, between them one that scores with a single number, and boxes of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(16, 16), nn.Linear(16, 1)
        self.second, self.box = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        hidden = self.second(self.first(x) * self.gate(x).sigmoid())
        out = self.box(hidden)
        return {"loss": out.square().mean(), "logits": out}


def narrow() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Narrow().eval()


def inputs() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(12, 16, generator=torch.Generator().manual_seed(0))}]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def unread() -> Iterator[Any]:
    """Batches that nobody may read."""
    raise AssertionError("the batches were read")
    yield


def ranks(plan: Plan) -> dict[str, int]:
    return {p.name: allocation.rank for p, allocation in plan.items()}


# -- narrow layers ------------------------------------------------------------------------------------------


def test_a_narrow_layer_gets_what_it_can_have() -> None:
    model = narrow()
    plan = lowrank.plan_model(model, presets.lora(target="*", rank=8))
    assert ranks(plan) == {"first": 8, "gate": 1, "second": 8, "box": 4}
    assert {a.scaling for a in plan.values()} == {2.0}
    assert plan.reference_rank == 8 and plan.budget == plan.trainable_parameters
    assert plan.notes == ("2 projections are limited to less than the reference rank 8: gate (1), box (4)",)
    lowrank.wrap_model(model, plan, progress=False)
    assert lowrank.plan_of(model).notes == plan.notes
    assert sum(p.numel() for p in lowrank.adapter_parameters(model)) == plan.trainable_parameters


@pytest.mark.parametrize("preset", [presets.lora, presets.pissa, presets.olora, presets.milora])
def test_a_mixture_of_experts_with_a_gate_of_one_row(preset: Callable[..., Policy]) -> None:
    config = hf.Qwen2MoeConfig(
        **zoo.DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.Qwen2MoeForCausalLM(config).eval()
    batch = zoo.batch("llama")
    expected = frozen_logits(model, batch)
    policy = preset(target=("all-linear", "shared_expert_gate"))  # a router is adapted where it is named
    lowrank.wrap_model(model, policy, progress=False)
    plan = lowrank.plan_of(model)
    assert {r for name, r in ranks(plan).items() if name.endswith("shared_expert_gate")} == {1}
    (note,) = [note for note in plan.notes if "limited" in note]
    assert "are limited to less than the reference rank 8: " in note and "shared_expert_gate (1)" in note
    assert note.endswith(" more") or note.count("(") <= 3
    assert torch.equal(logits(model, batch), expected)


def test_a_note_shortens_the_names() -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(nn.Linear(16, 2) for _ in range(5)), nn.Linear(16, 16))
    plan = lowrank.plan_model(model, Policy(target="*"))
    assert plan.notes == (
        "5 projections are limited to less than the reference rank 8: 1 (2), 2 (2), 3 (2) and 2 more",
    )


@pytest.mark.parametrize("allocate", [Uniform(), Sensitivity(), StableRank(), EnergyRank()], ids=repr)
@pytest.mark.parametrize("init", [Kaiming(), GradientAligned()], ids=repr)
@pytest.mark.parametrize("budget", [None, 600])
def test_every_allocator_stays_within_the_limits(init: Any, allocate: Any, budget: int | None) -> None:
    policy = Policy(target="*", init=init, allocate=allocate, budget=budget)
    plan = lowrank.plan_model(narrow(), policy, batches=inputs(), loss=loss, progress=False)
    most = {"first": 16, "gate": 1, "second": 16, "box": 4}
    if isinstance(init, GradientAligned):
        most = {"first": 8, "gate": 0, "second": 8, "box": 2}
    assert all(rank <= most[name] for name, rank in ranks(plan).items())
    assert plan.trainable_parameters <= (plan.budget or 0)
    lowrank.wrap_model(narrow(), policy, batches=inputs(), loss=loss, progress=False)


def test_a_rank_that_nothing_can_have_is_an_error() -> None:
    message = r"rank 17 is more than Kaiming.* of any target: the largest is 16, of first with shape .16, 16."
    with pytest.raises(ValueError, match=message):
        lowrank.plan_model(narrow(), Policy(target="*", rank=17))


# -- limits of initializers ---------------------------------------------------------------------------------


def test_lora_ga_is_limited_to_half_before_calibration() -> None:
    with pytest.raises(ValueError, match=r"rank 9 is more than GradientAligned.*the largest is 8, of first"):
        lowrank.wrap_model(narrow(), presets.lora_ga(target="*", rank=9), batches=unread(), progress=False)
    plan = lowrank.plan_model(narrow(), presets.lora_ga(target="*", rank=6), batches=unread())
    assert ranks(plan) == {"first": 6, "gate": 0, "second": 6, "box": 2}
    assert plan.notes == (
        "1 projection is left alone, since GradientAligned(gamma=16.0) can make no rank there: gate",
        "1 projection is limited to less than the reference rank 6: box (2)",
    )


def test_lora_ga_can_make_no_rank_of_single_rows() -> None:
    with pytest.raises(
        ValueError, match="GradientAligned.* can make no rank of gate, nor of any other target"
    ):
        lowrank.plan_model(narrow(), presets.lora_ga(target="gate", rank=1), batches=unread())
    with pytest.raises(
        ValueError, match="GradientAligned.* can make no rank of gate, nor of any other target"
    ):
        lowrank.plan_model(narrow(), presets.lora_ga(target="gate", budget=100), batches=unread())


def test_a_plan_with_ranks_that_its_initializer_cannot_make() -> None:
    plan = lowrank.plan_model(narrow(), presets.lora(target="*", rank=9))
    plan.init = GradientAligned()
    with pytest.raises(ValueError) as caught:
        lowrank.wrap_model(narrow(), plan, batches=unread(), progress=False)
    assert str(caught.value).splitlines() == [
        "the plan has ranks that GradientAligned(gamma=16.0) cannot make:",
        "  first of shape (16, 16): rank 9, at most 8",
        "  gate of shape (1, 16): rank 1, at most 0",
        "  second of shape (16, 16): rank 9, at most 8",
        "  box of shape (4, 16): rank 4, at most 2",
    ]


@dataclass(frozen=True)
class Third:
    """An initializer of somebody else, which says what it can make, or says nothing."""

    most: int
    needs = frozenset[str]()

    def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
        return self.most

    def __call__(self, *given: Any, **named: Any) -> Factors:
        return Kaiming()(*given, **named)


@dataclass(frozen=True)
class Silent:
    needs = frozenset[str]()

    def __call__(self, *given: Any, **named: Any) -> Factors:
        return Kaiming()(*given, **named)


@pytest.mark.parametrize(
    ("init", "role", "most"),
    [
        (Kaiming(), Role.QUERY, 5),
        (GradientAligned(), Role.QUERY, 2),
        (Silent(), Role.QUERY, 5),
        (Third(3), Role.QUERY, 3),
        (Third(99), Role.QUERY, 5),
        (Third(-1), Role.QUERY, 0),
        (ByRole({Role.QUERY: GradientAligned()}, otherwise=Silent()), Role.QUERY, 2),
        (ByRole({Role.QUERY: GradientAligned()}, otherwise=Silent()), Role.KEY, 5),
    ],
)
def test_the_largest_rank(init: Any, role: Role, most: int) -> None:
    assert largest_rank(init, (5, 9), role) == most
    assert largest_rank(init, (9, 5), role) == most


@pytest.mark.parametrize("init", [Third(3), Silent()], ids=repr)
def test_initializers_of_others_are_planned_and_wrapped(init: Any) -> None:
    model = lowrank.wrap_model(narrow(), Policy(target="*", init=init, budget=600), progress=False)
    plan = lowrank.plan_of(model)
    assert max(ranks(plan).values()) == (3 if isinstance(init, Third) else plan.reference_rank)


def test_a_role_without_an_initializer_names_the_projection() -> None:
    init = ByRole({Role.QUERY: Kaiming()})
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn.k_proj: no initializer for the role 'key'"
    ):
        lowrank.plan_model(zoo.build("llama"), Policy(init=init))


# -- a fraction of the model's parameters ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_of_a_quantized_model_is_that_of_the_plain_one(kind: str, family: str) -> None:
    plain = plain_base(family)
    whole = sum(p.numel() for p in plain.parameters())
    policy = presets.lora(budget=0.05)
    made = lowrank.plan_model(base(kind, family), policy)
    assert made.budget == int(0.05 * whole)
    assert made.reference_rank == lowrank.plan_model(plain, policy).reference_rank


def test_shared_parameters_count_once() -> None:
    tied = zoo.build("tied_llama")
    policy = presets.lora(budget=0.2)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert lowrank.plan_model(tied, policy).budget == int(0.2 * sum(p.numel() for p in tied.parameters()))


# -- messages with a name ---------------------------------------------------------------------------------


def spoiled() -> nn.Module:
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    return model


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("preset", [presets.pissa, presets.milora, presets.olora])
def test_nan_in_one_weight_is_named(preset: Callable[..., Policy]) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: .*NaN or Inf"):
        lowrank.wrap_model(spoiled(), preset(rank=2), progress=False)


@pytest.mark.parametrize("allocate", [StableRank(), EnergyRank()], ids=repr)
def test_nan_in_one_spectrum_is_named(allocate: Any) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: its weight contains NaN or Inf"):
        lowrank.plan_model(spoiled(), Policy(allocate=allocate, rank=2), progress=False)


@dataclass(frozen=True)
class Failing:
    error: Exception
    needs = frozenset[str]()

    def __call__(self, weight: Tensor, *given: Any, **named: Any) -> Factors:
        if weight.shape == (4, 16):
            raise self.error
        return Kaiming()(weight, *given, **named)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no"), "^box: no$"),
        (RuntimeError("no"), "^box: no$"),
        (torch.linalg.LinAlgError("no convergence"), "^box: no convergence$"),
        (KeyError("moment"), "^box: KeyError: 'moment'$"),
        (TypeError("no"), "^box: TypeError: no$"),
    ],
)
def test_an_error_of_an_initializer_names_the_projection(error: Exception, message: str) -> None:
    model = narrow()
    with pytest.raises(ValueError, match=message) as caught:
        lowrank.wrap_model(model, Policy(target="*", init=Failing(error)), progress=False)
    assert caught.value.__cause__ is error
    assert "_lowrank" not in model.__dict__


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_lack_of_memory_keeps_its_type(kind: type[Exception]) -> None:
    error = kind("too much")
    with pytest.raises(kind) as caught:
        lowrank.wrap_model(narrow(), Policy(target="*", init=Failing(error)), progress=False)
    assert caught.value is error and error.__notes__ == ["box"]


def test_lora_ga_names_its_projection_where_a_limit_was_passed_over() -> None:
    """As somebody's subclass does, which says that it can make more."""

    class Bold(GradientAligned):
        def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
            return min(shape)

    with pytest.raises(ValueError, match="^first: LoRA-GA takes 2·rank directions"):
        lowrank.wrap_model(
            narrow(), Policy(target="*", init=Bold(), rank=9), batches=inputs(), loss=loss, progress=False
        )
