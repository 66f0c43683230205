"""An adapter as its folder holds it, whoever wrote it: updates of named weights, and tensors to replace.

It knows files and no model, so that it also reads what is too large to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.files import AdapterError, read_json, read_tensors
from lowrank.formats.folder import CONFIG, read_config, tensors_file
from lowrank.layers.adapter import Adapter
from lowrank.linalg.rows import Rows
from lowrank.models.fingerprint import Sample
from lowrank.peft_format.factors import BASE, EMBEDDING
from lowrank.peft_format.folder import CONFIG as PEFT_CONFIG
from lowrank.peft_format.folder import Contents
from lowrank.peft_format.from_diffusers import as_peft_folder
from lowrank.peft_format.pairs import Pair, plain, stacked
from lowrank.plan import Plan
from lowrank.wrapping.claims import TRAINED

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights calls it


@dataclass(frozen=True)
class Update:
    """``ΔW = scaling · B·A`` of some rows of one stored weight.

    Args:
        weight: its name in the base ("model.layers.0.self_attn.q_proj.weight").
        rows: of the weight as ``(out, in)``, which B's rows are.
        pair: A ``(rank, in)``, B ``(rows, rank)`` and the scaling; an anchored adapter has rank 2r here.
        role, rank: as the adapter was planned; "" and the pair's rank where that is not known.
        sample: of the weight that it was made for, where it is known.
        transposed: is the weight stored ``(in, out)``? None where the folder does not say.
        magnitudes: (rows,) of W + ΔW (DoRA), where they are trained apart.
        label: of its rows among those of the weight ("query"; "3.gate" of the fourth expert).
        shared: how many experts it is added to; the rows are those of the first. The sample is of all.
        expert: which of these, where it stands for one of them.
    """

    weight: str
    rows: Rows
    pair: Pair
    role: str = ""
    rank: int = 0
    sample: Sample | None = None
    transposed: bool | None = None
    magnitudes: Tensor | None = None
    label: str = ""
    shared: int = 1
    expert: int = 0


@dataclass(frozen=True)
class Saved:
    """The whole adapter. ``trained``: tensors of modules trained in full, by their names in the base."""

    path: Path
    format: str
    updates: Mapping[str, Update]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None

    def by_weight(self) -> dict[str, list[Update]]:
        found: dict[str, list[Update]] = {}
        for update in self.updates.values():
            found.setdefault(update.weight, []).append(update)
        return found


def read(path: Path) -> Saved:
    """The adapter at ``path``: a folder, or a LoRA file of diffusers.

    Raises AdapterError where there is none, it is damaged, or it uses a feature that is not supported.
    """
    if (path / PEFT_CONFIG).is_file():
        return _peft(path)
    if (path / CONFIG).is_file():
        return _own(path)
    with as_peft_folder(diffusers_file(path)) as folder:
        return replace(_peft(folder), path=path, format="diffusers")


def diffusers_file(path: Path) -> Path:
    """``path`` itself, or the LoRA file in that folder. Raises AdapterError where there is none."""
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        where = f"{path} holds no adapter" if path.is_dir() else f"{path} does not exist"
        raise AdapterError(
            f"{where}: expected a folder with {CONFIG} (lowrank's), {PEFT_CONFIG} (PEFT's) or {LORA_FILE}, "
            "or a safetensors file of diffusers"
        )
    return file


def _own(folder: Path) -> Saved:
    config = read_config(folder)
    try:
        plan = Plan.from_json(config["plan"])
        tensors = read_tensors(tensors_file(folder, config), config["sha256"])
        updates = {}
        for p in plan.adapted:
            state = {
                key: tensors[f"{p.name}.{key}"]
                for key in ("A", "B", "A0", "B0")
                if f"{p.name}.{key}" in tensors
            }
            adapter = Adapter.from_state(state, plan[p].scaling, rows=p.rows)
            weight = f"{p.module}.{p.param}" if p.module else p.param
            parts = [tensors[f"{p.name}.magnitude.{key}"] for key in ("start", "offset") if plan.dora]
            updates[p.name] = Update(
                weight, p.rows, plain(adapter, torch.float32), p.role.value, plan[p].rank,
                _sample(config["fingerprint"][p.name]),
                magnitudes=parts[0] + parts[1] if parts else None, label=p.block, shared=p.shared,
            )  # fmt: skip
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    trained = {name.removeprefix(TRAINED): t for name, t in tensors.items() if name.startswith(TRAINED)}
    own = ("A", "B", "A0", "B0", *(("magnitude.start", "magnitude.offset") if plan.dora else ()))
    known = {f"{name}.{key}" for name in updates for key in own}
    if plan.rows:
        raise AdapterError(f"{folder} trains rows of embeddings: read it with load_adapter(model, path)")
    strange = sorted(name for name in tensors if not name.startswith(TRAINED) and name not in known)
    if strange:
        raise AdapterError(f"{folder}: this command does not know what to do with {', '.join(strange[:5])}")
    return _finite(Saved(folder, "lowrank", updates, trained, plan))


def _sample(data: Mapping[str, Any]) -> Sample:
    values = data["sample"]
    return Sample(data["dtype"], None, None if values is None else torch.tensor(values, dtype=torch.float64))


def _peft(folder: Path) -> Saved:
    contents = Contents.read(folder)
    if contents.config.tokens:
        raise AdapterError(
            f"{folder}: trainable_token_indices needs the model: read it with import_peft(model, path)"
        )
    tensors = contents.tensors()
    transposed, updates = _fan_in(folder), {}
    for path, factors in contents.layers.items():
        if set(factors) != {"A", "B"}:
            raise AdapterError(f"{folder}, {path}: expected both factors, got {sorted(factors)}")
        pair = tensors.pair(path)
        pair = pair._replace(A=pair.A.float(), B=pair.B.float())
        updates[path] = Update(
            f"{path}.weight", (0, pair.B.shape[0]), pair, rank=pair.rank,
            transposed=True if f"{path}.{EMBEDDING}A" in contents.keys else transposed,
            magnitudes=tensors.magnitude(path) if path in contents.magnitudes else None,
        )  # fmt: skip
    trained = {name: tensors.read[name] for name in contents.others if not name.endswith(BASE)}
    return _finite(Saved(folder, "peft", updates, trained))


def _fan_in(folder: Path) -> bool | None:
    said = read_json(folder / PEFT_CONFIG).get("fan_in_fan_out")
    return said if isinstance(said, bool) else None


def _finite(saved: Saved) -> Saved:
    for name, update in saved.updates.items():
        if not (update.pair.A.isfinite().all() and update.pair.B.isfinite().all()):
            raise AdapterError(f"{saved.path}, {name}: holds NaN or Inf")
    return saved


def whole(updates: list[Update], out: int) -> Pair:
    """All that is done to one weight of ``out`` rows, as one pair with scaling 1."""
    pair = stacked([(update.rows, update.pair) for update in updates], out)
    return Pair(pair.A, pair.B * pair.scaling, 1.0)
