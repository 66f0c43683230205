"""A cursor that is saved and loaded goes on with the batches that it would have had."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lowrank.train.data import Cursor, fingerprint
from lowrank.train.groups import Groups


class Shuffled:
    """Goes over ten numbers in another order each time, drawn as it goes from torch's generator."""

    def __iter__(self) -> Iterator[Any]:
        left = list(range(10))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[float]:
        return (i + random.random() for i in range(10))


class Counter:
    """An iterator that knows its place."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Counter:
        return self

    def __next__(self) -> int:
        self.at += 1
        return self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Epochs(RandomSampler):
    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(epoch)


def own_generator() -> DataLoader:
    return DataLoader(list(range(10)), shuffle=True, generator=torch.Generator().manual_seed(9))


SOURCES: list[Callable[[], Any]] = [
    Shuffled,
    Counter,
    own_generator,
    lambda: list(range(10)),
    lambda: iter(range(100)),
    lambda: DataLoader(list(range(10)), shuffle=True),
    lambda: DataLoader(list(range(10)), shuffle=True, num_workers=2),
    lambda: DataLoader(Stream(), batch_size=None),
    lambda: DataLoader(list(range(10)), sampler=Epochs(range(10))),
]


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("after", [1, 4, 5, 7])
def test_it_goes_on_with_the_same_batches(make: Callable[[], Any], after: int) -> None:
    """Ten batches, two a step: five steps an epoch."""
    random.seed(1)
    torch.manual_seed(1)
    cursor, seen, saved = Cursor(Groups.plan(make(), 1, 9, 2), seed=4), [], None
    for each in cursor:
        torch.rand(3)  # of the model
        seen.append(each)
        if len(seen) == after:
            saved = cursor.state_dict()
    random.seed(2)
    torch.manual_seed(2)
    other = Cursor(Groups.plan(make(), 1, 9, 2), seed=5)
    other.load_state_dict(saved)
    assert list(map(repr, other)) == list(map(repr, seen[after:]))


def test_the_order_of_the_data_does_not_depend_on_what_the_model_draws() -> None:
    orders = []
    for draws in (0, 3):
        orders.append([])
        for *_, group in Cursor(Groups.plan(Shuffled(), 1, 9, 2), seed=4):
            torch.rand(draws)
            orders[-1] += group
    assert orders[0] == orders[1]


def test_fewer_batches_are_refused() -> None:
    cursor = Cursor(Groups.plan(iter(range(10)), 1, 9, 1))
    for _ in zip(range(4), cursor, strict=False):
        pass
    other = Cursor(Groups.plan(iter(range(2)), 1, 9, 1))
    with pytest.raises(ValueError, match="saved after batch 4 of epoch 1, and the batches end after 2"):
        other.load_state_dict(cursor.state_dict())


def test_a_fingerprint_sees_values_shapes_and_types() -> None:
    batches = [
        {"x": torch.zeros(2)},
        {"x": torch.ones(2)},
        {"x": torch.zeros(2, 1)},
        {"x": torch.zeros(2).double()},
        {"y": torch.zeros(2)},
        [torch.zeros(2)],
        "x",
        None,
        {"x": torch.zeros(2, dtype=torch.bfloat16)},
    ]
    assert len(set(map(fingerprint, batches))) == len(batches)
    assert fingerprint({"x": torch.zeros(2)}) == fingerprint({"x": torch.zeros(2)})
