"""What a transformers model keeps beside its weights, and what of it must change with them.

Its quantizer says whether a Trainer accepts it, its configuration says how a saved folder is read, and its
``save_pretrained`` chooses the names in that folder. All of it is told by attributes: transformers is not
imported, nor is bitsandbytes.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, cast

from torch import nn

from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight
from lowrank.models.storage import is_linear, quantized
from lowrank.notices import LowrankWarning
from lowrank.wrapping.resizing import allow_resizing, refuse_resizing

ADAPTED = (AdaptedLayer, AdaptedWeight, TrainedModule)
SAVE, TIE = "save_pretrained", "tie_weights"
Bare = Callable[[nn.Module], AbstractContextManager[Any]]
MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
CONFIG_MARKS = ("quantization_config", "_is_quantized")
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")  # bitsandbytes; torchao, fp8 and others


class SavePretrainedWarning(LowrankWarning):
    """``save_pretrained`` was called on a wrapped model: ``from_pretrained`` cannot read that folder."""


def attach(root: nn.Module, bare: Bare) -> None:
    """Tells what is in ``root`` of transformers that adapters are there now. Undone by `detach`.

    A quantized model is accepted by a Trainer, as one with PEFT's adapters is, where its quantizer says that
    gradients pass through its layers. ``save_pretrained`` warns, and keeps the names that the model has.
    ``resize_token_embeddings`` is refused where it would drop an adapter, and ``tie_weights`` meets the base.

    Args:
        bare: a context in which its argument, ``root``, is its base.
    """
    for module in root.modules():
        quantizer = module.__dict__.get("hf_quantizer")
        if quantizer is not None and not isinstance(quantizer, _WithAdapters):
            made = _made(type(quantizer))  # beside the original, which may be another model's too
            made.__dict__.update(vars(quantizer), original=quantizer)
            module.__dict__["hf_quantizer"] = made
        saves = callable(getattr(type(module), SAVE, None)) and SAVE not in module.__dict__
        if saves and any(isinstance(part, ADAPTED) for part in module.modules()):
            module.__dict__[SAVE] = _SavePretrained(module)
        if callable(getattr(type(module), TIE, None)) and TIE not in module.__dict__:
            module.__dict__[TIE] = _TieWeights(module, root, bare)
    refuse_resizing(root, ADAPTED)


def detach(root: nn.Module) -> None:
    """Undoes `attach`."""
    for module in root.modules():
        quantizer = module.__dict__.get("hf_quantizer")
        if isinstance(quantizer, _WithAdapters):
            module.__dict__["hf_quantizer"] = quantizer.original
        if isinstance(module.__dict__.get(SAVE), _SavePretrained):
            del module.__dict__[SAVE]
        if isinstance(module.__dict__.get(TIE), _TieWeights):
            del module.__dict__[TIE]
    allow_resizing(root)


# -- quantization -----------------------------------------------------------------------------------------


class _WithAdapters:
    """A quantizer whose model is trained by adapters beside its layers.

    ``is_qat_trainable`` is what a Trainer asks first; ``is_trainable`` stays the quantizer's own answer.
    """

    original: Any
    is_qat_trainable = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made, (type(self.original),), self.__dict__


@cache
def _with_adapters(kind: type) -> type:
    return type(kind.__name__, (_WithAdapters, kind), {})


def _made(kind: type) -> Any:
    """One without attributes, for a quantizer of this ``kind``."""
    cls: Any = _with_adapters(kind)
    return cls.__new__(cls)


def forget_quantization(root: nn.Module) -> None:
    """Removes what says that ``root`` is quantized, where no quantized weight is left in it.

    Where some are left, the configuration lists the layers that are not quantized, so that a saved folder
    is read as it was written.
    """
    for model in root.modules():
        if "hf_quantizer" not in model.__dict__:
            continue
        if any(quantized(parameter) for parameter in model.parameters()):
            _list_plain_layers(model)
            continue
        for name in MARKS:
            model.__dict__.pop(name, None)
        for part in model.modules():
            for name in CONFIG_MARKS:
                getattr(getattr(part, "config", None), "__dict__", {}).pop(name, None)


def forget_ties(root: nn.Module) -> None:
    """Removes what says that weights of ``root`` are tied which are not any more."""
    for model in root.modules():
        keys = model.__dict__.get("all_tied_weights_keys")
        if not isinstance(keys, dict):
            continue
        named = dict(model.named_parameters(remove_duplicate=False))
        left = {one: other for one, other in keys.items() if named.get(one) is named.get(other)}
        if left == keys:
            continue
        model.__dict__["all_tied_weights_keys"] = left
        config = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]


def _list_plain_layers(model: Any) -> None:
    settings = copy.copy(getattr(model.config, "quantization_config", None))
    name = next((each for each in SKIPPED if hasattr(settings, each)), None)
    if name is None:
        return
    plain = {
        path for path, module in model.named_modules() if is_linear(module) and not quantized(module.weight)
    }
    setattr(settings, name, sorted(plain.union(getattr(settings, name) or ())))
    quantizer = copy.copy(model.hf_quantizer)  # it and the settings may be another model's too
    quantizer.quantization_config = model.config.quantization_config = settings
    model.hf_quantizer = quantizer


# -- methods of a model -------------------------------------------------------------------------------------


class _Method:
    """Stands for a method on an instance; copied and pickled with the ``models`` that it is about."""

    def __init__(self, *models: nn.Module) -> None:
        # Strong references would keep the model until a garbage collection.
        self._models = [weakref.ref(model) for model in models]

    @property
    def models(self) -> list[nn.Module]:
        models = [reference() for reference in self._models]
        if None in models:
            raise ReferenceError("the model that this method belongs to does not exist any more")
        return cast("list[nn.Module]", models)

    def __reduce__(self) -> Any:
        return type(self), tuple(self.models)


class _TieWeights(_Method):
    """Stands for a wrapped model's ``tie_weights``, which looks for the base's own names."""

    def __init__(self, model: nn.Module, root: nn.Module, bare: Bare) -> None:
        super().__init__(model, root)
        self.bare = bare

    def __reduce__(self) -> Any:
        return type(self), (*self.models, self.bare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, root = self.models
        with self.bare(root):
            return getattr(model, TIE)(*args, **kwargs)


# -- save_pretrained ----------------------------------------------------------------------------------------


class _SavePretrained(_Method):
    """Stands for a wrapped model's ``save_pretrained``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (model,) = self.models
        warnings.warn(
            f"{type(model).__name__} holds adapters: save_pretrained writes a folder that from_pretrained "
            "cannot read, because the adapted layers have other names. Use lowrank.save_adapter for the "
            "adapter alone, or lowrank.merge before you save the model",
            SavePretrainedWarning,
            stacklevel=2,
        )
        original: Any = getattr(type(model), SAVE)
        signature = inspect.signature(original)
        given = signature.bind(model, *args, **kwargs).arguments
        if "save_original_format" in signature.parameters and "save_original_format" not in given:
            # The names of the original format are those of no adapter: a Trainer would not find them again.
            kwargs["save_original_format"] = False
        with _further_names_declared(model):
            return original(model, *args, **kwargs)


@contextmanager
def _further_names_declared(model: Any) -> Iterator[None]:
    """Inside, transformers knows each further name of a shared parameter, and leaves it out of the file."""
    first: dict[int, str] = {}
    further = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            further[f"^{re.escape(name)}$"] = source
    before = getattr(model, "_tied_weights_keys", None) or {}
    own = "_tied_weights_keys" in model.__dict__
    if not further or not isinstance(before, dict):
        yield
        return
    model.__dict__["_tied_weights_keys"] = {**before, **further}
    try:
        yield
    finally:
        del model.__dict__["_tied_weights_keys"]
        if own:
            model.__dict__["_tied_weights_keys"] = before
