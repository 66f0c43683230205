"""A policy checks itself when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank import Policy
from lowrank.init import Kaiming


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank must be"),
        ("rank", 2.5, "rank must be"),
        ("alpha", 0.0, "alpha must be positive"),
        ("alpha", float("nan"), "alpha must be positive"),
        ("alpha", "16", "alpha must be positive"),
        ("dropout", None, "dropout must be"),
        ("fused", {"qkv_proj": 3}, "fused says rows by role"),
        ("fused", {"qkv_proj": {"q": 4}}, "fused says rows by role"),
        ("fused", {"qkv_proj": {"query": 4.0}}, "fused says rows by role"),
        ("fused", ["qkv_proj"], "fused says rows by role"),
        ("dropout", 1.0, "dropout must be"),
        ("dropout", -0.1, "dropout must be"),
        ("budget", 0, "budget is a count"),
        ("budget", 1.5, "budget is a count"),
        ("budget", True, "budget is a count"),
        ("seed", 0.5, "seed must be"),
        ("init", Kaiming, "init takes an instance"),
        ("allocate", "uniform", "allocate takes an instance"),
    ],
)
def test_a_policy_checks_itself(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**{field: value})
