"""Saves an adapter to a folder and puts it back on a fresh base: same bits, no data, no SVD.

A folder holds ``adapter.json`` and the tensors file that it names. The JSON is written last, in one
rename, so that a crash leaves the old adapter or the new one; it carries the tensors' hash and its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapted import (
    adapters_of,
    check_unwrapped,
    device_beside,
    holder,
    install,
    plan_of,
    projection_problems,
    wrapped_root,
)
from lowrank.files import FLOATS, AdapterError, Entry, packed, read_header, read_json, read_tensors, write
from lowrank.layers.adapter import Adapter
from lowrank.layers.trained import TrainedModule
from lowrank.plan import Plan
from lowrank.projections import Projection, as_rows, find_projections, quantized
from lowrank.wrap import check_layers

FORMAT, VERSION = "lowrank-adapter", 1
CONFIG = "adapter.json"
SAMPLES = 64  # weights of each projection that the fingerprint keeps


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

    blob = packed(tensors)
    digest = hashlib.sha256(blob).hexdigest()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": f"adapter-{digest[:16]}.safetensors",
        "sha256": digest,
        "plan": plan.to_json(),
        "frozen": {p.name: sorted(adapter.frozen) for p, adapter in adapters_of(root).items()},
        "fingerprint": fingerprint,
    }
    config["checksum"] = checksum(config)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / str(config["tensors"]), blob)
    write(folder / CONFIG, json.dumps(config, indent=1, allow_nan=False).encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != config["tensors"]:
            old.unlink()


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Adapts a fresh base in place as it was when it was saved, bit for bit, and returns it.

    The folder is not trusted: every claim is checked against the model, and the tensors against the
    claims, before anything large is read and before the model is touched.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, of another version, or was made for
            another base (every mismatch is listed). The model is untouched then.
        ValueError: the model is wrapped already.
    """
    check_unwrapped(model)
    folder = Path(path)
    try:
        config = _read_config(folder)
        plan = Plan.from_json(config["plan"])
        _refuse(folder, "was made for another base", _plan_problems(model, plan))
        _refuse(
            folder,
            "was made for a base with other weights",
            _weight_problems(model, plan, config["fingerprint"]),
        )
        check_layers(model, plan.adapted, plan.train, plan.dropout)
        frozen = {p: _frozen(config["frozen"][p.name]) for p in plan.adapted}
        file = _tensors_file(folder, config)
        _refuse(folder, "does not hold a whole adapter", _tensor_problems(model, plan, read_header(file)))
        tensors = read_tensors(file, config["sha256"])
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{file}, {name}: holds NaN or Inf")
        adapters = {p: _adapter(model, p, plan, tensors, frozen[p]) for p in plan.adapted}
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    install(model, plan, adapters)
    for name in plan.train:
        module = model.get_submodule(name)
        assert isinstance(module, TrainedModule)
        module.load_copy({key: tensors[f"train:{name}.{key}"] for key in module.copy.state_dict()})
    return model


