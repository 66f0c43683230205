"""The proof of an export: the written files are read again and held against the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.linalg.rows import take
from lowrank.models.projections import Projection
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.experts import parameters, place_of, within
from lowrank.peft_format.folder import Contents, base_paths
from lowrank.peft_format.pairs import Pair, relative_distance

TOLERANCE = 1e-5  # of ΔW, relative, between the model and the written files


def check_written(
    folder: Path,
    root: nn.Module,
    exact: Mapping[Projection, Pair],
    lossy: Mapping[str, Pair] | None,
    trained: Mapping[str, Mapping[str, Tensor]],
    magnitudes: Mapping[str, Tensor],
) -> dict[str, float]:
    """The relative error of each ΔW in the files of ``folder``, by projection.

    Raises ValueError where they say something else than the model, or than ``lossy`` where it is given.
    """
    contents = Contents.read(folder, root)
    tensors = contents.tensors()
    adapted = adapted_paths(root, contents.config)
    saved = {path for path in base_paths(root) if contents.config.trains(path)}
    if adapted != set(contents.layers) or saved != set(trained):
        raise ValueError(
            "the written configuration names other modules than the tensors: nothing was exported"
        )
    errors: dict[str, float] = {}
    for p, true in exact.items():
        for own in p.apart(_rows_of_each(p, contents)):
            read = _of(own, tensors.pair(place_of(p)), contents)
            error = relative_distance(read, true)
            errors[p.name] = max(error, errors.get(p.name, 0.0))
            if lossy is not None:
                error = relative_distance(read, _of(own, lossy[place_of(p)], contents))
            if not error <= TOLERANCE:
                raise ValueError(
                    f"{p.name}: the written files give another ΔW ({error:.1e} off): nothing was exported"
                )
    for path, values in magnitudes.items():
        if not torch.equal(tensors.magnitude(path), values.cpu()):
            raise ValueError(f"{path}: the written files give other magnitudes: nothing was exported")
    for path, state in trained.items():
        for name, tensor in tensors.state(path, state).items():
            if not torch.equal(tensor, state[name].cpu()):
                raise ValueError(f"{path}.{name}: the written files give another value: nothing was exported")
    return errors


def _rows_of_each(p: Projection, contents: Contents) -> int:
    """The rows of one expert, where ``p`` is of experts."""
    held = contents.experts.get(place_of(p))
    return p.out_features if held is None else held.stack.out


def _of(p: Projection, whole: Pair, contents: Contents) -> Pair:
    """The part of a pair that is for the rows of ``p``."""
    A, B, rows = whole.A, whole.B, p.rows
    if place_of(p) in contents.experts:
        expert, rows = within(rows, contents.experts[place_of(p)].stack.out)
        A, B = A[expert], B[expert]
    return Pair(A, take(B, rows), whole.scaling)


def adapted_paths(root: nn.Module, config: PeftConfig) -> set[str]:
    """The paths of modules, and the names of parameters, that PEFT would adapt."""
    targets, named = config.targets, set(parameters(root, config))
    if isinstance(targets, str):
        return named | {path for path in base_paths(root) if re.fullmatch(targets, path)}
    return named | {path for path in base_paths(root) if config.adapts(path)}
