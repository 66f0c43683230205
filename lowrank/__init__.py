"""Low-rank adaptation of pretrained PyTorch models: plan, then apply."""

from lowrank import allocate, init, layers, presets, train
from lowrank.adapted import (
    adapted_layers,
    adapter_parameters,
    disable_adapters,
    merge,
    plan_of,
    unwrap,
)
from lowrank.calibrate import calibrate
from lowrank.checkpoint import AdapterError, load_adapter, save_adapter
from lowrank.init import Factors
from lowrank.layers import LoRALinear, lora_linear
from lowrank.peft_format import PeftExport, export_peft, import_peft
from lowrank.plan import Allocation, Plan
from lowrank.policy import Policy
from lowrank.pretrained import SavePretrainedWarning
from lowrank.projections import Projection, Role, find_projections
from lowrank.statistics import Statistics
from lowrank.wrap import measure, plan_model, wrap_model

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Allocation",
    "Factors",
    "LoRALinear",
    "PeftExport",
    "Plan",
    "Policy",
    "Projection",
    "Role",
    "SavePretrainedWarning",
    "Statistics",
    "adapted_layers",
    "adapter_parameters",
    "allocate",
    "calibrate",
    "disable_adapters",
    "export_peft",
    "find_projections",
    "import_peft",
    "init",
    "layers",
    "load_adapter",
    "lora_linear",
    "measure",
    "merge",
    "plan_model",
    "plan_of",
    "presets",
    "save_adapter",
    "train",
    "unwrap",
    "wrap_model",
]
