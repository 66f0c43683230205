"""How batches become steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from lowrank.train.data import Cursor
from lowrank.train.groups import Groups


class Stream(IterableDataset):
    """Data of no known length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Nothing(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(())


def test_epochs_with_a_last_step_of_what_is_left() -> None:
    groups = Groups.plan([10, 11, 12], epochs=2, steps=None, size=2)
    assert (groups.steps, groups.per_epoch) == (4, 2)
    assert list(Cursor(groups)) == [(1, 1, [10, 11]), (1, 3, [12]), (2, 1, [10, 11]), (2, 3, [12])]


def test_steps_go_over_the_batches_as_often_as_needed() -> None:
    assert list(Cursor(Groups.plan([10, 11], 1, 3, 1))) == [(1, 1, [10]), (1, 2, [11]), (2, 1, [10])]


def test_an_iterator_is_taken_from_once_and_no_further_than_needed() -> None:
    source = iter(range(5))
    assert [group for *_, group in Cursor(Groups.plan(source, 1, 2, 2))] == [[0, 1], [2, 3]]
    assert list(source) == [4]


@given(length=st.integers(1, 9), size=st.integers(1, 4), epochs=st.integers(1, 3))
def test_every_batch_is_used_once_an_epoch(length: int, size: int, epochs: int) -> None:
    groups = Groups.plan(range(length), epochs, None, size)
    seen = list(Cursor(groups))
    assert [batch for *_, group in seen for batch in group] == list(range(length)) * epochs
    assert len(seen) == groups.steps
    assert all(place == group[0] + 1 for _, place, group in seen)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_iterator_that_runs_dry_is_an_error(size: int) -> None:
    groups = Groups.plan(iter(range(2)), 1, 4, size)
    with pytest.raises(ValueError, match=f"ran out after {-(-2 // size)} of 4 steps .* give fewer steps"):
        list(Cursor(groups))


def test_a_stream_needs_steps_and_repeats() -> None:
    loader = DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match="this DataLoader does not know its length, so give steps="):
        Groups.plan(loader, 1, None, 1)
    assert [group for *_, group in Cursor(Groups.plan(loader, 1, 4, 1))] == [[0], [1], [2], [0]]


@pytest.mark.parametrize(
    ("batches", "epochs", "steps", "message"),
    [
        ([], 1, None, "there are no batches"),
        (DataLoader(Stream(), batch_size=None), 2, 3, "epochs= or steps=, not both"),
        (iter([1]), 1, None, "can be gone over once and has no length: give steps="),
        (iter([1]), 2, None, "can be gone over once"),
        (7, 1, None, "got int"),
        ({"input_ids": [1]}, 1, None, "expected a DataLoader, a list or an iterator, got dict"),
        (torch.ones(2), 1, None, "got Tensor"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    batches: object, epochs: int, steps: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Groups.plan(batches, epochs, steps, 1)


@pytest.mark.parametrize("batches", [DataLoader(Nothing(), batch_size=None), iter(())])
def test_an_empty_stream_is_an_error(batches: object) -> None:
    with pytest.raises(ValueError, match="there are no batches"):
        list(Cursor(Groups.plan(batches, 1, 2, 1)))
