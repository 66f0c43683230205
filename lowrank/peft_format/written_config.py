"""What an export writes into PEFT's ``adapter_config.json``. It writes no file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowrank.adapters import plan_of
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.tree import hung_at, without_copies
from lowrank.models.kinds import kind_of
from lowrank.models.storage import stored_transposed
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.experts import VERSION
from lowrank.peft_format.pairs import Pair
from lowrank.peft_format.proof import adapted_paths
from lowrank.peft_format.tasks import task_of
from lowrank.peft_format.tokens import indices
from lowrank.plan import peft_patterns


def layer_at(root: nn.Module, module: str) -> AdaptedLayer:
    layer = without_copies(hung_at(root, module))
    assert isinstance(layer, AdaptedLayer)
    return layer


def written_config(
    root: nn.Module, name: str, pairs: Mapping[str, Pair], experts: Sequence[str], trained: Sequence[str]
) -> dict[str, Any]:
    """The configuration of ``pairs``, by module path or by the name of a tensor of ``experts``."""
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.rank * pair.scaling for module, pair in pairs.items()}
    modules = sorted(place for place in pairs if place not in experts)
    linear = [base for module in modules if kind_of(base := layer_at(root, module).base) is None]
    config = {
        "peft_type": "LORA",
        "task_type": task_of(root, trained),
        "base_model_name_or_path": getattr(root, "name_or_path", None) or None,
        "inference_mode": True,
        **peft_patterns(ranks, alphas),
        "target_modules": modules,
        "modules_to_save": list(trained) or None,
        "fan_in_fan_out": bool(linear) and all(map(stored_transposed, linear)),
        "lora_dropout": plan_of(root, name).dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": plan_of(root, name).dora,
        "init_lora_weights": True,
        **indices(plan_of(root, name).rows),
    }
    if experts:
        config |= {"target_parameters": sorted(experts), "peft_version": VERSION}
    if adapted_paths(root, PeftConfig.read(config)) != set(pairs):
        # A path that another one ends with: only an expression names exactly these.
        config["target_modules"] = "|".join(map(re.escape, modules))
    return config
