"""``lowrank merge``: adds an adapter to a checkpoint without loading the model.

Files are copied, and in the copies only the bytes of adapted weights change. All is checked before.
"""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.cli.models import configuration, tied
from lowrank.cli.placing import Matrix, Names, matrices
from lowrank.cli.saved import Saved, Update, read, whole
from lowrank.cli.shards import DTYPES, Stored, others, rewrite, stored_tensors, values_at
from lowrank.files import AdapterError, make_folder, sync, unused_name
from lowrank.linalg.rows import lie_within, view
from lowrank.models.fingerprint import OF_PROJECTION, Sample, difference, spread
from lowrank.progress import bar

CONFIG = "config.json"
Change = Callable[[Tensor, int], Tensor]


def run(options: Namespace) -> None:
    saved = read(options.adapter)
    changed = merge_files(options.base, saved, options.out, progress=not options.quiet)
    if options.json:
        print(json.dumps({"out": str(options.out), "changed": changed}, indent=1))
    else:
        print(f"{options.out}: {len(changed)} tensors changed, all others are the same bytes")


def merge_files(base: Path, saved: Saved, out: Path, *, progress: bool = True) -> list[str]:
    """Writes the checkpoint in ``base`` with ``saved`` merged into it to the new folder ``out``.

    ΔW is added in fp32, and rounded once to the dtype of the file. Returns the names of the tensors that
    changed. At most a few slices of one tensor are in memory.

    Raises:
        AdapterError: the adapter does not fit the checkpoint, or was made for one with other values; all
            problems are listed, and nothing is written.
        ValueError: ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: name a new folder")
    stored = stored_tensors(base)
    changes = _changes(stored, saved)
    _check_tied(base, stored, {step.tensor for step in changes}, saved)
    make_folder(out.absolute().parent)
    room = unused_name(out.absolute())
    room.mkdir()
    try:
        for path in others(base):
            shutil.copyfile(path, room / path.name)
        files = sorted({each.file for each in stored.values()})
        total = len(files) + len(changes)
        shown = bar(None, "merging", total=total, shown=progress, delay=2, leave=False)
        with shown:
            for file in files:
                shutil.copyfile(file, room / file.name)
                shown.update()
                for step in changes:
                    if step.stored.file == file:
                        shown.set_postfix_str(step.tensor, refresh=False)
                        rewrite(room / file.name, step.stored, step.change)
                        shown.update()
                sync(room / file.name)
        if out.exists():
            out.rmdir()
        os.replace(room, out)
        sync(out.absolute().parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return sorted({step.tensor for step in changes})


class _Step(NamedTuple):
    """A change of a tensor, or of a matrix of it."""

    tensor: str
    stored: Stored
    change: Change


def _changes(stored: Mapping[str, Stored], saved: Saved) -> list[_Step]:
    """What to do to which tensor; raises AdapterError with all that does not fit."""
    if any(update.magnitudes is not None for update in saved.updates.values()):
        raise AdapterError(f"{saved.path} has magnitudes (DoRA): load the model and use lowrank.merge")
    changes: list[_Step] = []
    problems = []
    names = Names(stored)
    for weight, updates in saved.by_weight().items():
        try:
            for matrix in matrices(stored, names, weight, updates):
                changes.append(_Step(matrix.tensor, matrix.stored, _addition(matrix)))
        except AdapterError as error:
            problems.append(str(error))
    for wanted, tensor in saved.trained.items():
        try:
            name = names.find(wanted)
            changes.append(_Step(name, stored[name], _replacement(name, stored[name], tensor)))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(f"{saved.path} does not fit this checkpoint:\n  " + "\n  ".join(problems))
    return changes


def _check_tied(base: Path, stored: Mapping[str, Stored], changed: Collection[str], saved: Saved) -> None:
    """Raises AdapterError where another module of the model has a changed weight too.

    The model is built for that, without weights, so only where a weight has as many rows as there are tokens.
    """
    config = configuration(base) if (base / CONFIG).is_file() else {}
    parts = [part for part in (config, *config.values()) if isinstance(part, dict) and "vocab_size" in part]
    doubtful = {name for name in changed if any(p["vocab_size"] in stored[name].shape for p in parts)}
    if not doubtful or all(part.get("tie_word_embeddings") is False for part in parts):
        return
    try:
        shared = tied(base)
    except Exception as error:
        raise AdapterError(
            f"{base}: only the model's class says whether {', '.join(sorted(doubtful))} is tied to another "
            f"weight, and it could not be asked ({error}): load the model and use lowrank.merge"
        ) from error
    names, problems = Names(stored), []
    for each in shared:
        for name in each:
            with suppress(AdapterError):
                if (found := names.find(name)) in doubtful:
                    others = ", ".join(other for other in each if other != name)
                    problems.append(f"{found}: it is tied to {others}, which merging would change too")
    if problems:
        raise AdapterError(
            f"{saved.path} changes tied weights; load the model and use lowrank.merge(model, untie=True):\n  "
            + "\n  ".join(dict.fromkeys(problems))
        )


def _replacement(name: str, stored: Stored, tensor: Tensor) -> Change:
    if stored.shape != tuple(tensor.shape):
        raise AdapterError(f"{name}: expected the shape {tuple(tensor.shape)}, got {stored.shape}")
    return lambda values, first: tensor[first : first + len(values)].to(values.dtype)


@dataclass(frozen=True)
class _Addition:
    """Adds ``B·A`` to a weight, which may lie transposed. Rows without an update keep their bytes."""

    A: Tensor
    B: Tensor
    transposed: bool

    def __call__(self, values: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(values))
        delta = self.A.mT[rows] @ self.B.mT if self.transposed else self.B[rows] @ self.A
        return torch.where(delta == 0, values, values + delta)


def _addition(matrix: Matrix) -> Change:
    name, stored, updates = matrix.name, matrix.stored, matrix.updates
    if stored.dtype not in DTYPES:
        raise AdapterError(f"{name}: it is {stored.dtype}; a quantized weight cannot take an update")
    if len(stored.shape) != 2:
        raise AdapterError(
            f"{name}: it is no matrix but {stored.shape}; load the model and use lowrank.merge"
        )
    fitting = [turned for turned in (False, True) if _fits(stored, updates, turned)]
    said = {update.transposed for update in updates} - {None}
    fitting = [turned for turned in fitting if not said or turned in said]
    if not fitting:
        wanted = {(*update.rows[:2], update.pair.A.shape[1]) for update in updates}
        raise AdapterError(
            f"{name}: expected rows and columns {sorted(wanted)}, got the shape {stored.shape}"
        )
    seen = {turned: _difference(stored, updates, turned) for turned in fitting}
    right = [turned for turned in fitting if seen[turned] is None]
    if not right:
        raise AdapterError(f"{name}: {seen[fitting[0]]}")
    transposed = right[0]
    pair = whole(list(updates), stored.shape[1] if transposed else stored.shape[0])
    return _Addition(pair.A.float(), pair.B.float(), transposed)


def _fits(stored: Stored, updates: Sequence[Update], transposed: bool) -> bool:
    rows, columns = reversed(stored.shape) if transposed else stored.shape
    return all(lie_within(u.rows, rows) and u.pair.A.shape[1] == columns for u in updates)


def _difference(stored: Stored, updates: Sequence[Update], transposed: bool) -> str | None:
    """How the weight differs from the one that the adapter was made for; None where it does not."""
    for update in updates:
        if update.sample is None or update.sample.values is None:
            continue
        there = replace(update.sample, values=update.sample.values[_own_part(update)])
        places = _places(stored, transposed, update)
        here = Sample(str(DTYPES[stored.dtype]).removeprefix("torch."), None, values_at(stored, places))
        if problem := difference(here, there):
            return problem
    return None


def _taken(update: Update) -> Tensor:
    """Places of the sample's values, counted row by row in the update's rows, as `fingerprint` takes them."""
    numbers = update.pair.B.shape[0] * update.pair.A.shape[1]
    return spread(numbers, max(OF_PROJECTION, update.shared))


def _own_part(update: Update) -> slice:
    """Which values of the sample are of this expert: those of one expert follow those of another."""
    if update.shared == 1:
        return slice(None)
    counts = [len(_taken(update)[e :: update.shared]) for e in range(update.expert + 1)]
    return slice(sum(counts[:-1]), sum(counts))


def _places(stored: Stored, transposed: bool, update: Update) -> Tensor:
    """Where in the file the values lie that a sample of these rows of ``(out, in)`` takes."""
    out, columns = reversed(stored.shape) if transposed else stored.shape
    lines = view(torch.arange(out), update.rows).flatten()
    taken = _taken(update)[update.expert :: update.shared]
    line, column = lines[taken // columns], taken % columns
    return column * stored.shape[1] + line if transposed else line * columns + column
