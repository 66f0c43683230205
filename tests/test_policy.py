"""A policy checks itself when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank import Policy
from lowrank.init import Kaiming


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank: expected a whole number"),
        ("rank", 2.5, "rank: expected a whole number"),
        ("alpha", 0.0, "alpha: expected a positive number"),
        ("alpha", float("nan"), "alpha: expected a positive number"),
        ("alpha", "16", "alpha: expected a positive number"),
        ("dropout", None, "dropout: expected a number from 0"),
        ("fused", {"qkv_proj": 3}, "fused: expected the rows of each role"),
        ("fused", {"qkv_proj": {"q": 4}}, "fused: expected the rows of each role"),
        ("fused", {"qkv_proj": {"query": 4.0}}, "fused: expected the rows of each role"),
        ("fused", ["qkv_proj"], "fused: expected the rows of each role"),
        ("dropout", 1.0, "dropout: expected a number from 0"),
        ("dropout", -0.1, "dropout: expected a number from 0"),
        ("budget", 0, "budget: expected a count"),
        ("budget", 1.5, "budget: expected a count"),
        ("budget", True, "budget: expected a count"),
        ("seed", 0.5, "seed: expected a whole number"),
        ("init", Kaiming, "init: expected an instance"),
        ("allocate", "uniform", "allocate: expected an instance"),
    ],
)
def test_a_policy_checks_itself(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**{field: value})
