"""What finding projections costs in a block of very many layers, counted in calls and not in seconds."""

from __future__ import annotations

import pytest
from torch import nn

from lowrank.models import structure
from lowrank.models.projections import find_projections


def looked_at(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a child is looked at while the roles of a block of so many layers are told."""
    count = 0
    told = structure.is_linear

    def counted(module: nn.Module) -> bool:
        nonlocal count
        count += 1
        return told(module)

    model = nn.ModuleDict({f"p{i}": nn.Linear(4, 4) for i in range(layers)})
    with monkeypatch.context() as patch:
        patch.setattr(structure, "is_linear", counted)
        assert len(find_projections(model)) == layers
    return count


def test_the_cost_of_a_layer_does_not_depend_on_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = looked_at(20, monkeypatch), looked_at(200, monkeypatch)
    assert few > 0 and many <= 10 * few
