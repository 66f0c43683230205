"""What the tests of PEFT's format share: adapters of ours, and PEFT's reading of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Allocation, Plan, Policy, presets
from tests import helpers, zoo

# PEFT asks transformers for a name that it has given up.
warnings_of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PHI3 = {"qkv_proj": {"query": 32, "key": 16, "value": 16}}


def assert_same(got: Tensor, wanted: Tensor, base: Tensor) -> None:
    """Equal within 1e-4 of the most that the adapter changes: fp32 sums in another order make 2e-6 of it."""
    change = (wanted - base).abs().max()
    assert change > 1e-4, "the adapter does nothing"
    assert (got - wanted).abs().max() < 1e-4 * change


def logits(model: nn.Module, family: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return helpers.logits(model, zoo.batch(family, dtype))


def frozen_base(family: str) -> Tensor:
    """The frozen base's logits: what an adapter that is zero or disabled leaves bit for bit."""
    return helpers.frozen_logits(zoo.build(family), zoo.batch(family))


def policy(family: str, preset: Callable[..., Policy] = presets.lora, **options: Any) -> Policy:
    return preset(**{"rank": 3, "fused": PHI3 if family == "phi3" else {}, **options})


def adapted(family: str, how: Policy | Plan, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model of ``family`` whose adapters and heads have moved."""
    return helpers.perturb(lowrank.wrap_model(zoo.build(family, dtype), how, progress=False))


def mixed(family: str) -> Plan:
    """Ranks from 0 to 4 and as many scalings, by turns."""
    plan = lowrank.plan_model(zoo.build(family), policy(family, presets.pissa))
    return Plan({p: Allocation(i % 5, 0.5 + i % 3) for i, p in enumerate(plan)}, init=plan.init)


def theirs(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's reading of ``folder`` on a fresh base."""
    return peft.PeftModel.from_pretrained(zoo.build(family, dtype), folder)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def trained_by_peft(family: str, folder: Path, **options: Any) -> Tensor:
    """Saves an adapter that PEFT made and chance trained; returns its logits."""
    config = peft.LoraConfig(**{"init_lora_weights": False, **options})
    model = helpers.perturb(peft.get_peft_model(zoo.build(family), config).eval())
    model.save_pretrained(folder)
    return logits(model, family)
