"""How a batch is divided into its examples, whatever type it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lowrank.calibration.examples import divide


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Own:
    x: Tensor


def batches(batch: Any, tokens: Tensor | None = None) -> list[Any]:
    return [example.batch for example in divide(batch, tokens, 0)]


X, Y = torch.arange(6).view(2, 3), torch.tensor([7, 8])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, [X[:1], X[1:]]),
        ((X, Y), [(X[:1], Y[:1]), (X[1:], Y[1:])]),
        (Pair(X, Y), [Pair(X[:1], Y[:1]), Pair(X[1:], Y[1:])]),
        ([X, {"y": Y}], [[X[:1], {"y": Y[:1]}], [X[1:], {"y": Y[1:]}]]),
        ({"x": X, "texts": ["a", "b"]}, [{"x": X[:1], "texts": ["a"]}, {"x": X[1:], "texts": ["b"]}]),
        (
            {
                "x": X,
                "common": torch.ones(1, 5),
                "size": torch.tensor(2.0),
                "return_loss": True,
                "none": None,
            },
            [
                {
                    "x": x,
                    "common": torch.ones(1, 5),
                    "size": torch.tensor(2.0),
                    "return_loss": True,
                    "none": None,
                }
                for x in X.split(1)
            ],
        ),
        (
            {"input_ids": X, "position_ids": torch.arange(18).view(3, 2, 3)},
            [
                {"input_ids": X[i : i + 1], "position_ids": torch.arange(18).view(3, 2, 3)[:, i : i + 1]}
                for i in range(2)
            ],
        ),
        (
            {"input_ids": X[:1], "pixels": torch.ones(9, 4)},
            [{"input_ids": X[:1], "pixels": torch.ones(9, 4)}],
        ),
    ],
    ids=["tensor", "tuple", "named tuple", "nested", "texts", "common", "rotary", "one with patches"],
)
def test_parts_are_taken_along_the_examples(batch: Any, expected: list[Any]) -> None:
    found = batches(batch)
    assert len(found) == len(expected) and all(map(same, found, expected))


def test_three_rotary_axes_of_three_examples() -> None:
    positions = torch.arange(27).view(3, 3, 3)
    found = batches({"input_ids": torch.ones(3, 3), "position_ids": positions})
    assert all(torch.equal(each["position_ids"], positions[:, i : i + 1]) for i, each in enumerate(found))


def test_the_type_of_a_mapping_is_kept_and_the_batch_as_it_was() -> None:
    batch = BatchEncoding({"input_ids": X})
    found = batches(batch)
    assert [type(each) for each in found] == [BatchEncoding] * 2
    assert torch.equal(found[1].input_ids, X[1:]) and torch.equal(batch.input_ids, X)


def test_an_object_of_ones_own_is_one_example() -> None:
    own = Own(X)
    assert batches(own)[0] is own and len(batches(own)) == 1


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"input_ids": X, "pixels": torch.ones(9, 4)}, "expected 2 .* got input_ids: 2, pixels: 9"),
        ({"x": X, "graph": Own(X)}, "expected 2 .* got x: 2, graph: 0"),
        ((X, torch.ones(5)), r"expected 5 .* got \[0\]: 2, \[1\]: 5"),
    ],
)
def test_what_cannot_be_divided_says_why(batch: Any, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"calibration batch 0 cannot be divided .*{got}; pass batches of one"
    ):
        divide(batch, None, 0)
    with pytest.raises(ValueError, match="expected 2 .* got Own"):
        divide(Own(X), torch.ones(2, 3, dtype=torch.bool), 0)


IDS = torch.arange(8).view(1, 8)


@pytest.mark.parametrize(
    ("packing", "lengths"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])}, [3, 2, 3]),
        ({"position_ids": torch.tensor([[4, 5, 6, 0, 1, 2, 3, 4]])}, [3, 5]),
        ({"position_ids": torch.arange(8)[None]}, [8]),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])}, [3, 2, 3]),
        # padding: on the left, on the right, and on both sides of two
        ({"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]]), "attention_mask": (IDS > 1).long()}, [8]),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0]]), "attention_mask": (IDS < 5).long()}, [8]),
        (
            {
                "position_ids": torch.tensor([[0, 0, 1, 2, 0, 1, 0, 0]]),
                "attention_mask": ((IDS > 0) & (IDS < 6)).long(),
            },
            [4, 4],
        ),
        # a tensor that is not (batch, tokens, ...): the row is the example
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]), "image": torch.ones(1, 3, 4, 4)}, [8]),
    ],
)
def test_packed_rows(packing: dict[str, Tensor], lengths: list[int]) -> None:
    tokens = IDS > 0
    found = divide({"input_ids": IDS, "cu_seq_lens_q": torch.zeros(1, 8), **packing}, tokens, 0)
    assert [each.batch["input_ids"].shape[1] for each in found] == lengths
    assert torch.equal(torch.cat([each.batch["input_ids"] for each in found], 1), IDS)
    assert torch.equal(torch.cat([each.tokens for each in found if each.tokens is not None], 1), tokens)
    assert all("cu_seq_lens_q" not in each.batch for each in found) == (len(lengths) > 1)
