"""What a model holds beside its linear projections: embeddings, convolutions, and matrices in no such layer.

It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lowrank.models.fused import Doubt
from lowrank.models.kinds import kind_of
from lowrank.models.listing import large_weights
from lowrank.models.projections import Projection
from lowrank.models.storage import weight_shape


def further(model: nn.Module) -> dict[Projection, Doubt | None]:
    """Projections beside the linear ones, each with what speaks against adapting it: see `kinds`."""
    found: dict[Projection, Doubt | None] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        weight = None if kind is None else module._parameters.get("weight")
        if kind is None or weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            continue
        out, columns = weight_shape(module, "weight")
        problem = kind.problem(module)
        doubt = Doubt(f"{path}: {problem}", adaptable=False) if problem else None
        found[Projection(path, "weight", (0, out), kind.role, columns, out)] = doubt
    return found


def unheld(model: nn.Module, projections: Iterable[Projection]) -> dict[str, str]:
    """Matrices that none of ``projections`` covers, such as an LSTM's: names, each with its module's path.

    Embeddings and convolutions do not count, nor does what is called a bias, a position or a token, unless it
    is large.
    """
    covered = {(p.module, p.param) for p in projections}
    found = {}
    for path, module in model.named_modules():
        if kind_of(module) is not None or isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if (path, name) not in covered and not lazy and sum(size > 1 for size in parameter.shape) > 1:
                found[f"{path}.{name}".lstrip(".")] = path
    large = large_weights(model, found)
    return {name: path for name, path in found.items() if name in large or not _is_minor(name)}


def _is_minor(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return any(word in leaf for word in ("bias", "pos", "token", "embed", "A_log"))
