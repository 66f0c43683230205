"""Low-rank adaptation of pretrained PyTorch models: plan, then apply."""

from lowrank import allocate, init, layers, presets, train
from lowrank.adapters import adapted_layers, adapter_names, adapter_parameters, plan_of
from lowrank.allocate.base import Allocation
from lowrank.calibration import calibrate
from lowrank.calibration.roles import FoundRoles, find_roles
from lowrank.calibration.statistics import Statistics
from lowrank.checkpoint import AdapterError, load_adapter, save_adapter
from lowrank.choosing import acting_adapters, adapters_for_rows, disable_adapters, set_adapters, use_adapters
from lowrank.combining import combine_adapters
from lowrank.comparing import compare_plans
from lowrank.init import Factors
from lowrank.layers import LoRALinear, lora_linear
from lowrank.layers.tuning_report import tuning_report
from lowrank.learning_rates import lora_plus, plan_learning_rate
from lowrank.memory import memory_report
from lowrank.merged_copies import MergedCopies, merged
from lowrank.merging import merge, remove_adapter, unwrap
from lowrank.models.projections import Projection, Role, find_projections
from lowrank.notices import LowrankWarning, UnsavedParametersWarning, UnusedLayerWarning
from lowrank.peft_format import PeftExport, export_diffusers, export_peft, import_diffusers, import_peft
from lowrank.plan import Plan
from lowrank.policy import Policy
from lowrank.spectra import plot_spectrum
from lowrank.swapping import swap_adapter
from lowrank.train.memory_table import MemoryReport
from lowrank.wrap import add_adapter, measure, plan_model, wrap_model
from lowrank.wrapping.new_heads import FrozenHeadWarning
from lowrank.wrapping.pretrained import SavePretrainedWarning

__version__ = "0.2.0"

__all__ = [
    "AdapterError",
    "Allocation",
    "Factors",
    "FoundRoles",
    "FrozenHeadWarning",
    "LoRALinear",
    "LowrankWarning",
    "MemoryReport",
    "MergedCopies",
    "PeftExport",
    "Plan",
    "Policy",
    "Projection",
    "Role",
    "SavePretrainedWarning",
    "Statistics",
    "UnsavedParametersWarning",
    "UnusedLayerWarning",
    "acting_adapters",
    "adapted_layers",
    "adapter_names",
    "adapter_parameters",
    "adapters_for_rows",
    "add_adapter",
    "allocate",
    "calibrate",
    "combine_adapters",
    "compare_plans",
    "disable_adapters",
    "export_diffusers",
    "export_peft",
    "find_projections",
    "find_roles",
    "import_diffusers",
    "import_peft",
    "init",
    "layers",
    "load_adapter",
    "lora_linear",
    "lora_plus",
    "measure",
    "memory_report",
    "merge",
    "merged",
    "plan_learning_rate",
    "plan_model",
    "plan_of",
    "plot_spectrum",
    "presets",
    "remove_adapter",
    "save_adapter",
    "set_adapters",
    "swap_adapter",
    "train",
    "tuning_report",
    "unwrap",
    "use_adapters",
    "wrap_model",
]