@torch.no_grad()
def restore_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Puts the values of a saved adapter into the adapters that ``model`` has already, bit for bit.

    The tensors stay the same ones, so that an optimizer and compiled code keep what they hold.

    Raises:
        AdapterError: as for `load_adapter`, or the adapter has another plan than the model's, or other
            tensors. The model is untouched then.
        ValueError: the model is not wrapped.
    """
    root, folder = wrapped_root(model), Path(path)
    plan = plan_of(root)
    here: dict[str, Tensor] = {}
    for p, adapter in adapters_of(root).items():
        here.update({f"{p.name}.{name}": tensor for name, tensor in adapter.state_dict().items()})
    for module_path in plan.train:
        trained = root.get_submodule(module_path)
        assert isinstance(trained, TrainedModule)
        here.update({f"train:{module_path}.{name}": t for name, t in trained.copy.state_dict().items()})
    try:
        config = _read_config(folder)
        _refuse(folder, "was saved from a model with another plan", _differences(plan, config["plan"]))
        _refuse(
            folder,
            "was made for a base with other weights",
            _weight_problems(root, plan, config["fingerprint"]),
        )
        file = _tensors_file(folder, config)
        there = {name: entry.shape for name, entry in read_header(file).items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in here.items()}
        names = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        problems = [
            f"{name}: {there.get(name, 'missing')}, expected {wanted.get(name, 'none')}" for name in names
        ]
        _refuse(folder, "does not hold the tensors of this model's adapters", problems)
        saved = read_tensors(file, config["sha256"])
        for name, tensor in saved.items():
            if tensor.dtype != here[name].dtype:
                raise AdapterError(f"{file}, {name}: {tensor.dtype}, expected {here[name].dtype}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{file}, {name}: holds NaN or Inf")
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    for name, tensor in here.items():
        tensor.copy_(saved[name])
    return model


def _differences(plan: Plan, saved: Any) -> list[str]:
    """A line for each projection and trained module that only one of two plans has, or has otherwise."""
    other = Plan.from_json(saved)
    problems = [
        f"{p.name}: {other.get(p, 'not adapted')}, expected {plan.get(p, 'not adapted')}"
        for p in {**dict(plan), **dict(other)}
        if plan.get(p) != other.get(p)
    ]
    if set(plan.train) != set(other.train):
        problems.append(f"modules trained in full: {sorted(other.train)}, expected {sorted(plan.train)}")
    return problems


def checksum(config: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in ``adapter.json``: damage is not to be read as a setting."""
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# -- what a folder claims, against the model ----------------------------------------------------------


def _refuse(folder: Path, what: str, problems: Sequence[str]) -> None:
    if problems:
        raise AdapterError(f"{folder} {what}:\n  " + "\n  ".join(problems))


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        theirs = (folder / "adapter_config.json").exists()
        hint = "; this is a PEFT adapter: read it with import_peft(model, path)" if theirs else ""
        raise AdapterError(f"{folder} holds no {CONFIG}{hint}")
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise AdapterError(f"{folder / CONFIG} describes no lowrank adapter")
    if config.get("version") != VERSION:
        raise AdapterError(
            f"{folder} has format version {config.get('version')}; this library reads {VERSION}"
        )
    if config.get("checksum") != checksum(config):
        raise AdapterError(f"{folder / CONFIG} is damaged: its content does not match its checksum")
    return config


