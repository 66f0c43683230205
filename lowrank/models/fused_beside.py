"""Projections that diffusers fused into a new layer: what it holds, and what nothing calls any more.

`fuse_qkv_projections` keeps the separate layers beside the new one. They tell its layout, and are not used.
"""

from __future__ import annotations

from torch import nn

from lowrank.models.layouts import QKV, Layout, in_order

PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def made_of(parent: nn.Module, leaf: str) -> Layout | None:
    """How ``leaf`` is laid out where the projections that it was made of lie beside it."""
    parts = [getattr(getattr(parent, name, None), "out_features", None) for name in PARTS.get(leaf, ())]
    sizes = [each for each in parts if isinstance(each, int)]
    if not sizes or len(sizes) < len(parts):
        return None
    return lambda parent, rows: in_order(list(zip(QKV[-len(sizes) :], sizes, strict=True)))


def fused_beside(parent: nn.Module, leaf: str) -> str | None:
    """The fused layer that ``parent`` calls instead of ``leaf``; None where it calls ``leaf``."""
    if getattr(parent, "fused_projections", False) is not True:
        return None
    return next((name for name, parts in PARTS.items() if leaf in parts and hasattr(parent, name)), None)
