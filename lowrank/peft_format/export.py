"""Writes the adapters of a model as plain LoRA in PEFT's format, and reads it again to be sure.

What PEFT cannot hold is refused by name. It writes one folder; it changes no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import adapters_of, one_name, plan_of, wrapped_root
from lowrank.files import write, write_pieces
from lowrank.formats.patterns import peft_patterns
from lowrank.formats.tensors import packed
from lowrank.layers.adapter import Adapter
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.tree import hung_at, state_as, without_copies
from lowrank.linalg.rows import Rows
from lowrank.models.kinds import kind_of
from lowrank.models.projections import Projection, on_weight
from lowrank.models.storage import stored_transposed
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.factors import factor_problem
from lowrank.peft_format.factors import written as written_factors
from lowrank.peft_format.folder import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    TENSORS,
    ancestors,
    base_paths,
    places,
    staged,
)
from lowrank.peft_format.pairs import Pair, plain, recompressed, stacked, uniform
from lowrank.peft_format.proof import adapted_paths, check_written
from lowrank.peft_format.tasks import task_of
from lowrank.peft_format.tokens import check_rows_written, indices, peft_problems, written_rows
from lowrank.wrapping.checks import check_whole
from lowrank.wrapping.magnitudes import magnitudes_by_module
from lowrank.wrapping.unused import layers_only_read


@dataclass(frozen=True)
class PeftExport:
    """What `export_peft` wrote.

    Args:
        path: the folder.
        ranks: by module path; the sum over row blocks, twice the adapter's rank where it is anchored.
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
    *,
    name: str | None = None,
    serving: bool = False,
    recompress: bool = False,
    dtype: torch.dtype | None = None,
) -> PeftExport:
    """Writes an adapter of a wrapped ``model`` as a PEFT folder.

    Row blocks of a fused weight become one block-structured pair. An anchored adapter of rank r becomes
    plain LoRA of rank 2r, ``[b, B₀]·[A₀ + a; a]``: the same product as ``[B, −B₀]·[A; A₀]``, but nothing in
    it cancels. Modules trained in full become PEFT's ``modules_to_save``, rows of embeddings its
    ``trainable_token_indices``. The written files are read again;
    if they do not give every ΔW to 1e-5, the export fails and nothing is left behind.

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
    check_exportable(root, adapters, name)
    trained = _trained_states(root, name)
    tokens = written_rows(root, name)
    if serving and (trained or tokens):
        raise ValueError(
            f"serving engines refuse or ignore modules trained in full ({', '.join((*trained, *tokens))}): "
            "export without serving=True, or merge(model) and serve the whole model"
        )
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
        blocks.setdefault(p.module, []).append((p.rows, pair))
    pairs = {module: stacked(each, layer_at(root, module).out_features) for module, each in blocks.items()}
    if serving:
        pairs = uniform(pairs)
    if dtype is not None:
        pairs = {
            module: pair._replace(A=pair.A.to(dtype), B=pair.B.to(dtype)) for module, pair in pairs.items()
        }

    tensors = {f"{PREFIX}{module}.{key}": t for module, state in trained.items() for key, t in state.items()}
    tensors |= {f"{PREFIX}{key}": rows if dtype is None else rows.to(dtype) for key, rows in tokens.items()}
    for module, pair in pairs.items():
        factors = written_factors(layer_at(root, module).base, pair)
        tensors |= {f"{PREFIX}{module}.{key}": tensor for key, tensor in factors.items()}
    magnitudes = magnitudes_by_module(root, adapters) if dora else {}
    tensors |= {f"{PREFIX}{module}{MAGNITUDE}": values for module, values in magnitudes.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"refusing to export: {key.removeprefix(PREFIX)} contains NaN or Inf")

    with staged(Path(path)) as folder:
        write_pieces(folder / TENSORS, packed(tensors))
        write(folder / CONFIG, json.dumps(_config(root, name, pairs, list(trained)), indent=2).encode())
        lossy = dtype is not None or recompress
        errors = check_written(folder, root, exact, pairs if lossy else None, trained, magnitudes)
        check_rows_written(folder, {key: tensors[f"{PREFIX}{key}"] for key in tokens})
    return PeftExport(Path(path), {module: pair.rank for module, pair in pairs.items()}, errors)


def check_exportable(root: nn.Module, adapters: Mapping[Projection, Adapter], name: str) -> None:
    problems, counts = [], places(root)
    only_read = layers_only_read(root, name)
    for p in adapters:
        hung = hung_at(root, p.module)
        module: Any = without_copies(hung)
        if on_weight(root, p) or p.module in only_read:
            problems.append(
                f"{p.name}: its weight is read without a call, where PEFT's layers have no effect"
            )
        elif problem := factor_problem(module.base):
            problems.append(f"{p.name}: {problem}")
        elif counts[hung] > 1:
            problems.append(f"{p.name}: it is used in several places, of which PEFT would adapt one")
    problems += peft_problems(root, plan_of(root, name).rows, {p.module for p in adapters})
    if problems:
        advice = "adapt the model without them (exclude=), or merge(model) and save the whole of it"
        raise ValueError(f"PEFT has no place for these adapters; {advice}:\n  " + "\n  ".join(problems))


def layer_at(root: nn.Module, module: str) -> AdaptedLayer:
    layer = without_copies(hung_at(root, module))
    assert isinstance(layer, AdaptedLayer)
    return layer


# -- modules trained in full, and the configuration ---------------------------------------------------


def _trained_states(root: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """The states of the modules that PEFT will want from the file, by path.

    PEFT compares the ends of strings: "classifier" names a ``pre_classifier`` too, whose weights are then
    written as the base has them.
    """
    train = plan_of(root, name).train
    paths = base_paths(root)
    taken = sorted(path for path in paths if path.endswith(train)) if train else []
    problems, states, hung = [], {}, places(root)
    for path in taken:
        module = paths[path]
        own = [each for each in module.modules() if isinstance(each, AdaptedLayer) and name in each.adapters]
        if own:
            problems.append(f"{path}: it holds adapters, and PEFT would train it in full, going by its name")
        elif any(above in states for above in ancestors(path)):
            problems.append(f"{path}: it lies inside another module that PEFT would train in full")
        elif hung[module] > 1:
            problems.append(f"{path}: it is used in several places, of which PEFT would train one")
        states[path] = state_as(module, name)
    if problems:
        raise ValueError("PEFT cannot keep these modules trained in full apart:\n  " + "\n  ".join(problems))
    return states


def _config(root: nn.Module, name: str, pairs: Mapping[str, Pair], trained: Sequence[str]) -> dict[str, Any]:
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.rank * pair.scaling for module, pair in pairs.items()}
    linear = [base for module in pairs if kind_of(base := layer_at(root, module).base) is None]
    config = {
        "peft_type": "LORA",
        "task_type": task_of(root, trained),
        "base_model_name_or_path": getattr(root, "name_or_path", None) or None,
        "inference_mode": True,
        **peft_patterns(ranks, alphas),
        "target_modules": sorted(pairs),
        "modules_to_save": list(trained) or None,
        "fan_in_fan_out": bool(linear) and all(map(stored_transposed, linear)),
        "lora_dropout": plan_of(root, name).dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": plan_of(root, name).dora,
        "init_lora_weights": True,
        **indices(plan_of(root, name).rows),
    }
    if adapted_paths(root, PeftConfig.read(config)) != set(pairs):
        # A path that another one ends with: only an expression names exactly these.
        config["target_modules"] = "|".join(map(re.escape, sorted(pairs)))
    return config
