"""Writes an adapter as one file that diffusers' LoRA loaders read. It changes no model.

Without alphas the loaders take scaling 1 where all ranks are equal, and only there: the scalings are folded
into B, and smaller ranks padded with zeros.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lowrank.adapters import adapters_of, one_name, plan_of, wrapped_root
from lowrank.files import write_pieces
from lowrank.formats.tensors import packed
from lowrank.linalg.rows import Rows
from lowrank.peft_format.exportable import check_exportable
from lowrank.peft_format.pairs import Pair, plain, stacked, uniform
from lowrank.peft_format.written_config import layer_at


def export_diffusers(
    model: nn.Module,
    path: str | Path,
    *,
    prefix: str | None = "transformer",
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes an adapter of a wrapped ``model`` as one safetensors file for diffusers; returns its path.

    The keys are ``{prefix}.{module}.lora_A.weight`` and ``.lora_B.weight``. ``model`` is the denoiser itself,
    and ``model.load_lora_adapter(path, prefix=prefix)`` or a pipeline's ``load_lora_weights`` reads the file.

    Args:
        path: the file; one that is there is replaced in one step.
        prefix: ``"transformer"`` (SD3, Flux …), ``"unet"``, or None for no prefix.
        name: of the adapter; it may be left out where there is one.
        dtype: of the written factors; by default the parameters' own, fp32.

    Raises:
        ValueError: the model is not wrapped or has no adapter of that name; or the adapter has modules
            trained in full, magnitudes, layers that the loaders have no place for, or NaN.
    """
    root = wrapped_root(model)
    name = one_name(root, name)
    plan, adapters = plan_of(root, name), adapters_of(root, name)
    if plan.train or plan.dora:
        what = f"modules trained in full ({', '.join(plan.train)})" if plan.train else "magnitudes (DoRA)"
        raise ValueError(
            f"a LoRA file for diffusers has no place for {what}: merge(model) and save all of it"
        )
    check_exportable(root, adapters, name, experts={})
    blocks: dict[str, list[tuple[Rows, Pair]]] = {}
    for p, adapter in adapters.items():
        blocks.setdefault(p.module, []).append((p.rows, plain(adapter, adapter.A.dtype)))
    pairs = uniform(
        {module: stacked(each, layer_at(root, module).out_features) for module, each in blocks.items()}
    )
    start = f"{prefix}." if prefix else ""
    tensors = {}
    for module, pair in pairs.items():
        for factor, values in (("A", pair.A), ("B", pair.B)):
            if not values.isfinite().all():
                raise ValueError(f"refusing to export: {module}.lora_{factor} contains NaN or Inf")
            tensors[f"{start}{module}.lora_{factor}.weight"] = values.to(dtype or values.dtype)
    write_pieces(Path(path), packed(tensors))
    return Path(path)
