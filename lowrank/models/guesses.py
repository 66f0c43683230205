"""What a fused weight may hold that no table knows, by its name and its parent's numbers of heads.

To be tried out by `trials`. It looks at names and attributes, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from torch import nn

from lowrank.models.families import Role
from lowrank.models.layouts import FUSED_NAMES, QKV, Blocks, by_kv_heads, in_order, interleaved

# Attributes of an attention that nothing else is known of.
KV_HEADS = "num_key_value_heads num_kv_heads n_kv_heads kv_heads n_kv_head".split()
NUMBERS_OF_HEADS = "num_heads num_attention_heads n_heads n_head heads".split()


def likely_blocks(parent: nn.Module, leaf: str, rows: int) -> list[Blocks]:
    """What the weight ``leaf`` may hold, by its name and its parent's attributes: to be tried out."""
    roles = FUSED_NAMES[leaf]
    equal = [(role, rows // len(roles)) for role in roles] if rows % len(roles) == 0 else []
    found = [in_order(equal)] if equal else []
    kv_heads = _counts(parent, KV_HEADS)
    if roles == QKV:
        for head, heads in product(_counts(parent, ["head_dim"]), kv_heads):
            kv = head * heads
            if rows > 2 * kv:
                found.append(in_order([(Role.QUERY, rows - 2 * kv), (Role.KEY, kv), (Role.VALUE, kv)]))
    for heads in _counts(parent, NUMBERS_OF_HEADS):
        if equal and equal[0][1] % heads == 0:
            found.append(interleaved(heads, [(role, size // heads) for role, size in equal]))
        for kv in kv_heads if roles == QKV else ():
            if heads % kv == 0 and rows % (heads + 2 * kv) == 0:
                found.append(by_kv_heads(kv, heads, rows // (heads + 2 * kv)))
    return found


def _counts(parent: nn.Module, names: Iterable[str]) -> list[int]:
    """What ``parent`` says under these names, where it is a number above 0; each number once."""
    said = [getattr(parent, name, None) for name in names]
    return list(dict.fromkeys(number for number in said if isinstance(number, int) and number > 0))