def _tensors_file(folder: Path, config: Mapping[str, Any]) -> Path:
    name = config["tensors"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise AdapterError(f"{folder / CONFIG} names a tensors file outside its folder: {name!r}")
    return folder / name


def _plan_problems(model: nn.Module, plan: Plan) -> list[str]:
    """A line for each projection and each trained module that this model does not have like that."""
    known = {(p.module, p.param) for p in find_projections(model)}
    strange = [p for p in plan.adapted if (p.module, p.param) not in known or p.rows[0] < 0]
    problems = [f"{p.name}: the model has no such weight" for p in strange]
    problems += projection_problems(model, [p for p in plan.adapted if p not in strange])
    rows: dict[tuple[str, str], int] = {}
    for p in sorted(plan.adapted, key=lambda each: each.rows):
        if p.rows[0] < rows.get((p.module, p.param), 0):
            problems.append(f"{p.name}: its rows {p.rows} belong to another one too")
        rows[p.module, p.param] = p.rows[1]
    problems += [
        f"{p.name}: scaling {plan[p].scaling}" for p in plan.adapted if not abs(plan[p].scaling) < 1e30
    ]
    if not 0 <= plan.dropout < 1:
        problems.append(f"dropout {plan.dropout} is not between 0 and 1")
    paths = {path for path, _ in model.named_modules() if path}
    for name in plan.train:
        inside = [
            each for each in (*plan.train, *(p.module for p in plan.adapted)) if each.startswith(f"{name}.")
        ]
        if name not in paths:
            problems.append(f"{name}: no such module to train")
        elif inside or plan.train.count(name) > 1 or name in {p.module for p in plan.adapted}:
            problems.append(f"{name}: trained in full, and what lies inside it is named too")
    return problems


def _frozen(names: Any) -> list[str]:
    if names not in ([], ["A"], ["B"]):
        raise ValueError(f"{names!r} are no frozen factors")
    return names


def _tensor_problems(model: nn.Module, plan: Plan, header: Mapping[str, Entry]) -> list[str]:
    """A line for each tensor that is not what the plan asks for."""
    wanted: dict[str, tuple[tuple[int, ...], bool]] = {}
    for p in plan.adapted:
        rank = plan[p].rank
        for anchor in ("", "0") if f"{p.name}.A0" in header else ("",):
            wanted[f"{p.name}.A{anchor}"] = (rank, p.in_features), True
            wanted[f"{p.name}.B{anchor}"] = (p.out_features, rank), True
    for name in plan.train:
        for key, tensor in model.get_submodule(name).state_dict().items():
            wanted[f"train:{name}.{key}"] = tuple(tensor.shape), tensor.is_floating_point()
    problems = []
    for name, (shape, floating) in wanted.items():
        entry = header.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif (entry.shape, entry.dtype in FLOATS) != (shape, floating):
            problems.append(
                f"{name} is {entry.shape} {entry.dtype}, not {shape}{' floating point' * floating}"
            )
    unknown = sorted(header.keys() - wanted.keys())
    return problems + ([f"it holds tensors that its plan does not name: {unknown[:5]}"] if unknown else [])


def _adapter(
    model: nn.Module, p: Projection, plan: Plan, tensors: Mapping[str, Tensor], frozen: Sequence[str]
) -> Adapter:
    state = {
        factor: tensors[f"{p.name}.{factor}"]
        for factor in ("A", "B", "A0", "B0")
        if f"{p.name}.{factor}" in tensors
    }
    adapter = Adapter.from_state(state, plan[p].scaling, rows=p.rows, frozen=frozen)
    return adapter.to(device_beside(model, p))


# -- the fingerprint of a base ------------------------------------------------------------------------


def _fingerprint(module: nn.Module, p: Projection) -> dict[str, Any]:
    """How the projection's weight is stored, and a sample of it, evenly spread, where it can be read."""
    stored = module._parameters[p.param]
    assert stored is not None
    dtype = str(stored.dtype).removeprefix("torch.")
    if quantized(stored):
        dtype = f"{type(stored).__name__} of {dtype}"
    try:
        weight = as_rows(module, p.param)[slice(*p.rows)]
    except ValueError:
        weight = stored.to("meta")
    if weight.is_meta:
        return {"dtype": dtype, "sample": None}
    places = torch.linspace(0, weight.numel() - 1, min(SAMPLES, weight.numel()), dtype=torch.float64).long()
    sample = weight[(places // p.in_features).to(weight.device), (places % p.in_features).to(weight.device)]
    return {"dtype": dtype, "sample": sample.double().tolist()}


def _weight_problems(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """A line for each projection whose weights are not those of the base that the adapter was made for.

    The same storage means the same bits, but for the scales of a quantized weight; another precision may
    differ by its rounding, a quantized weight by more. What cannot be read, now or then, is not compared.
    """
    problems = []
    for p in plan.adapted:
        here, there = _fingerprint(holder(model, p), p), saved[p.name]
        if here["sample"] is None or there["sample"] is None:
            continue
        a, b = (torch.tensor([float(value) for value in each["sample"]]) for each in (here, there))
        if a.shape != b.shape:
            problems.append(f"{p.name}: its fingerprint has {len(b)} samples, not {len(a)}")
            continue
        dtypes = str(there["dtype"]), str(here["dtype"])
        packed_ = any(" of " in dtype for dtype in dtypes)
        same = dtypes[0] == dtypes[1]
        # The scales of a quantized weight may be rounded later, as bitsandbytes does on some CPUs.
        allowed = 0.02 if same == packed_ else 0.25 if packed_ else 0.0
        distance = float((a - b).norm() / b.norm().clamp_min(1e-30))
        if not distance <= allowed:
            problems.append(
                f"{p.name}: its weights differ by {distance:.2%} ({dtypes[0]} then, {dtypes[1]} here)"
            )
    return problems
