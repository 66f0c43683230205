"""What an adapter folder claims, held against a model: a line for whatever does not fit. It reads no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import adapters_of, holder, plan_of
from lowrank.files import FLOATS, Entry
from lowrank.layers.trained import TrainedModule
from lowrank.layers.tree import base_modules, hung_at, original
from lowrank.linalg.rows import pieces
from lowrank.models.beside import further
from lowrank.models.fingerprint import Sample, difference, differences, of_projection, of_tensor
from lowrank.models.listing import under
from lowrank.models.projections import Projection, find_projections
from lowrank.models.storage import weight_shape
from lowrank.models.tokens import row_problems
from lowrank.plan import Plan
from lowrank.wrapping.checks import projection_problems
from lowrank.wrapping.rows import left_aside, offset_tensors, wanted_tensors

TRAINED = "train:"  # before the names of tensors of modules trained in full
SHOWN = 50  # at most, of the tensors that are neither adapted nor trained


def adapter_tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """All tensors of the adapter ``name``, as a folder names them."""
    tensors = {
        f"{p.name}.{key}": tensor
        for p, adapter in adapters_of(root, name).items()
        for key, tensor in adapter.state_dict().items()
    }
    for path in plan_of(root, name).train:
        trained = hung_at(root, path)
        assert isinstance(trained, TrainedModule)
        for key, tensor in trained.copies[name].state_dict().items():
            tensors[f"{TRAINED}{path}.{key}"] = tensor
    return tensors | offset_tensors(root, name)


def plan_differences(plan: Plan, saved: Any) -> list[str]:
    """A line for each projection and trained module that only one of two plans has, or has otherwise."""
    other = Plan.from_json(saved)
    shapes = {p.name: p.shape for p in plan}
    resized = {p.name: p.shape for p in other if shapes.get(p.name, p.shape) != p.shape}
    problems = [f"{name}: of shape {shape}, expected {shapes[name]}" for name, shape in resized.items()]
    problems += [
        f"{p.name}: {other.get(p, 'not adapted')}, expected {plan.get(p, 'not adapted')}"
        for p in {**dict(plan), **dict(other)}
        if plan.get(p) != other.get(p) and p.name not in resized
    ]
    if plan.dora != other.dora:
        problems.append(f"dora is {other.dora}, expected {plan.dora}")
    if set(plan.train) != set(other.train):
        problems.append(f"modules trained in full: {sorted(other.train)}, expected {sorted(plan.train)}")
    if set(plan.rows) != set(other.rows):
        said = ("; ".join(map(str, each.rows)) or "none" for each in (other, plan))
        problems.append("rows trained: {}, expected {}".format(*said))
    return problems


def plan_problems(model: nn.Module, plan: Plan) -> list[str]:
    """A line for each projection and each trained module that this model does not have like that."""
    known = {(p.module, p.param) for p in (*find_projections(model), *further(model))}
    strange = dict.fromkeys(p for p in plan.adapted if (p.module, p.param) not in known or p.rows[0] < 0)
    problems = [f"{p.name}: the model has no such weight" for p in strange]
    problems += projection_problems(model, [p for p in plan.adapted if p not in strange])
    if not problems:  # all rows are there
        problems += _overlaps(model, plan)
    problems += [
        f"{p.name}: expected a finite scaling, got {plan[p].scaling}"
        for p in plan.adapted
        if not abs(plan[p].scaling) < 1e30
    ]
    if not 0 <= plan.dropout < 1:
        problems.append(f"dropout: expected a number from 0 to below 1, got {plan.dropout}")
    problems += row_problems(model, plan.rows)
    paths = {path for path, _ in model.named_modules() if path}
    for name in plan.train:
        inside = [
            each for each in (*plan.train, *(p.module for p in plan.adapted)) if each.startswith(f"{name}.")
        ]
        if name not in paths:
            problems.append(f"{name}: no such module to train")
        elif inside or plan.train.count(name) > 1 or name in {p.module for p in plan.adapted}:
            problems.append(f"{name}: trained in full, and what lies inside it is named too")
    return problems


def _overlaps(model: nn.Module, plan: Plan) -> list[str]:
    """A line for each projection that has rows of another one."""
    held: dict[tuple[str, str], list[tuple[int, int, Projection]]] = {}
    for p in plan.adapted:
        out = weight_shape(model.get_submodule(p.module), p.param)[0] // p.shared
        blocks_of_p = (block for each in p.apart(out) for block in pieces(each.rows))
        held.setdefault((p.module, p.param), []).extend((*block, p) for block in blocks_of_p)
    shared: dict[Projection, None] = {}
    for blocks in held.values():
        blocks.sort(key=lambda each: each[:2])
        shared |= {p: None for (_, stop, _), (start, _, p) in pairwise(blocks) if start < stop}
    return [f"{p.name}: its rows {p.rows} belong to another one too" for p in shared]


def frozen_names(names: Any) -> list[str]:
    if names not in ([], ["A"], ["B"]):
        raise ValueError(f"{names!r} are no frozen factors")
    return names


def tensor_problems(model: nn.Module, plan: Plan, header: Mapping[str, Entry]) -> list[str]:
    """A line for each tensor that is not what the plan asks for."""
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {}
    for p in plan.adapted:
        rank = plan[p].rank
        for anchor in ("", "0") if f"{p.name}.A0" in header else ("",):
            wanted[f"{p.name}.A{anchor}"] = (rank, p.in_features), True
            wanted[f"{p.name}.B{anchor}"] = (p.out_features, rank), True
        for key in ("start", "offset") if plan.dora else ():
            wanted[f"{p.name}.magnitude.{key}"] = (p.out_features,), True
    for name in plan.train:
        for key, tensor in model.get_submodule(name).state_dict().items():
            wanted[f"{TRAINED}{name}.{key}"] = tuple(tensor.shape), tensor.is_floating_point()
    wanted |= wanted_tensors(plan)
    problems = []
    for name, (shape, floating) in wanted.items():
        entry = header.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif (entry.shape, entry.dtype in FLOATS) != (shape, floating):
            problems.append(
                f"{name}: expected {shape}{' floating point' * floating}, got {entry.shape} {entry.dtype}"
            )
    unknown = sorted(header.keys() - wanted.keys())
    return problems + ([f"it holds tensors that its plan does not name: {unknown[:5]}"] if unknown else [])


def weight_problems(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """A line for each projection whose weights are not those of the base that the adapter was made for."""
    there = {}
    for p in plan.adapted:
        values = saved[p.name]["sample"]
        numbers = None if values is None else torch.tensor([float(value) for value in values])
        there[p] = Sample(str(saved[p.name]["dtype"]), None, numbers)
    here = {p: of_projection(holder(model, p), p) for p in plan.adapted}
    found = differences(here, there)
    return [f"{p.name}: {text}" for p, text in found.items()]


def samples_of_the_rest(root: nn.Module, plan: Plan) -> dict[str, Sample]:
    """Samples of what of the base is neither adapted nor trained in full, by name; shared tensors once."""
    rows: Counter[tuple[str, str]] = Counter()
    for p in plan.adapted:
        rows[p.module, p.param] += p.out_features * p.shared
    found: dict[str, Sample] = {}
    seen: set[int] = set()
    aside, trained = left_aside(root, plan), under(plan.train)
    for path, hung in base_modules(root).items():
        if trained(path):
            continue
        module = original(hung)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if (path, name) in rows and rows[path, name] == weight_shape(module, name)[0]:
                continue  # wholly adapted, so it has a sample of its own
            sample = of_tensor(module, name, aside.get(id(tensor), ()))
            if sample is not None:
                found[f"{path}.{name}".lstrip(".")] = sample
    return found


def rest_problems(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """A line for each tensor that this model does not have as it was; of many, the first ones."""
    aside = left_aside(model, plan)
    modules = base_modules(model)
    problems = []
    for name, said in saved.items():
        path, _, leaf = name.rpartition(".")
        there, hung = Sample.from_json(said), modules.get(path)
        module = None if hung is None else original(hung)
        if module is None or (module._parameters.get(leaf) is None and module._buffers.get(leaf) is None):
            problems.append(f"{name}: the model has no such weight")
            continue
        without = aside.get(id(module._parameters.get(leaf)), ())
        if (here := of_tensor(module, leaf, without)) and (text := difference(here, there)):
            problems.append(f"{name}: {text}")
    more = len(problems) - SHOWN
    return problems if more <= 0 else [*problems[:SHOWN], f"and {more} more"]
