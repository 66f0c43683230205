"""What changes in a wrapped base, and belongs to no adapter, is named where the adapter is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from lowrank.adapters import adaptation, added_parameters, plan_of
from lowrank.layers.tree import base_modules, original
from lowrank.models.fingerprint import Sample, difference, of_tensor
from lowrank.models.listing import under
from lowrank.notices import UnsavedParametersWarning, few


def samples_of_buffers(root: nn.Module) -> dict[str, Sample]:
    """Samples of the base's persistent buffers by name, of those that hold floating-point numbers."""
    found = {}
    for path, hung in base_modules(root).items():
        module = original(hung)
        for name in module._buffers:
            if sample := of_tensor(module, name):
                found[f"{path}.{name}".lstrip(".")] = sample
    return found


def changed_buffers(root: nn.Module, name: str) -> list[str]:
    """Names of the base's buffers that are not what they were when it was wrapped.

    Those of modules that ``name`` trains in full are not among them: it has its own.
    """
    then: Mapping[str, Sample] = adaptation(root).buffers
    now, trained = samples_of_buffers(root), under(plan_of(root, name).train)
    return [
        key
        for key in then
        if key in now and not trained(key.rpartition(".")[0]) and difference(now[key], then[key])
    ]


def warn_of_unsaved(root: nn.Module, name: str, stacklevel: int) -> list[str]:
    """Names what trains or changes in the base and is no part of ``name``; returns `changed_buffers`.

    ``stacklevel`` is that of the warnings, as if the caller gave them.
    """
    added = {id(parameter) for parameter in added_parameters(root)}
    learning = [key for key, p in root.named_parameters() if p.requires_grad and id(p) not in added]
    changed = changed_buffers(root, name)
    for what, keys in {
        "these parameters of the base require grad": learning,
        "these buffers of the base have changed since it was wrapped": changed,
    }.items():
        if keys:
            warnings.warn(
                f"{what}, but are not saved with the adapter: {few(keys)}; name their modules in "
                "Policy(train=...) when wrapping",
                UnsavedParametersWarning,
                stacklevel=stacklevel + 1,
            )
    return changed
