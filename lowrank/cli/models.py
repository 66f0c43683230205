"""Loads a model from a folder, as a command names it. Needs transformers, or diffusers for its models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.checkpoint import load_adapter
from lowrank.cli.saved import diffusers_file
from lowrank.formats.folder import CONFIG
from lowrank.peft_format import import_diffusers, import_peft
from lowrank.peft_format.folder import CONFIG as PEFT_CONFIG


def load(folder: Path, *, quiet: bool = False) -> nn.Module:
    """The model in ``folder``, of the class that ``config.json`` names, in the dtype of the files.

    ``quiet`` hides the library's own progress bars, from here on. Raises ValueError where there is none.
    """
    library, kind = _class_of(folder, configuration(folder))
    if quiet:
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    options = {"dtype": "auto"} if library == "transformers" else {}
    return kind.from_pretrained(folder, local_files_only=True, **options)


def configuration(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says; raises ValueError where it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no model: its config.json cannot be read ({error})") from error


def tied(folder: Path) -> list[list[str]]:
    """The names of each parameter that several modules of the model share, as its class and configuration
    have it. No weight is loaded."""
    library, kind = _class_of(folder, configuration(folder))
    if library == "diffusers":
        return []
    config = importlib.import_module(library).AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = kind(config) if hasattr(kind, "config_class") else kind.from_config(config)
    model.tie_weights()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _class_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, Any]:
    """The library that the model in ``folder`` is of, and its class there."""
    library, name = ("diffusers", config["_class_name"]) if "_class_name" in config else (
        "transformers", (config.get("architectures") or ["AutoModel"])[0]
    )  # fmt: skip
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise ValueError(f"{folder}: {library} has no class {name}")
    return library, kind


def load_onto(model: nn.Module, adapter: Path, name: str = "default") -> None:
    """Puts the adapter at ``adapter``, lowrank's own, PEFT's or diffusers', on ``model``."""
    if (adapter / PEFT_CONFIG).is_file():
        import_peft(model, adapter, name)
    elif (adapter / CONFIG).is_file():
        load_adapter(model, adapter, name)
    else:
        import_diffusers(model, diffusers_file(adapter), name)
