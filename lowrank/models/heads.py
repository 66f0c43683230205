"""The output heads of a model: told by what they do, else by name. Adapters leave them out unless asked."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.models.families import HEAD_LAYERS, HEADS, HEADS_ANYWHERE, SCORES, in_attention, is_attention
from lowrank.models.storage import declared_shape, is_embedding, is_linear


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
    words = _vocabularies(model)
    named = {}
    for path, module in model.named_modules():
        *above, leaf = [part for part in path.split(".") if not part.isdigit()] or [""]
        scores = leaf in SCORES and bool(above) and (declared_shape(module) or (0,))[0] in words
        if (HEADS_ANYWHERE.fullmatch(leaf) or scores) and is_linear(module) and not in_attention(path):
            named[path] = f"called {leaf!r}"
    for around, part in model.named_modules():  # a transformers model may sit in another module
        get_output = getattr(part, "get_output_embeddings", None)
        if part is not model and not callable(get_output):
            continue
        output = get_output() if callable(get_output) else None
        for path, module in part.named_modules(prefix=around):
            if output is not None and module is output:
                certain.setdefault(path, "the model's output embeddings")
        for name, child in part.named_children():
            if name in HEADS and _is_small(child) and (part is model or not _is_body(part)):
                prefix = f"{around}.{name}" if around else name
                named |= {path: f"called {name!r}" for path, _ in child.named_modules(prefix=prefix)}
    linear = {
        path
        for path, module in model.named_modules()
        if is_linear(module) or isinstance(module, nn.MultiheadAttention)
    }
    return certain if linear <= certain.keys() | named.keys() else named | certain


def _is_body(part: Any) -> bool:
    """Is ``part`` a model of transformers without a head, so that what is called one pools or projects?"""
    return getattr(part, "base_model", None) is part and type(part).__name__.endswith("Model")


def _vocabularies(model: nn.Module) -> set[int]:
    configs = [getattr(part, "config", None) for part in model.modules()]
    sizes = [getattr(config, "vocab_size", None) for config in configs]
    return {size for size in sizes if isinstance(size, int)}


def _is_small(head: nn.Module) -> bool:
    linear = [path for path, module in head.named_modules() if is_linear(module)]
    attends = any(in_attention(path) for path in linear) or any(
        isinstance(module, nn.MultiheadAttention) or is_attention(dict(module.named_children()))
        for module in head.modules()
    )
    return len(linear) <= HEAD_LAYERS and not attends
