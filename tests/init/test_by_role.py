"""A start for each role: delegation, data semantics, and errors that list both sets."""

from __future__ import annotations

import pickle

import pytest
import torch

from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.init import ByRole, Kaiming, Minor, Principal, TaskAligned
from lowrank.models.projections import Role
from tests.linalg.matrices import gaussian, generator

AILORA = ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()}, otherwise=Kaiming())


@pytest.mark.parametrize("role", Role)
def test_each_role_gets_its_own(role: Role) -> None:
    weight = gaussian(20, 30)
    alone = {Role.QUERY: Principal(), Role.VALUE: Minor()}.get(role, Kaiming())
    found, expected = (
        init(weight, 4, 2.0, role=role, statistics=None, generator=generator()) for init in (AILORA, alone)
    )
    assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)
    assert found.energy == expected.energy


def test_needs_are_those_of_all() -> None:
    assert AILORA.needs == frozenset()
    mixed = ByRole({Role.QUERY: TaskAligned()}, otherwise=Kaiming())
    assert mixed.needs == frozenset({"covariance"})
    assert ByRole({}, otherwise=TaskAligned()).needs == frozenset({"covariance"})
    assert ByRole({}).needs == frozenset()


def test_frozen_factors_and_statistics_are_passed_on() -> None:
    mixed = ByRole({Role.QUERY: TaskAligned()}, otherwise=ByRole({}, otherwise=Kaiming()))
    assert mixed.frozen(Role.QUERY) == frozenset({"A"}) and mixed.frozen(Role.KEY) == frozenset()
    measured = ProjectionStatistics(covariance=torch.eye(30))
    factors = mixed(gaussian(20, 30), 4, 1.0, role=Role.QUERY, statistics=measured, generator=generator())
    assert factors.frozen == frozenset({"A"})


def test_roles_can_be_named_by_their_strings() -> None:
    assert ByRole({"query": Principal(), "value": Minor()}, otherwise=Kaiming()) == AILORA  # type: ignore[dict-item]


def test_the_order_of_the_choices_does_not_matter_and_later_changes_do_not_reach_it() -> None:
    choices = {Role.VALUE: Minor(), Role.QUERY: Principal()}
    init = ByRole(choices, otherwise=Kaiming())
    assert init == AILORA and hash(init) == hash(AILORA)
    choices[Role.KEY] = Minor()
    assert init == AILORA == pickle.loads(pickle.dumps(init))
    assert "Principal()" in repr(init) and "otherwise=Kaiming()" in repr(init)


def test_an_unmapped_role_lists_what_is_and_is_not_named() -> None:
    init = ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()})
    for refused in (
        lambda: init.frozen(Role.DOWN),
        lambda: init(gaussian(20, 30), 4, 1.0, role=Role.DOWN, statistics=None, generator=generator()),
    ):
        with pytest.raises(ValueError, match=r"'down'.*Named: query, value; not named: key, .*down"):
            refused()


def test_what_is_no_role_or_no_initializer_is_refused() -> None:
    with pytest.raises(ValueError, match="no such role: keys; there are query, key"):
        ByRole({"keys": Kaiming()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected an initializer"):
        ByRole({Role.KEY: Kaiming})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected an initializer"):
        ByRole({Role.KEY: Kaiming()}, otherwise="kaiming")  # type: ignore[arg-type]
