"""Adapts a model as a PEFT folder says.

What it does not understand it refuses by name, before the model is touched. It needs no PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.allocate.base import Allocation
from lowrank.files import FLOATS, AdapterError
from lowrank.layers.adapter import Adapter
from lowrank.layers.bases import master_dtype
from lowrank.models.beside import further
from lowrank.models.kinds import kind_of
from lowrank.models.projections import Projection, Role, scan
from lowrank.models.storage import weight_shape
from lowrank.models.tokens import check_rows
from lowrank.notices import logger
from lowrank.peft_format.experts import blocks_of_experts, mismatch
from lowrank.peft_format.factors import BASE, factor_key, factor_problem, factor_shapes
from lowrank.peft_format.folder import Contents, Tensors, ancestors, base_paths, places
from lowrank.peft_format.names import present_name
from lowrank.peft_format.pairs import reduced
from lowrank.peft_format.tokens import KEY, read_rows, rows_in
from lowrank.plan import Plan
from lowrank.wrapping.checks import check_beside, check_layers
from lowrank.wrapping.install import bare, device_beside
from lowrank.wrapping.magnitudes import magnitude_of


def import_peft(
    model: nn.Module, path: str | Path, name: str = "default", *, train: bool = True
) -> nn.Module:
    """Adapts ``model`` in place as the PEFT folder ``path`` says, and returns it.

    ``model`` may hold adapters already: the new one goes beside them, and acts once `set_adapters` names it.

    Both factors are trainable afterwards, in fp32. A fused weight gets one adapter over all its rows, as in
    PEFT, and so does each expert of a tensor of experts. A rank above min(in, out) is brought down to that,
    which changes ΔW by rounding only. Names that transformers has changed since the adapter was saved are
    translated. An embedding or output head in the folder without being named in its configuration
    (``save_embedding_layers``) counts as trained in full where it differs from the model's. The modules that
    are replaced in full are named in the log "lowrank".

    Args:
        name: of the adapter in ``model``.
        train: also replace the modules that were trained in full. If False, the model keeps its own.

    Raises:
        AdapterError: the folder is missing or damaged, was made for another base (every mismatch is
            listed), or uses a feature that is not supported (it is named). The model is untouched then.
        ValueError: the name is taken.
    """
    with bare(check_beside(model, name)) as fittings:
        plan, adapters, states, offsets = _read(fittings.root, path, train)
        if plan.train:
            logger.warning("%s replaces these modules in full: %s", path, ", ".join(plan.train))
        fittings.install(name, plan, adapters, offsets)
        fittings.load_copies(name, states)
    return model


def _read(
    model: nn.Module, path: str | Path, train: bool
) -> tuple[Plan, dict[Projection, Adapter], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What the folder holds for the base ``model``: plan, adapters, states of trained modules, offsets."""
    contents = Contents.read(Path(path), model, present_name(model))
    known = _whole_weights(model)
    trained, saved, problems = _trained(model, contents) if train else ([], [], [])
    rows, strange = rows_in(model, contents.config, contents.others, contents.layers.keys())
    problems = _mismatches(model, contents, known) + problems + strange
    if problems:
        raise AdapterError(f"{contents.folder} was made for another base:\n  " + "\n  ".join(problems))
    tensors = contents.tensors()
    pairs = {p: tensors.pair(path) for path, p in known.items() if path in contents.layers}
    for place, experts in contents.experts.items():
        pairs |= dict(blocks_of_experts(place, experts.stack, tensors.pair(place)))
    changed = [
        path
        for path in contents.layers
        if f"{path}{BASE}" in tensors.read
        and not _equal(model.get_submodule(path), tensors, f"{path}{BASE.removesuffix('.weight')}")
    ]
    if changed:
        raise AdapterError(
            f"{contents.folder} was made for a base with other embeddings: {', '.join(changed)}; load the "
            "base as it was when the adapter was saved"
        )
    trained += [path for path in saved if not _equal(model.get_submodule(path), tensors, path)]
    try:
        check_layers(model, list(pairs), trained, contents.config.dropout, dora=contents.config.dora)
        check_rows(rows, list(pairs), trained)
    except ValueError as error:
        raise AdapterError(f"{contents.folder} cannot be put on this model: {error}") from error

    allocations, adapters = {}, {}
    for p, whole in pairs.items():
        pair = reduced(whole)
        allocations[p] = Allocation(pair.rank, pair.scaling)
        weight = model.get_submodule(p.module)._parameters[p.param]
        assert weight is not None
        state = {"A": pair.A.to(master_dtype(weight.dtype)), "B": pair.B.to(master_dtype(weight.dtype))}
        adapters[p] = Adapter.from_state(state, pair.scaling, rows=p.rows).to(device_beside(model, p))
        if contents.config.dora:
            adapters[p].magnitude = magnitude_of(model, p, adapters[p], tensors.magnitude(p.module))
    config = contents.config
    plan = Plan(allocations, dropout=config.dropout, train=trained, dora=config.dora, rows=rows)
    offsets = read_rows(model, config, rows, tensors.read)
    states = {name: tensors.state(name, model.get_submodule(name).state_dict()) for name in trained}
    return plan, adapters, states, offsets


def _whole_weights(model: nn.Module) -> dict[str, Projection]:
    """The weights of the linear modules that can be adapted by path, each as one projection."""
    wholes: dict[str, Projection] = {}
    for p, doubt in {**scan(model), **further(model)}.items():
        if doubt and not doubt.adaptable:
            continue
        if p.param == "weight" and p.module not in wholes:
            rows, columns = weight_shape(model.get_submodule(p.module), "weight")
            alone = p.rows == (0, rows)
            wholes[p.module] = (
                p if alone else Projection(p.module, "weight", (0, rows), Role.OTHER, columns, rows)
            )
    return wholes


