"""Embeddings as matrices: a lookup is the product of ``Wᵀ`` (dim, vocabulary) with a one-hot vector.

So A is ``(rank, vocabulary)`` and B is ``(dim, rank)``, as PEFT has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.models.copies import NoCopyError, copied
from lowrank.models.packing import packed
from lowrank.models.unnoticed import unnoticed


def embedding_problem(module: nn.Module) -> str:
    """Why ``module``, an embedding, cannot be adapted; empty where it can.

    A forward of its own must be linear in the weight: it is tried with small weights in the place of its own.
    """
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        return "max_norm changes the weight in each call"
    if packed(module.weight):
        return f"its weight is stored as {type(module.weight).__name__} of {module.weight.dtype}"
    if type(module).forward is nn.Embedding.forward:
        return ""
    if module.sparse:
        return "sparse=True is for plain embeddings only"
    weight, draw = module.weight, torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 0]], device=weight.device) % module.num_embeddings
    rows = [torch.randn(weight.shape[1], generator=draw, device="cpu").to(weight) for _ in range(2)]
    one, other, both = (
        row.expand(weight.shape) for row in (*rows, rows[0] + rows[1])
    )  # the same for all tokens
    try:
        with unnoticed(weight.device):
            copy = copied(module, torch.clone, weight.device, given={id(weight): one})
            y, z, sums = (functional_call(copy, {"weight": w}, (ids,)) for w in (one, other, both))
            linear = torch.allclose(y + z, sums, rtol=0.05, atol=0.05)
    except (NoCopyError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"the forward of {type(module).__name__} cannot be tried out: {error}"
    return "" if linear else f"the forward of {type(module).__name__} is not linear in its weight"


def without_padding(module: nn.Module, A: Tensor) -> Tensor:
    """A ``(rank, vocabulary)`` with a zero for the padding token, whose vector then never changes."""
    padding = getattr(module, "padding_idx", None)
    if padding is None or not A[:, padding].any():
        return A
    A = A.clone()
    A[:, padding] = 0
    return A
