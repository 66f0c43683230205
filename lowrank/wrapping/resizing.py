"""An adapted embedding keeps its number of tokens: what transformers' resizing would make of it.

It would put a plain layer in the place of the adapted one, or stop half-way. It is refused by name instead.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

from torch import nn

from lowrank.models.projections import Projection
from lowrank.models.storage import is_embedding

RESIZE = "resize_token_embeddings"
LAYERS = ("get_input_embeddings", "get_output_embeddings")


class Refusal:
    """Stands in the place of ``resize_token_embeddings`` while ``names`` are adapted."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{RESIZE} would drop what was trained of {' and '.join(self.names)}: resize before wrap_model, "
            "load_adapter or import_peft, or call merge(model, untie=True) or unwrap(model) first"
        )


def refuse_resizing(root: nn.Module, adapted: tuple[type, ...]) -> None:
    """Refuses it for each model in ``root`` whose embedding or output head is one of ``adapted``."""
    for module in root.modules():
        if callable(getattr(type(module), RESIZE, None)) and RESIZE not in module.__dict__:
            layers = _layers_of_tokens(module)
            held = [path for path, each in module.named_modules() if isinstance(each, adapted)]
            names = tuple(path for path in held if any(module.get_submodule(path) is each for each in layers))
            if names:
                module.__dict__[RESIZE] = Refusal(names)


def allow_resizing(root: nn.Module) -> None:
    """Undoes `refuse_resizing`."""
    for module in root.modules():
        if isinstance(module.__dict__.get(RESIZE), Refusal):
            del module.__dict__[RESIZE]


def layers_of_tokens(model: nn.Module) -> set[nn.Module]:
    """The embeddings and output heads of the models of transformers in ``model``."""
    return {each for m in model.modules() if hasattr(type(m), RESIZE) for each in _layers_of_tokens(m)}


def vocabulary_problem(
    module: nn.Module, p: Projection, shape: tuple[int, int], tokens: Collection[nn.Module]
) -> str:
    """What is wrong where ``p`` is a whole embedding or output head for another number of tokens; else empty.

    Args:
        module: what the model has at the path of ``p``.
        shape: ``(rows, in)`` of its weight.
        tokens: the model's `layers_of_tokens`.
    """
    rows, columns = shape
    if is_embedding(module):
        then, now, fits = p.in_features, columns, p.out_features == rows
    else:
        if p.block or module not in tokens:
            return ""
        then, now, fits = p.out_features, rows, p.in_features == columns
    if then == now or not fits:
        return ""
    return (
        f"{p.name}: it was adapted for {then} tokens, and this model has {now}: bring it to as many "
        f"first, in transformers by model.{RESIZE}({then})"
    )


def _layers_of_tokens(module: Any) -> list[Any]:
    """The embedding and the output head of a model of transformers."""
    layers = []
    for get in LAYERS:
        with suppress(AttributeError, NotImplementedError):  # how transformers says that there is none
            layers.append(getattr(module, get)())
    return layers
