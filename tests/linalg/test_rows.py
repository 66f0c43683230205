"""Rows of a matrix: what the two and the four numbers mean, and what is read and written by them."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from lowrank.linalg.rows import (
    add_,
    copy_,
    height,
    lie_within,
    pieces,
    repeating,
    shifted,
    spread,
    take,
    view,
)
from tests.helpers import numbers

ROWS = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda r: (r[0], r[0] + r[1])),
    st.builds(
        lambda start, size, gap, count: repeating(start, size, size + gap, count),
        st.integers(0, 5),
        st.integers(1, 4),
        st.integers(0, 5),
        st.integers(1, 4),
    ),
)


@given(ROWS, st.integers(0, 3))
def test_each_function_means_the_same_rows(rows: tuple[int, ...], more: int) -> None:
    own, limit = numbers(rows), rows[1] + more
    assert height(rows) == len(own) and lie_within(rows, limit) and not lie_within(rows, rows[1] - 1)
    assert [row for start, stop in pieces(rows) for row in range(start, stop)] == own
    assert numbers(shifted(rows, 7)) == [row + 7 for row in own]
    matrix = torch.randn(limit, 3)
    assert torch.equal(take(matrix, rows), matrix[own])
    assert torch.equal(take(matrix.T, rows, dim=1), matrix[own].T)
    assert view(matrix, rows).untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
    values = torch.randn(len(own), 3)
    assert torch.equal(
        spread(values.T, rows, limit), torch.zeros(limit, 3).index_copy(0, torch.tensor(own), values).T
    )
    for stored in (matrix.clone(), matrix.T.clone().T):  # as a Linear and as a Conv1D keep it
        add_(stored, rows, values)
        assert torch.equal(stored, matrix.index_add(0, torch.tensor(own), values))
        copy_(stored, rows, values)
        assert torch.equal(stored, matrix.index_copy(0, torch.tensor(own), values))


def test_heads_as_einops_has_them() -> None:
    matrix = torch.randn(4 * 3 * 8, 5)
    parts = rearrange(matrix, "(heads three d) i -> three (heads d) i", three=3, d=8)
    for i, part in enumerate(parts):
        assert torch.equal(take(matrix, repeating(8 * i, 8, 24, 4)), part)


def test_what_lies_side_by_side_is_a_block() -> None:
    assert repeating(4, 8, 8, 3) == (4, 28) and repeating(4, 8, 24, 1) == (4, 12)


@pytest.mark.parametrize(
    "rows",
    [
        (-1, 3),
        (3, 3),
        (4, 3),
        (0, 9),
        (0, 7, 0, 3),
        (0, 7, -1, 3),
        (0, 7, 3, 0),
        (0, 7, 3, 3),
        (0, 7, 1, 4),
        (0, 3, 1, 9),
    ],
)
def test_rows_that_are_none_lie_nowhere(rows: tuple[int, ...]) -> None:
    assert not lie_within(rows, 8)
