"""Which adapted layer takes the place of which base: a table."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.layers.conv import LoRAConv
from lowrank.layers.embedding import LoRAEmbedding
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.linear import LoRALinear

LAYERS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv,
    nn.Conv2d: LoRAConv,
    nn.Conv3d: LoRAConv,
}


def adapted_layer(base: nn.Module, *, transposed: bool, **shape: Any) -> AdaptedLayer:
    """The layer that holds adapters beside ``base``; of what no class in the table is, a `LoRALinear`."""
    for kind, layer in LAYERS.items():
        if isinstance(base, kind):
            return layer(base, **shape)
    return LoRALinear(base, transposed=transposed, **shape)
