"""Finding projections grows with their number, and not with its square."""

from __future__ import annotations

import pytest
from torch import nn

from lowrank.models import fused
from lowrank.models.projections import find_projections


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
