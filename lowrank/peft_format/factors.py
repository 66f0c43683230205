"""How PEFT names and shapes the factors of each kind of layer. It knows no file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from lowrank.peft_format.pairs import Pair

EMBEDDING = "lora_embedding_"
FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", re.DOTALL)
BASE = ".base_layer.weight"  # of an adapted embedding, which PEFT saves besides


def factor_key(module: nn.Module, factor: str) -> str:
    """The end of a factor's name, of the adapter on ``module``."""
    return f"{EMBEDDING}{factor}" if isinstance(module, nn.Embedding) else f"lora_{factor}.weight"


def factor_shapes(module: nn.Module, rank: int, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of both factors for a weight that is ``shape`` (out, in) as a matrix."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kernel = tuple(module.kernel_size)
        return {"A": (rank, module.in_channels, *kernel), "B": (shape[0], rank, *(1 for _ in kernel))}
    return {"A": (rank, shape[1]), "B": (shape[0], rank)}


def written(module: nn.Module, pair: Pair) -> dict[str, Tensor]:
    """Both factors by the ends of their names, as PEFT has them."""
    shapes = factor_shapes(module, pair.rank, (pair.B.shape[0], pair.A.shape[1]))
    return {
        factor_key(module, factor): tensor.reshape(shapes[factor])
        for factor, tensor in (("A", pair.A), ("B", pair.B))
    }


def read_factors(tensors: Mapping[str, Tensor], path: str) -> list[Tensor]:
    """A ``(rank, in)`` and B ``(out, rank)`` of the adapter at ``path``."""
    found = (
        tensors.get(f"{path}.lora_{factor}.weight", tensors.get(f"{path}.{EMBEDDING}{factor}"))
        for factor in "AB"
    )
    return [tensor.flatten(1) for tensor in found if tensor is not None]


def factor_problem(module: nn.Module) -> str:
    """Why PEFT's layer would compute something else than an adapted ``module``; empty where it does not."""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "" if plain else f"PEFT does not call the forward of {type(module).__name__}"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.padding_mode != "zeros" or any(each != 1 for each in module.dilation):
            return "PEFT leaves out the dilation and the padding_mode of a convolution"
        return ""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return f"PEFT adapts nn.Linear, Conv1D, nn.Embedding and nn.Conv1d to 3d, not {type(module).__name__}"
    return ""
