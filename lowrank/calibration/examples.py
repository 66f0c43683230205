"""A batch as its examples, each a batch of its own: what a statistic of examples is measured on.

It knows how batches are laid out, and nothing of models or statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from torch import Tensor

from lowrank.batches import IGNORED_LABEL

PACKING = frozenset("seq_idx cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split())
"""What tells the sequences of a packed row apart, and has no meaning for one of them."""

PLAIN = (str, bytes, bool, int, float, complex, type(None))


@dataclass(frozen=True)
class Example:
    """A batch of one example; ``tokens`` (1, tokens) bool says which of its tokens count, if a mask does."""

    batch: Any
    tokens: Tensor | None = None


def divide(batch: Any, tokens: Tensor | None, number: int) -> list[Example]:
    """The examples of calibration batch ``number``, whose mask is ``tokens`` (batch, tokens).

    The first dimension of a tensor, in a mapping or a sequence or alone, is that of the examples; a tensor
    whose first dimension is 1 belongs to all of them, and so does a number. A list of strings has one for
    each. Padding stays. A row in which several sequences are packed is as many examples if its
    ``position_ids`` start again at 0, or its ``seq_idx`` changes, and all tensors are (batch, tokens, ...);
    otherwise the row is one. A batch of any other type is one example.

    Raises ValueError where the parts differ in the number of examples.
    """
    sizes = dict(_sizes(batch, ""))
    size = _told(batch, tokens) or max(sizes.values(), default=1)
    if size <= 1:
        return list(_sequences(Example(batch, tokens)))
    if not sizes or set(sizes.values()) - {1, size}:
        found = ", ".join(f"{name or 'the batch'}: {each}" for name, each in sizes.items())
        raise ValueError(
            f"calibration batch {number} cannot be divided into examples, which are measured one by one: "
            f"expected {size} (or 1) as first dimension everywhere, got {found or type(batch).__name__}; "
            "pass batches of one example"
        )
    rows = [None if tokens is None else tokens[i : i + 1] for i in range(size)]
    alone = [Example(_taken(batch, "", i, size), row) for i, row in enumerate(rows)]
    return [sequence for example in alone for sequence in _sequences(example)]


def has_no_label(batch: Any, *, shifted: bool = False) -> bool:
    """Are all integer ``labels`` ignored? ``shifted``: all but the first, which no causal model predicts."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    if shifted and labels.ndim > 1:
        labels = labels[:, 1:]
    return bool((labels == IGNORED_LABEL).all())


def _told(batch: Any, tokens: Tensor | None) -> int | None:
    """How many examples there are, if the mask or the text says so."""
    if tokens is not None:
        return len(tokens)
    text = batch.get("input_ids", batch.get("inputs_embeds")) if isinstance(batch, Mapping) else None
    return len(text) if isinstance(text, Tensor) and text.ndim > 1 else None


def _sizes(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """By name, the number of examples in each part that has one; 0 where it cannot be told."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield name, value.shape[_dimension(name, value)]
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _sizes(each, f"{name}.{key}".lstrip("."))
    elif _are_strings(value):
        yield name, len(value)
    elif _is_sequence(value):
        for i, each in enumerate(value):
            yield from _sizes(each, f"{name}[{i}]")
    elif name and not isinstance(value, PLAIN):
        yield name, 0


def _taken(value: Any, name: str, i: int, size: int) -> Any:
    """Example ``i`` of ``size`` in the part ``name``, as a batch of one."""
    if isinstance(value, Tensor):
        dimension = _dimension(name, value)
        return value.narrow(dimension, i, 1) if value.ndim and value.shape[dimension] == size else value
    if isinstance(value, Mapping):
        return _replaced(value, {key: _taken(each, str(key), i, size) for key, each in value.items()})
    if _are_strings(value):
        return value[i : i + 1] if len(value) == size else value
    if _is_sequence(value):
        taken = [_taken(each, "", i, size) for each in value]
        return type(value)(*taken) if hasattr(value, "_fields") else type(value)(taken)
    return value


def _dimension(name: str, value: Tensor) -> int:
    """Where the examples are: first, but for multimodal rotary positions (3, batch, tokens)."""
    return 1 if name.endswith("position_ids") and value.ndim == 3 else 0


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _is_sequence(value: Any) -> bool:
    named = isinstance(value, tuple) and hasattr(value, "_fields") and not hasattr(value, "to")
    return type(value) in (list, tuple) or named


def _replaced(batch: Mapping[Any, Any], fields: dict[Any, Any]) -> Any:
    """A mapping of the same type, such as a BatchEncoding, with ``fields`` only."""
    if not isinstance(batch, MutableMapping):
        return fields
    same = copy.copy(batch)
    same.clear()
    same.update(fields)
    return same


def _sequences(example: Example) -> Iterator[Example]:
    """The packed sequences of one row, where they can be told and cut; else ``example``."""
    starts, length = _starts(example.batch)
    if len(starts) < 2:
        yield example
        return
    fields = {key: value for key, value in example.batch.items() if key not in PACKING}
    cut = {key for key, value in fields.items() if isinstance(value, Tensor) and value.ndim}
    masks = [] if example.tokens is None else [example.tokens]
    if any(tuple(each.shape[:2]) != (1, length) for each in [*(fields[key] for key in cut), *masks]):
        yield example
        return
    for start, end in pairwise([*starts, length]):
        own = {key: value[:, start:end] if key in cut else value for key, value in fields.items()}
        tokens = None if example.tokens is None else example.tokens[:, start:end]
        yield Example(_replaced(example.batch, own), tokens)


def _starts(batch: Any) -> tuple[list[int], int]:
    """Where the sequences of one row start, and the row's length; padding before one belongs to it."""
    if not isinstance(batch, Mapping):
        return [], 0
    numbers, positions, mask = map(batch.get, ("seq_idx", "position_ids", "attention_mask"))
    if _is_row(numbers):
        return [0, *((numbers[0].diff() != 0).nonzero().flatten() + 1).tolist()], numbers.shape[1]
    if not _is_row(positions):
        return [], 0
    real = mask[0] > 0 if _is_row(mask) and mask.shape == positions.shape else positions[0] >= 0
    first = real.nonzero().flatten()[:1].tolist()
    begun = ((positions[0] == 0) & real).nonzero().flatten().tolist()
    return [0, *(start for start in begun if [start] != first)], positions.shape[1]


def _is_row(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and len(value) == 1
