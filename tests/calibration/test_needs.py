"""Each projection is measured for what its own initializer needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank import Policy
from lowrank.adapters import adapters_of
from lowrank.calibration import calibrate, predicted_bytes
from lowrank.calibration.statistics import Statistics
from lowrank.init import ByRole, CovarianceOriented, GradientAligned, Kaiming, Principal, TaskAligned
from lowrank.init.base import needs_of
from lowrank.models.projections import Role
from lowrank.models.targets import select
from tests import zoo

MIXED = ByRole(
    {Role.QUERY: TaskAligned(), Role.VALUE: CovarianceOriented(), Role.DOWN: GradientAligned()},
    otherwise=Kaiming(),
)
NEEDS = {Role.QUERY: {"covariance"}, Role.VALUE: {"moment"}, Role.DOWN: {"gradient"}}
HELD = {"covariance": "covariance", "moment": "token_covariance", "gradient": "gradient"}


def batches() -> list[dict[str, Tensor]]:
    return [zoo.batch("llama", seed=seed) for seed in range(2)]


def shown(statistics: Statistics, p: Any) -> set[str]:
    return {
        need for need, kind in HELD.items() if p in statistics and getattr(statistics[p], kind) is not None
    }


@pytest.mark.parametrize("role", Role)
def test_needs_go_by_role(role: Role) -> None:
    assert needs_of(MIXED, role) == NEEDS.get(role, set())
    assert needs_of(ByRole({}, otherwise=MIXED), role) == NEEDS.get(role, set())
    assert needs_of(TaskAligned(), role) == {"covariance"}


def test_an_initializer_that_says_only_needs() -> None:
    class Others:
        needs = ("gradient",)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return GradientAligned()(*args, **kwargs)

    assert needs_of(Others(), Role.KEY) == frozenset({"gradient"})
    model = lowrank.wrap_model(
        zoo.build("llama"), Policy(rank=2, init=Others()), batches=batches(), progress=False
    )
    assert len(lowrank.plan_of(model).adapted) == 14


def test_only_what_is_needed_is_measured() -> None:
    measured = lowrank.measure(zoo.build("llama"), Policy(init=MIXED), batches(), progress=False)
    for p in select(zoo.build("llama"), "all-linear").projections:
        assert shown(measured, p) == NEEDS.get(p.role, set()), p.name


def test_what_siblings_need_apart_is_what_they_need_together() -> None:
    """Query and key read one tensor, and only one of them counts it."""
    model = zoo.build("llama")
    projections = select(model, "all-linear").projections
    alike = calibrate(model, projections, ["covariance", "moment", "gradient"], batches(), progress=False)
    apart = calibrate(
        model, projections, {p: NEEDS.get(p.role, ()) for p in projections}, batches(), progress=False
    )
    assert {p.role for p in apart} == set(NEEDS)
    for p, each in apart.items():
        for need in NEEDS[p.role]:
            torch.testing.assert_close(getattr(each, HELD[need]), getattr(alike[p], HELD[need]))


def test_no_backward_where_only_inputs_are_needed() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return model(**batch).loss

    policy = Policy(rank=2, init=ByRole({Role.QUERY: TaskAligned()}, otherwise=Principal()))
    model = lowrank.wrap_model(zoo.build("llama"), policy, batches=batches(), loss=loss, progress=False)
    assert len(lowrank.plan_of(model).adapted) == 14


def test_memory_is_predicted_for_what_is_needed() -> None:
    model = zoo.build("llama")
    projections = select(model, "all-linear").projections
    needs = {p: frozenset(NEEDS.get(p.role, ())) for p in projections}
    statistics = calibrate(model, projections, needs, batches(), progress=False)
    kept = {id(t): t for each in statistics.values() for t in vars(each).values() if isinstance(t, Tensor)}
    taken = sum(t.numel() * t.element_size() for t in kept.values() if t.ndim == 2)
    assert predicted_bytes(projections, needs) == taken == 2 * 4 * (32 * 32 + 32 * 32 + 32 * 48)


def test_only_the_projections_that_lack_something_are_measured() -> None:
    model = zoo.build("llama")
    half = lowrank.measure(model, Policy(target="query", init=TaskAligned()), batches()[:1], progress=False)
    policy = Policy(target=["query", "down"], rank=2, init=TaskAligned())
    whole = lowrank.wrap_model(zoo.build("llama"), policy, batches=batches(), statistics=half, progress=False)
    own = lowrank.wrap_model(
        zoo.build("llama"),
        Policy(target="query", rank=2, init=TaskAligned()),
        statistics=half,
        progress=False,
    )
    ours, theirs = whole.state_dict(), own.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if "q_proj" in key and key in ours)


def test_an_idle_expert_takes_every_start() -> None:
    """No token is routed to it, so CorDA has no inputs to go by: it takes the weight's own triplets."""
    model = zoo.build("mixtral")
    for layer in model.model.layers:  # all tokens to the first two of four experts
        layer.mlp.gate.register_forward_hook(
            lambda module, args, output: (*output[:2], torch.tensor([0, 1]).expand_as(output[2]))
        )
    many = [zoo.batch("mixtral")]
    measured = lowrank.measure(model, lowrank.presets.corda(rank=2), many, progress=False)
    idle = [p for p, each in measured.items() if not each.moment.any()]
    assert {p.block for p in idle} == {f"{e}.{part}" for e in (2, 3) for part in ("gate", "up", "down")}
    lowrank.wrap_model(model, lowrank.presets.corda(rank=2), batches=many, progress=False)
    for p in idle:
        U, S, Vh = torch.linalg.svd(p.weight(zoo.build("mixtral")))
        A, B = (factor.detach() for factor in adapters_of(model)[p].factors())
        part = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(lowrank.plan_of(model)[p].scaling * B @ A, part, rtol=1e-3, atol=1e-5)
