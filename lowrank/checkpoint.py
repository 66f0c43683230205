"""Saves an adapter to a folder and puts it back on a fresh base: same bits, no data, no SVD.

A folder holds ``adapter.json`` and the tensors file that it names. The JSON is written last, in one
rename, so that a crash leaves the old adapter or the new one; it carries the tensors' hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lowrank.adapted import (
    adapters_of,
    check_unwrapped,
    holder,
    install,
    plan_of,
    projection_problems,
    wrapped_root,
)
from lowrank.layers.adapter import Adapter
from lowrank.layers.trained import TrainedModule
from lowrank.plan import Plan
from lowrank.projections import Projection, as_rows

FORMAT, VERSION = "lowrank-adapter", 1
CONFIG = "adapter.json"
SAMPLES = 64  # weights of each projection that the fingerprint keeps


class AdapterError(ValueError):
    """An adapter folder that cannot be used: missing, damaged, of another version, or for another base."""


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Writes the adapters of a wrapped ``model`` to the folder ``path``, replacing one that is there.

    Written are the plan, every factor with its anchor, and the modules trained in full. The base is not:
    of its weights a sample is kept, so that loading onto another base is noticed.

    Raises:
        ValueError: the model is not wrapped, or a tensor is not finite. What was there stays then.
    """
    root = wrapped_root(model)
    plan = plan_of(root)
    tensors: dict[str, Tensor] = {}
    fingerprint = {}
    for p, adapter in adapters_of(root).items():
        for name, tensor in adapter.state_dict().items():
            tensors[f"{p.name}.{name}"] = tensor
        fingerprint[p.name] = _fingerprint(holder(root, p), p)
    for module_path in plan.train:
        trained = root.get_submodule(module_path)
        assert isinstance(trained, TrainedModule)
        for name, tensor in trained.copy.state_dict().items():
            tensors[f"train:{module_path}.{name}"] = tensor
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or Inf: this adapter is not worth saving")

    blob = save_tensors(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, {"format": "pt"}
    )
    digest = hashlib.sha256(blob).hexdigest()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": f"adapter-{digest[:16]}.safetensors",
        "bytes": len(blob),
        "sha256": digest,
        "plan": plan.to_json(),
        "frozen": {p.name: sorted(adapter.frozen) for p, adapter in adapters_of(root).items()},
        "fingerprint": fingerprint,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / str(config["tensors"]), blob)
    _write(folder / CONFIG, json.dumps(config, indent=1).encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != config["tensors"]:
            old.unlink()


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Adapts a fresh base in place as it was when it was saved, bit for bit, and returns it.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, of another version, or was made for
            another base (every mismatch is listed). The model is untouched then.
        ValueError: the model is wrapped already.
    """
    check_unwrapped(model)
    folder = Path(path)
    config = _read_config(folder)
    try:
        plan = Plan.from_json(config["plan"])
        tensors = _read_tensors(folder, config)
        problems = projection_problems(model, plan.adapted)
        problems += [f"{name}: no such module to train" for name in plan.train if not _has(model, name)]
        if problems:
            raise AdapterError(f"{folder} was made for another base:\n  " + "\n  ".join(problems))
        problems = _weight_problems(model, plan, config["fingerprint"])
        if problems:
            raise AdapterError(
                f"{folder} was made for a base with other weights:\n  " + "\n  ".join(problems)
            )
        adapters = {p: _adapter(model, p, plan, tensors, config["frozen"][p.name]) for p in plan.adapted}
        trained = {name: _trained_state(model, name, tensors) for name in plan.train}
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    if tensors:
        raise AdapterError(f"{folder} holds tensors that its plan does not name: {sorted(tensors)[:5]}")
    install(model, plan, adapters)
    for name, state in trained.items():
        module = model.get_submodule(name)
        assert isinstance(module, TrainedModule)
        module.copy.load_state_dict(state)
    return model


# -- writing and reading ------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    """All of ``content`` or nothing, also if the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = "; this is a PEFT adapter: read it with import_peft(model, path)"
        raise AdapterError(f"{folder} holds no {CONFIG}{hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise AdapterError(f"{folder / CONFIG} describes no lowrank adapter")
    if config.get("version") != VERSION:
        raise AdapterError(
            f"{folder} has format version {config.get('version')}; this library reads {VERSION}"
        )
    return config


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    name = config["tensors"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise AdapterError(f"{folder / CONFIG} names a tensors file outside its folder: {name!r}")
    file = folder / name
    if not file.is_file():
        raise AdapterError(f"{file} is missing")
    if file.stat().st_size != config["bytes"]:
        raise AdapterError(
            f"{file} has {file.stat().st_size} bytes instead of {config['bytes']}: "
            "it is truncated, or another adapter's"
        )
    blob = file.read_bytes()
    if hashlib.sha256(blob).hexdigest() != config["sha256"]:
        raise AdapterError(f"{file} is damaged: its content does not match the hash in {CONFIG}")
    try:
        return load_tensors(blob)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{file} is not a safetensors file: {error}") from error


def _adapter(
    model: nn.Module, p: Projection, plan: Plan, tensors: dict[str, Tensor], frozen: list[str]
) -> Adapter:
    """The adapter of ``p`` with its saved state; takes what it uses out of ``tensors``."""
    state = {
        name: tensors.pop(f"{p.name}.{name}")
        for name in ("A", "B", "A0", "B0")
        if f"{p.name}.{name}" in tensors
    }
    for name, tensor in state.items():
        rank = plan[p].rank
        wanted = (rank, p.in_features) if name.startswith("A") else (p.out_features, rank)
        if tuple(tensor.shape) != wanted or tensor.dtype not in (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
        ):
            raise AdapterError(
                f"{p.name}.{name} is {tuple(tensor.shape)} {tensor.dtype}, not {wanted} floating point"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{p.name}.{name} holds NaN or Inf")
    if state.keys() not in ({"A", "B"}, {"A", "B", "A0", "B0"}):
        raise AdapterError(f"{p.name} has factors {sorted(state)}, not A and B with both anchors or none")
    device = as_rows(model.get_submodule(p.module), p.param).device
    return Adapter.from_state(state, plan[p].scaling, rows=p.rows, frozen=frozen).to(device)


def _trained_state(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"train:{name}."
    state = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    wanted = {key: tuple(t.shape) for key, t in model.get_submodule(name).state_dict().items()}
    got = {key: tuple(t.shape) for key, t in state.items()}
    if got != wanted:
        raise AdapterError(f"{name} was saved with {got}, but this model's has {wanted}")
    return state


def _has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


# -- the fingerprint of a base ------------------------------------------------------------------------


def _fingerprint(module: nn.Module, p: Projection) -> dict[str, Any]:
    """A sample of the projection's weights, evenly spread, and the dtype that they had."""
    weight = as_rows(module, p.param)[slice(*p.rows)]
    places = torch.linspace(0, weight.numel() - 1, min(SAMPLES, weight.numel()), dtype=torch.float64).long()
    sample = weight[(places // p.in_features).to(weight.device), (places % p.in_features).to(weight.device)]
    return {"dtype": str(weight.dtype).removeprefix("torch."), "sample": sample.double().tolist()}


def _weight_problems(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """A line for each projection whose weights are not those of the base that the adapter was made for.

    The same dtype means the same bits; a base in another precision may differ by its rounding.
    """
    problems = []
    for p in plan.adapted:
        here, there = _fingerprint(model.get_submodule(p.module), p), saved[p.name]
        a, b = torch.tensor(here["sample"]), torch.tensor(there["sample"])
        if a.shape != b.shape:
            problems.append(f"{p.name}: its fingerprint has {len(b)} samples, not {len(a)}")
            continue
        distance = float((a - b).norm() / b.norm().clamp_min(1e-30))
        allowed = 0.0 if here["dtype"] == there["dtype"] else 0.02
        if not distance <= allowed:
            problems.append(
                f"{p.name}: its weights differ by {distance:.2%} "
                f"({there['dtype']} then, {here['dtype']} here)"
            )
    return problems
