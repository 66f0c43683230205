"""An adapted embedding keeps its number of tokens: what transformers' resizing would make of it.

It would put a plain layer in the place of the adapted one, or stop half-way. It is refused by name instead.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

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
            layers = []
            for get in LAYERS:
                with suppress(
                    AttributeError, NotImplementedError
                ):  # how transformers says that there is none
                    layers.append(getattr(module, get)())
            held = [path for path, each in module.named_modules() if isinstance(each, adapted)]
            names = tuple(path for path in held if any(module.get_submodule(path) is each for each in layers))
            if names:
                module.__dict__[RESIZE] = Refusal(names)


def allow_resizing(root: nn.Module) -> None:
    """Undoes `refuse_resizing`."""
    for module in root.modules():
        if isinstance(module.__dict__.get(RESIZE), Refusal):
            del module.__dict__[RESIZE]
