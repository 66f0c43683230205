"""What finding projections costs in a block of very many layers, counted in calls and not in seconds."""

from __future__ import annotations

import pytest
from torch import nn

from lowrank.models import fused, structure
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


def test_a_parent_of_many_layers_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a module is an attention is a question of all its children, so each child may not ask anew."""
    looked_at: list[int] = []
    is_attention = fused.is_attention

    def counting(children: dict[str, nn.Module]) -> bool:
        looked_at.append(len(children))
        return is_attention(children)

    monkeypatch.setattr(fused, "is_attention", counting)
    model = nn.ModuleDict({f"p{i}": nn.Linear(4, 4) for i in range(50)})
    assert len(find_projections(model)) == 50
    assert looked_at == [50]
