"""Puts the values of a saved adapter into one that a model has already: the tensors stay the same ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lowrank.adapters import adaptation, adapters_of, one_name, plan_of, wrapped_root
from lowrank.files import AdapterError, read_header, read_tensors
from lowrank.formats.folder import read_config, refuse, tensors_file
from lowrank.layers.copied import renew_copies
from lowrank.plan import Plan
from lowrank.processes import fill
from lowrank.wrapping.claims import (
    adapter_tensors,
    frozen_names,
    plan_differences,
    rest_problems,
    weight_problems,
)
from lowrank.wrapping.rows import PREFIX as ROWS
from lowrank.wrapping.rows import read_offsets, wanted_tensors


def restore_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> nn.Module:
    """Puts the values of a saved adapter into the adapter that ``model`` has already, bit for bit.

    The tensors stay the same ones, so that an optimizer and compiled code keep what they hold.

    Raises:
        AdapterError: as for `load_adapter`, or the adapter has another plan than the model's, or other
            tensors. The model is untouched then.
        ValueError: the model is not wrapped, or there is no adapter of that name.
    """
    _exchange_values(model, path, one_name(model, name))
    return model


def swap_adapter(model: nn.Module, path: str | Path, name: str) -> nn.Module:
    """Gives the adapter ``name`` of ``model`` the values of a saved one, in the same tensors.

    For serving: where the adapter is, what trains and what acts stay as they are, and compiled code is not
    compiled again. The plan becomes the saved one. Nothing else may run while it is written.

    Raises:
        AdapterError: a ValueError. As for `load_adapter`; also where the saved adapter has other
            projections, ranks, scalings, modules trained in full or tensors than ``name`` (all are listed).
            The model is untouched then.
        ValueError: the model is not wrapped, or there is no adapter of that name.
    """
    plan = _exchange_values(model, path, one_name(model, name), whole_base=True)
    adaptation(model).plans[name] = plan
    return model


@torch.no_grad()
def _exchange_values(model: nn.Module, path: str | Path, name: str, *, whole_base: bool = False) -> Plan:
    """Checks the folder, writes its values into the tensors of ``name``, and returns the saved plan."""
    root, folder = wrapped_root(model), Path(path)
    plan = plan_of(root, name)
    here = adapter_tensors(root, name)
    try:
        config = read_config(folder)
        refuse(folder, "was saved from a model with another plan", plan_differences(plan, config["plan"]))
        refuse(
            folder,
            "was made for a base with other weights",
            weight_problems(root, plan, config["fingerprint"]),
        )
        if whole_base:
            rest = rest_problems(root, plan, config.get("rest", {}))
            refuse(folder, "was made for a base that differs in what is not adapted", rest)
        saved_plan = Plan.from_json(config["plan"])
        file = tensors_file(folder, config)
        there = {key: entry.shape for key, entry in read_header(file).items()}
        wanted = {key: tuple(tensor.shape) for key, tensor in here.items()}
        wanted |= {key: shape for key, (shape, _) in wanted_tensors(plan).items()}
        keys = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
        problems = [f"{key}: {there.get(key, 'missing')}, expected {wanted.get(key, 'none')}" for key in keys]
        for p, adapter in adapters_of(root, name).items():
            frozen = frozen_names(config["frozen"][p.name])
            if frozen != sorted(adapter.frozen):
                problems.append(f"{p.name}: frozen factors {frozen}, expected {sorted(adapter.frozen)}")
        refuse(folder, "does not hold the tensors of this model's adapters", problems)
        saved = read_tensors(file, config["sha256"])
        for key, tensor in saved.items():
            if key in here and tensor.dtype != here[key].dtype:
                raise AdapterError(f"{file}, {key}: {tensor.dtype}, expected {here[key].dtype}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{file}, {key}: holds NaN or Inf")
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    for path, offsets in read_offsets(root, plan, saved).items():
        saved[f"{ROWS}{path}.offsets"] = offsets
    for key, tensor in here.items():
        fill(tensor, saved[key])
    renew_copies()
    return saved_plan
