"""Models of timm, one of each of its files: built small, else the smallest that it has.

timm needs torchvision, whose wheels may lack the operators of another PyTorch: their names are defined here,
and nothing calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

LARGEST = 40_000_000  # parameters
TRIED = 8  # models of a file, to find a small one
SIDE = 64  # pixels
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
_WORDS = "test tiny nano atto femto pico xxs xs mini small s12 18 26 mobile lite b0 _0 x0 w18".split()
_SMALL: tuple[dict[str, Any], ...] = (
    dict(img_size=SIDE, depth=2, embed_dim=32, num_heads=4),
    dict(img_size=SIDE, depth=2),
    dict(img_size=2 * SIDE),  # what divides it by 64 has more than one token
    dict(img_size=56, depth=2),  # of patches of 14
    {},
)


def timm() -> Any:
    """The module, once torchvision can be imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            with suppress(RuntimeError):  # it is there
                _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def files() -> list[str]:
    """The names of timm's files that define models."""
    return list(timm().list_modules())


def models(file: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Models of one of timm's files and what each is called with, the smallest first; each may fail when run.

    Raises whatever the last attempt to build one raised, where none could be built.
    """
    library = timm()
    names = sorted(library.list_models(module=file), key=_large)[:TRIED]
    last: Exception | None = None
    for settings in _SMALL:
        for name in names[:2] if settings else names:
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in library.create_model(name, **settings).parameters())
                if size > LARGEST:
                    raise ValueError(f"{name} has {size:,} parameters")
                torch.manual_seed(0)
                model = library.create_model(name, **settings).eval()
            except Exception as error:  # whatever a stranger's code raises: the next one may do
                last = error
                continue
            last = None
            _, side, _ = shape = model.default_cfg["input_size"]
            side = settings.get("img_size", side)
            draw = torch.Generator().manual_seed(0)
            image = torch.randn(2, shape[0], side, side, generator=draw)
            yield model, {next(iter(_arguments(model))): image}
    if last is not None:
        raise last


def settle(model: nn.Module, batch: dict[str, Any]) -> None:
    """Means and deviations of batch normalizations as a checkpoint has them: of what goes through.

    Without them numbers grow from layer to layer.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def _arguments(model: nn.Module) -> Iterator[str]:
    yield from inspect.signature(model.forward).parameters


def _large(name: str) -> tuple[int, int, str]:
    """Sorts names by the words in them that say that a model is small."""
    rank = next((i for i, word in enumerate(_WORDS) if word in name), len(_WORDS))
    return rank, len(name), name
