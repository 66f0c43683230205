"""Adapters to PEFT's folders and back. Neither way needs PEFT to be installed."""

from lowrank.peft_format.diffusers import export_diffusers
from lowrank.peft_format.export import PeftExport, export_peft
from lowrank.peft_format.from_diffusers import import_diffusers
from lowrank.peft_format.load import import_peft

__all__ = ["PeftExport", "export_diffusers", "export_peft", "import_diffusers", "import_peft"]
