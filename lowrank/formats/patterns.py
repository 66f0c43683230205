"""Ranks and alphas by module as the patterns of PEFT's ``LoraConfig``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def peft_patterns(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """``r``, ``lora_alpha`` and the two patterns, for ranks and alphas by full module path.

    Both dictionaries hold the same keys, one per module that differs from the commonest pair. A path
    that another one ends with is anchored, since PEFT matches suffixes.
    """
    pairs = {path: (ranks[path], alphas[path]) for path in ranks}
    (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    suffixes = {path.split(".", i)[-1] for path in ranks for i in range(1, path.count(".") + 1)}
    rest = {path: pair for path, pair in pairs.items() if pair != (rank, alpha)}
    keys = {path: ("^" if path in suffixes else "") + re.escape(path) for path in rest}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {keys[path]: pair[0] for path, pair in rest.items()},
        "alpha_pattern": {keys[path]: pair[1] for path, pair in rest.items()},
    }
