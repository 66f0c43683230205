"""Which modules a policy trains in full."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.models.listing import as_names, nearest, under
from lowrank.models.patterns import matches


def trained_modules(model: nn.Module, train: Sequence[str]) -> list[str]:
    """Paths of the modules that ``train`` names; a path below another of them is left out."""
    paths = [path for path, _ in model.named_modules() if path]
    found: dict[str, None] = {}
    for pattern in as_names(train, "train"):
        hits = [path for path in paths if matches(path, pattern)]
        if not hits:
            raise ValueError(f"train={pattern!r} names no module{nearest(pattern, paths)}")
        for hit in hits:
            kind = type(model.get_submodule(hit))
            if kind.forward is nn.Module.forward:
                raise ValueError(
                    f"train={pattern!r} names {hit}, a {kind.__name__}, which is never called: "
                    f"name what it holds, such as {pattern + '.*'!r}"
                )
        found |= dict.fromkeys(hits)
    inside = under(found)
    return [path for path in found if not inside(path.rpartition(".")[0])]
