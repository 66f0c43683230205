"""The adapted layer and the product that it computes. Plain tensors in; it knows no model."""

from lowrank.layers.adapter import Adapter
from lowrank.layers.functional import lora_linear
from lowrank.layers.linear import LoRALinear

__all__ = ["Adapter", "LoRALinear", "lora_linear"]
