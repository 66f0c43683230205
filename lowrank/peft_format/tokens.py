"""Rows of embeddings that train alone, as PEFT's ``trainable_token_indices``: whole rows, no offsets.

PEFT moves the same rows of what its tables call tied to the input embedding, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.files import FLOATS, Entry
from lowrank.layers.tree import base_modules, hung_at, original
from lowrank.models.tokens import TokenRows, row_problems
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.factors import factor_problem
from lowrank.peft_format.folder import Contents
from lowrank.wrapping.rows import offsets_from, offsets_of, start_tensors, weight_of

KEY = ".token_adapter.trainable_tokens_delta"


def written_rows(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The rows that the adapter ``name`` trains as they are now, by their names in the base model."""
    starts = start_tensors(root, name).values()
    return {
        f"{rows.module}{KEY}": (start.to(tokens.offsets.dtype) + tokens.offsets.detach()).cpu()
        for (rows, tokens), start in zip(offsets_of(root, name).items(), starts, strict=True)
    }


def check_rows_written(folder: Path, root: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the files in ``folder`` have other rows."""
    contents = Contents.read(folder, root)
    read = contents.tensors().read
    ids = [len(each) for each in dict(contents.config.tokens).values()]  # type: ignore[arg-type]
    if ids != list(map(len, rows.values())) or not all(torch.equal(read[key], rows[key]) for key in rows):
        raise ValueError("the written files give other rows of the embeddings: nothing was exported")


def indices(rows: Iterable[TokenRows]) -> dict[str, Any]:
    """What the configuration says of them; nothing where there are none."""
    said = {each.module: list(each.ids) for each in rows}
    return {"trainable_token_indices": said} if said else {}


def peft_problems(model: nn.Module, rows: Iterable[TokenRows], adapted: Collection[str]) -> list[str]:
    """A line for each of ``rows`` that PEFT would train otherwise than this library.

    ``adapted`` are the paths of the modules that the same adapter adapts; ``model`` may be wrapped.
    """
    modules = {path: original(hung) for path, hung in base_modules(model).items() if path}
    problems = []
    for each in rows:
        module, weight = modules[each.module], weight_of(model, each)
        shared = {p for p, other in modules.items() if weight in set(other._parameters.values())}
        followers = {p for p in shared if modules[p] is not module}
        theirs = set(_tied_by_peft(model, module)) - {p for p in shared if modules[p] is module}
        others = [p for p in modules if p.endswith(each.module) and modules[p] is not module]
        if why := factor_problem(module):
            problems.append(f"{each.module}: {why}")
        if others:
            problems.append(
                f"{each.module}: PEFT compares the ends of names, and would train {others[0]} too"
            )
        if followers != theirs:
            problems.append(
                f"{each.module}: the modules that have its weight are {sorted(followers)}, and those that "
                f"PEFT takes for tied to it {sorted(theirs)}"
            )
        for path in sorted(followers & theirs):
            if getattr(modules[path], "bias", None) is not None:
                problems.append(f"{path}: PEFT leaves out the bias of a head that is tied to such rows")
            if path in adapted:
                problems.append(f"{path}: PEFT cannot adapt it and move rows of its weight")
    return problems


def _tied_by_peft(model: nn.Module, embedding: nn.Module) -> Iterator[str]:
    """Paths of the modules that PEFT takes for tied to ``embedding``, going by transformers' tables."""
    config, get = getattr(model, "config", None), getattr(model, "get_input_embeddings", None)
    if not getattr(config, "tie_word_embeddings", False) or not callable(get):
        return
    if original(get()) is not embedding:
        return
    for path, module in base_modules(model).items():
        table = getattr(original(module), "_tied_weights_keys", None) or {}
        for key in table:
            source = f"{path}.{table[key]}".lstrip(".") if isinstance(table, dict) else None
            if source is None or _holds(model, source.rpartition(".")[0], embedding):
                yield f"{path}.{key}".lstrip(".").rpartition(".")[0]


def _holds(model: nn.Module, path: str, embedding: nn.Module) -> bool:
    """Is the weight at ``path`` that of ``embedding``?"""
    try:
        found = original(hung_at(model, path))._parameters.get("weight")
    except KeyError:
        return False
    return found is embedding._parameters["weight"]


# -- reading ------------------------------------------------------------------------------------------


def rows_in(
    model: nn.Module, config: PeftConfig, others: Mapping[str, Entry], adapted: Collection[str]
) -> tuple[list[TokenRows], list[str]]:
    """The rows that a folder for the base ``model`` trains, and a line for each that does not fit.

    ``others`` are the tensors of the folder that are no factors.
    """
    named = {path: module for path, module in base_modules(model).items() if path}
    left = {name.removesuffix(KEY): entry for name, entry in others.items() if name.endswith(KEY)}
    rows: list[TokenRows] = []
    absent, problems = [], []
    for end, ids in _said(model, config).items():
        hits = [path for path in named if path.endswith(end) and path in left]
        if not hits:
            absent.append((end, tuple(sorted(ids))))
        for path in hits:
            entry = left.pop(path)
            if not isinstance(named[path], nn.Embedding):
                problems.append(f"{path}: trainable_token_indices of what is no embedding is not supported")
            elif len(entry.shape) != 2 or entry.shape[0] != len(ids) or entry.dtype not in FLOATS:
                problems.append(f"{path}: its rows are {entry.shape} {entry.dtype}, expected {len(ids)}")
            else:
                rows.append(TokenRows(path, tuple(sorted(ids)), entry.shape[1]))
    problems += [
        f"{path}: the folder has rows of it, which trainable_token_indices does not name" for path in left
    ]
    problems += row_problems(model, rows)
    for end, same in () if problems else absent:
        # Of tied modules PEFT saves one.
        held = [weight_of(model, each) for each in rows if each.ids == same]
        ends = [module._parameters.get("weight") for path, module in named.items() if path.endswith(end)]
        if not ends or any(all(weight is not each for each in held) for weight in ends):
            problems.append(f"{end}: trainable_token_indices names it, but the folder has no rows of it")
    return rows, problems or peft_problems(model, rows, adapted)


def read_rows(
    model: nn.Module, config: PeftConfig, rows: Iterable[TokenRows], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The offsets from the rows that ``model`` has, by module path."""
    said, found = _said(model, config), {}
    for each in rows:
        ids = next(ids for end, ids in said.items() if each.module.endswith(end))
        values = tensors[f"{each.module}{KEY}"][torch.tensor(ids).argsort()]
        found[each.module] = offsets_from(weight_of(model, each), each, values)
    return found


def _said(model: nn.Module, config: PeftConfig) -> Mapping[str, tuple[int, ...]]:
    """The ids by the end of a path; a bare list means the input embedding."""
    if isinstance(config.tokens, Mapping):
        return config.tokens
    get = getattr(model, "get_input_embeddings", None)
    module = get() if callable(get) else None
    path = next((path for path, each in model.named_modules() if each is module), "embed_tokens")
    return {path: config.tokens}
