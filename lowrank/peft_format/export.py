"""Writes the adapters of a model as plain LoRA in PEFT's format, and reads it again to be sure.

What PEFT cannot hold is refused by name. It writes one folder; it changes no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lowrank.adapters import adapters_of, one_name, plan_of, wrapped_root
from lowrank.files import write, write_pieces
from lowrank.formats.tensors import packed
from lowrank.linalg.rows import Rows
from lowrank.peft_format.experts import of_all, place_of
from lowrank.peft_format.exportable import adapted_experts, check_exportable, trained_states
from lowrank.peft_format.factors import written as written_factors
from lowrank.peft_format.folder import MAGNITUDE, PREFIX
from lowrank.peft_format.pairs import Pair, plain, recompressed, stacked, uniform
from lowrank.peft_format.proof import check_written
from lowrank.peft_format.staging import CONFIG, TENSORS, staged
from lowrank.peft_format.tokens import check_rows_written, written_rows
from lowrank.peft_format.written_config import layer_at, written_config
from lowrank.wrapping.checks import check_whole
from lowrank.wrapping.magnitudes import magnitudes_by_module
from lowrank.wrapping.unsaved import warn_of_unsaved


@dataclass(frozen=True)
class PeftExport:
    """What `export_peft` wrote.

    Args:
        path: the folder.
        ranks: by module path, or name of a tensor of experts; the sum over row blocks, twice the adapter's
            rank where it is anchored.
        errors: by projection name: ``|ΔW written − ΔW| / |ΔW|`` in the Frobenius norm. Below 1e-5, unless
            the adapter was recompressed or written in half precision.
    """

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values())

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        return f"{self.path}: {len(self.ranks)} modules of {shown}, error of ΔW at most {self.error:.1e}"


def export_peft(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    serving: bool = False,
    recompress: bool = False,
    dtype: torch.dtype | None = None,
) -> PeftExport:
    """Writes an adapter of a wrapped ``model`` as a PEFT folder.

    Row blocks of a fused weight become one block-structured pair. An anchored adapter of rank r becomes
    plain LoRA of rank 2r, ``[b, B₀]·[A₀ + a; a]``: the same product as ``[B, −B₀]·[A; A₀]``, but nothing in
    it cancels. A tensor of experts becomes a target parameter (PEFT 0.19 or later), of one rank for all
    experts: the largest, to which the others are padded with zeros; what experts share is written for each.
    Modules trained in full become PEFT's ``modules_to_save``, rows of embeddings its
    ``trainable_token_indices``. The written files are read again; if they do not give every ΔW to 1e-5, the
    export fails and nothing is left behind.

    Args:
        path: the folder. The two files of an earlier export are replaced; whatever else is there stays.
        name: of the adapter; it may be left out where there is one.
        serving: for engines that ignore patterns: one rank for all (smaller ones padded with zeros) and the
            scalings folded into B, so that alpha / r is 1.
        recompress: bring anchored adapters from rank 2r back to r, by the best approximation.
        dtype: of the written factors; by default the parameters' own, fp32.

    Returns:
        Ranks and relative errors of what was written.

    Raises:
        ValueError: the model is not wrapped, has no adapter of that name, or PEFT has no place for something
            in it (all are named).
    """
    root = wrapped_root(model)
    check_whole(model, "export_peft")
    name = one_name(root, name)
    adapters = adapters_of(root, name)
    experts = adapted_experts(root, adapters)
    check_exportable(root, adapters, name, experts)
    trained = trained_states(root, name)
    tokens = written_rows(root, name)
    if serving and (trained or tokens):
        raise ValueError(
            f"serving engines refuse or ignore modules trained in full ({', '.join((*trained, *tokens))}): "
            "export without serving=True, or merge(model) and serve the whole model"
        )
    warn_of_unsaved(root, name, stacklevel=2)
    dora = plan_of(root, name).dora
    if serving and dora:
        raise ValueError(
            "serving engines have no magnitudes (DoRA): export without serving=True, or merge(model) and "
            "serve the whole model"
        )
    exact, written = {}, {}
    for p, adapter in adapters.items():
        exact[p] = plain(adapter, torch.float64)
        if recompress and adapter.anchored:
            written[p] = recompressed(exact[p], adapter.rank, adapter.A.dtype)
        else:
            written[p] = plain(adapter, adapter.A.dtype)
    blocks: dict[str, list[tuple[Rows, Pair]]] = {}
    for p, pair in written.items():
        place = place_of(p)
        out = experts[place].stack.out if place in experts else p.out_features
        blocks.setdefault(place, []).extend((each.rows, pair) for each in p.apart(out))
    pairs = {
        place: of_all(each, experts[place].stack)
        if place in experts
        else stacked(each, layer_at(root, place).out_features)
        for place, each in blocks.items()
    }
    if serving:
        pairs = uniform(pairs)
    if dtype is not None:
        pairs = {
            module: pair._replace(A=pair.A.to(dtype), B=pair.B.to(dtype)) for module, pair in pairs.items()
        }

    tensors = {f"{PREFIX}{module}.{key}": t for module, state in trained.items() for key, t in state.items()}
    tensors |= {f"{PREFIX}{key}": rows if dtype is None else rows.to(dtype) for key, rows in tokens.items()}
    for place, pair in pairs.items():
        if place in experts:
            key, factors = experts[place].key, experts[place].written(pair)
        else:
            key, factors = place, written_factors(layer_at(root, place).base, pair)
        tensors |= {f"{PREFIX}{key}.{end}": tensor for end, tensor in factors.items()}
    magnitudes = magnitudes_by_module(root, adapters) if dora else {}
    tensors |= {f"{PREFIX}{module}{MAGNITUDE}": values for module, values in magnitudes.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"refusing to export: {key.removeprefix(PREFIX)} contains NaN or Inf")

    with staged(Path(path)) as folder:
        write_pieces(folder / TENSORS, packed(tensors))
        config = written_config(root, name, pairs, list(experts), list(trained))
        write(folder / CONFIG, json.dumps(config, indent=2).encode())
        lossy = dtype is not None or recompress
        errors = check_written(folder, root, exact, pairs if lossy else None, trained, magnitudes)
        check_rows_written(folder, root, {key: tensors[f"{PREFIX}{key}"] for key in tokens})
    return PeftExport(Path(path), {module: pair.rank for module, pair in pairs.items()}, errors)
