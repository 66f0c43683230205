"""The models that a census counts: transformers' types, and timm's and diffusers' where these are there."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.censuses.inputs import inputs
from benchmarks.censuses.shrink import configs

LARGEST = 40_000_000  # parameters; a model that cannot be shrunk below is not run
GAIN = 1.7  # of convolutions: SiLU halves what is small
SEARCH = 15  # seconds of a core for what builds and runs
HEADED = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CTC",
)  # fmt: skip

Made = tuple[nn.Module, dict[str, Any]]  # in evaluation mode, and what it can be called with


class NotBuilt(Exception):
    """Nothing of this type could be built small."""


class NotRun(Exception):
    """It was built, and no guess of its inputs ran."""


def names() -> list[str]:
    """``transformers:bert`` and so on: everything that can be counted here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = [f"transformers:{name}" for name in CONFIG_MAPPING]
    if importlib.util.find_spec("timm"):
        from benchmarks.censuses import vision

        found += [f"timm:{file}" for file in vision.files()]
    if importlib.util.find_spec("diffusers"):
        from benchmarks.censuses.denoisers import DENOISERS

        found += [f"diffusers:{name}" for name in DENOISERS]
    return found


def make(name: str) -> Made:
    """A small random model of this name, the same each time, and inputs that it was called with.

    Raises:
        NotBuilt, NotRun: with what the last attempt said.
    """
    library, _, kind = name.partition(":")
    return {"transformers": _transformers, "timm": _timm, "diffusers": _diffusers}[library](kind)


def _timm(kind: str) -> Made:
    from benchmarks.censuses import vision

    built, last = False, "no model"
    try:
        for model, batch in vision.models(kind):
            built = True
            _settle(model)
            try:
                vision.settle(model, batch)
                with torch.no_grad():
                    model(**batch)
                return model, batch
            except Exception as error:  # whatever a stranger's code raises
                last = f"{type(error).__name__}: {error}"
    except Exception as error:
        last = f"{type(error).__name__}: {error}" if not built else last
    raise (NotRun if built else NotBuilt)(last)


def _diffusers(kind: str) -> Made:
    from benchmarks.censuses.denoisers import denoiser

    try:
        model, batch = denoiser(kind)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    try:
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        raise NotRun(f"{type(error).__name__}: {error}") from error
    return model, batch


def _transformers(kind: str) -> Made:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    built, last, tried, since = False, "no configuration", set(), time.process_time()
    try:
        offered = list(configs(CONFIG_MAPPING[kind]))
    except Exception as error:  # its own default
        raise NotBuilt(f"its default configuration: {type(error).__name__}: {error}") from error
    for config in offered:
        try:
            said, classes = str(config), list(_classes(type(config)))
        except Exception as error:  # it does not hold together
            last = f"{type(error).__name__}: {error}" if not built else last
            continue
        if said in tried:
            continue
        tried.add(said)
        for model_class in classes:
            if time.process_time() - since > SEARCH:
                raise (NotRun if built else NotBuilt)(f"no luck in {SEARCH} seconds: {last}")
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > LARGEST:
                    raise ValueError(f"{size:,} parameters")
                torch.manual_seed(0)
                model = model_class(config).eval()
            except Exception as error:  # whatever a stranger's code raises
                last = f"{type(error).__name__}: {error}" if not built else last
                continue
            built = True
            _settle(model)
            for batch in inputs(model):
                try:
                    with torch.no_grad():
                        torch.manual_seed(0)
                        model(**batch)
                    return model, batch
                except Exception as error:
                    last = f"{type(error).__name__}: {error}"
    raise (NotRun if built else NotBuilt)(last)


def _settle(model: nn.Module) -> None:
    """Numbers for what a checkpoint would fill.

    Weights and codebooks that start as zeros hide what depends on them, and a signal vanishes in many small
    convolutions.
    """
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                weight = module.weight
                weight.copy_(torch.randn(weight.shape, generator=draw))
                weight.mul_(GAIN / max(1, weight[0].numel()) ** 0.5)
        for parameter in model.state_dict(keep_vars=True).values():
            if parameter.is_floating_point() and parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
            elif parameter.is_floating_point() and not parameter.isfinite().all():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))


def _classes(config_class: type) -> Iterator[type]:
    """Models of this configuration: with a head where there is one, then without."""
    import transformers.models.auto.modeling_auto as auto

    seen: set[str] = set()
    mappings = [getattr(auto, f"MODEL_FOR_{task}_MAPPING", {}) for task in HEADED]
    mappings += [auto.MODEL_MAPPING]
    for mapping in mappings:
        if config_class in mapping:
            found: Any = mapping[config_class]
            for each in found if isinstance(found, tuple) else (found,):
                if each.__name__ not in seen:
                    seen.add(each.__name__)
                    yield each
    if not seen:  # in no table: whatever its file has
        from transformers import PreTrainedModel

        file = config_class.__module__.replace(".configuration_", ".modeling_")
        try:
            module = importlib.import_module(file)
        except ImportError:
            return
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, PreTrainedModel):
                if getattr(each, "config_class", None) is config_class and "forward" in vars(each):
                    yield each