def _mismatches(model: nn.Module, contents: Contents, known: Mapping[str, Projection]) -> list[str]:
    """A line for whatever of the factors does not fit the model or the configuration."""
    config, problems, hung = contents.config, [], places(model)
    config.check_cost(known.keys() & contents.layers.keys())
    for path, entries in contents.layers.items():
        if path in contents.experts:
            why = mismatch(contents.experts[path], contents.layers[path], config.rank(path), contents.old)
            if not why and hung[model.get_submodule(path.rpartition(".")[0])] > 1:
                why = "it is used in several places, of which PEFT adapts one"
            problems += [f"{path}: {why}"] if why else []
            continue
        if path not in known:
            problems.append(f"{path}: the model has no such linear module, embedding or convolution")
            continue
        rank, (out, columns) = config.rank(path), known[path].shape
        module = model.get_submodule(path)
        wanted = factor_shapes(module, rank, (out, columns))
        shapes = {factor: entry.shape for factor, entry in sorted(entries.items())}
        if shapes != wanted:
            problems.append(f"{path}: expected factors {wanted}, got {shapes}")
        elif any(f"{path}.{factor_key(module, each)}" not in contents.keys for each in entries):
            problems.append(
                f"{path}: its factors have the names of another kind of layer than {type(module).__name__}"
            )
        elif any(entry.dtype not in FLOATS for entry in entries.values()):
            problems.append(f"{path}: its factors are not floating point")
        elif config.dora and kind_of(module):
            problems.append(f"{path}: magnitudes (DoRA) of a {type(module).__name__} are not supported")
        elif (found := _magnitudes(contents, path)) != ((out,) if config.dora else None):
            problems.append(f"{path}: its magnitudes (DoRA) are {found}, and use_dora is {config.dora}")
        elif rank > 2 * (out + columns):
            problems.append(
                f"{path}: rank {rank} is far more than a weight of shape {(out, columns)} can use"
            )
        elif hung[module] > 1:
            problems.append(f"{path}: it is used in several places, of which PEFT adapts one")
        elif kind_of(module) and (why := factor_problem(module)):
            problems.append(f"{path}: {why}")
        elif config.lists_targets and not config.adapts(path):
            problems.append(f"{path}: target_modules does not name it, so PEFT would not adapt it")
    absent = [place for place in contents.experts if place not in contents.layers]
    problems += [
        f"{place}: target_parameters names it, but the folder has no factors for it" for place in absent
    ]
    strange = contents.magnitudes.keys() - contents.layers.keys()
    problems += [
        f"{path}: the folder has magnitudes (DoRA) for it, but no factors" for path in sorted(strange)
    ]
    if config.lists_targets:
        absent = [path for path in known if config.adapts(path) and path not in contents.layers]
        problems += [
            f"{path}: target_modules names it, but the folder has no factors for it" for path in absent
        ]
    return problems


def _magnitudes(contents: Contents, path: str) -> tuple[int, ...] | None:
    """The shape of the magnitudes in the folder; None where there are none."""
    entry = contents.magnitudes.get(path)
    return None if entry is None else entry.shape


def _trained(model: nn.Module, contents: Contents) -> tuple[list[str], list[str], list[str]]:
    """Paths of the modules trained in full, of embeddings and heads that are there besides, and problems.

    A problem is a line for whatever of them does not fit.
    """
    problems = []
    left = {name: entry for name, entry in contents.others.items() if not name.endswith((BASE, KEY))}
    paths, hung = base_paths(model), places(model)
    named = [path for path in paths if contents.config.trains(path)]
    saved = [path for path in _embeddings(model) if path not in named and f"{path}.weight" in left]
    adapted = {each for layer in contents.layers for each in (layer, *ancestors(layer))}
    taken = {*named, *saved}
    for path in (*named, *saved):
        for name, tensor in paths[path].state_dict().items():
            entry = left.pop(f"{path}.{name}", None)
            if entry is None:
                problems.append(f"{path}.{name}: modules_to_save names it, but it is not in the folder")
            elif entry.shape != tuple(tensor.shape):
                problems.append(f"{path}.{name}: expected the shape {tuple(tensor.shape)}, got {entry.shape}")
            elif (entry.dtype in FLOATS) != tensor.is_floating_point():
                problems.append(f"{path}.{name}: expected the dtype {tensor.dtype}, got {entry.dtype}")
        if any(above in taken for above in ancestors(path)):
            problems.append(f"{path}: it lies inside another module that modules_to_save names")
        if path in adapted:
            problems.append(f"{path}: it is both adapted and trained in full")
        if hung[paths[path]] > 1:
            problems.append(f"{path}: it is used in several places, of which PEFT trains one")
    problems += [f"{name}: it is in the folder, but modules_to_save does not name it" for name in left]
    return [path for path in named if paths[path].state_dict()], saved, problems


def _embeddings(model: nn.Module) -> list[str]:
    """Paths of what ``save_embedding_layers`` may save: the embedding of the input and the output head."""
    layers = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # transformers' way to say that there is none
            layers.append(getattr(model, get)())
    return [path for path, module in model.named_modules() if path and any(module is each for each in layers)]


def _equal(module: nn.Module, tensors: Tensors, path: str) -> bool:
    """Does the folder hold the values for ``path`` that ``module`` has? On the meta device it has none."""
    own = module.state_dict()
    theirs = tensors.state(path, own)
    return all(
        not tensor.is_meta and torch.equal(theirs[name].to(tensor.dtype), tensor.cpu())
        for name, tensor in own.items()
    )
