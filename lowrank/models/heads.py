"""The output heads of a model: told by what they do, else by name. Adapters leave them out unless asked."""

from __future__ import annotations

from torch import nn

from lowrank.models.families import HEAD_LAYERS, HEADS, HEADS_ANYWHERE, in_attention
from lowrank.models.storage import is_embedding, is_linear


def output_heads(model: nn.Module) -> dict[str, str]:
    """Paths of the linear modules that turn hidden states into scores, and of tied weights: each with why.

    Output embeddings and tied weights are told by what they do, others by their name: a few linear layers
    without attention. Names alone do not count where they would leave nothing else of the model.
    """
    tied = {id(p) for m in model.modules() if is_embedding(m) for p in m.parameters(recurse=False)}
    certain = {
        path: "its weight is tied to an embedding"
        for path, module in model.named_modules()
        if not is_embedding(module) and any(id(p) in tied for p in module.parameters(recurse=False))
    }
    named = {
        path: f"called {path.rpartition('.')[2]!r}"
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in HEADS_ANYWHERE and is_linear(module) and not in_attention(path)
    }
    for around, part in model.named_modules():  # a transformers model may sit in another module
        get_output = getattr(part, "get_output_embeddings", None)
        if part is not model and not callable(get_output):
            continue
        output = get_output() if callable(get_output) else None
        for path, module in part.named_modules(prefix=around):
            if output is not None and module is output:
                certain.setdefault(path, "the model's output embeddings")
        for name, child in part.named_children():
            if name in HEADS and _is_small(child):
                prefix = f"{around}.{name}" if around else name
                named |= {path: f"called {name!r}" for path, _ in child.named_modules(prefix=prefix)}
    linear = {
        path
        for path, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.MultiheadAttention)
    }
    return certain if linear <= certain.keys() | named.keys() else named | certain


def _is_small(head: nn.Module) -> bool:
    linear = [path for path, module in head.named_modules() if is_linear(module)]
    attends = any(in_attention(path) for path in linear) or any(
        isinstance(module, nn.MultiheadAttention) for module in head.modules()
    )
    return len(linear) <= HEAD_LAYERS and not attends
