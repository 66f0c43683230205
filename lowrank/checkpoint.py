"""Saves an adapter to a folder and puts it back on a fresh base: same bits, no data, no SVD.

A folder holds ``adapter.json`` and the tensors file that it names. The JSON is written last, in one
rename, so that a crash leaves the old adapter or the new one; it carries the tensors' hash and its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank.adapted import (
    adapters_of,
    added_parameters,
    base_modules,
    check_unwrapped,
    describe_unused,
    device_beside,
    holder,
    install,
    plan_of,
    projection_problems,
    unused_layers,
    weight_shape,
    wrapped_root,
)
from lowrank.files import (
    FLOATS,
    AdapterError,
    Entry,
    make_folder,
    packed,
    read_header,
    read_json,
    read_tensors,
    write,
)
from lowrank.fingerprint import Sample, difference, differences, of_projection, of_tensor
from lowrank.layers.adapter import Adapter
from lowrank.layers.linear import LoRALinear
from lowrank.layers.trained import TrainedModule
from lowrank.plan import Plan
from lowrank.projections import Projection, find_projections
from lowrank.wrap import check_layers

FORMAT, VERSION = "lowrank-adapter", 1
CONFIG = "adapter.json"
TRAINED = "train:"  # before the names of tensors of modules trained in full
OVERRIDE = 'if that is meant: load_adapter(..., base="other")'
SHOWN = 50  # at most, of the tensors that are neither adapted nor trained
LOG = logging.getLogger("lowrank")


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Writes the adapters of a wrapped ``model`` to the folder ``path``, replacing one that is there.

    Written are the plan, every factor with its anchor, and the modules trained in full. The base is not:
    a sample of its weights is kept, also of those that are not adapted, so that loading onto another base is
    noticed. Of what the folder holds only the tensors of the adapter that was there are deleted.
    Adapted layers that no forward has used are named in a warning.

    Raises:
        ValueError: the model is not wrapped, or a tensor is not finite. What was there stays then.
    """
    root = wrapped_root(model)
    plan = plan_of(root)
    adapters = adapters_of(root)
    if unused := unused_layers(root):
        warnings.warn(describe_unused(unused), stacklevel=2)
    tensors: dict[str, Tensor] = {}
    for p, adapter in adapters.items():
        for name, tensor in adapter.state_dict().items():
            tensors[f"{p.name}.{name}"] = tensor
    for module_path in plan.train:
        trained = root.get_submodule(module_path)
        assert isinstance(trained, TrainedModule)
        for name, tensor in trained.copy.state_dict().items():
            tensors[f"{TRAINED}{module_path}.{name}"] = tensor
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or Inf: this adapter is not worth saving")
    _warn_of_unsaved(root)

    blob = packed(tensors)
    digest = hashlib.sha256(blob).hexdigest()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": _file_name(digest),
        "sha256": digest,
        "plan": plan.to_json(),
        "frozen": {p.name: sorted(adapter.frozen) for p, adapter in adapters.items()},
        "fingerprint": {p.name: _written(of_projection(holder(root, p), p)) for p in adapters},
        "rest": {name: sample.to_json() for name, sample in _rest(root, plan).items()},
    }
    config["checksum"] = checksum(config)
    content = json.dumps(config, indent=1, allow_nan=False).encode()
    folder = Path(path)
    make_folder(folder)
    before, file = _own_tensors(folder), folder / str(config["tensors"])
    obsolete = {before} if file.exists() else {before, file}
    try:
        write(file, blob)
        write(folder / CONFIG, content)
    finally:  # whichever of the two adapters adapter.json names now stays
        for each in obsolete - {_own_tensors(folder)}:
            if each is not None:
                each.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module, path: str | Path, *, base: Literal["same", "other"] = "same", train: bool = True
) -> nn.Module:
    """Adapts a fresh base in place as it was when it was saved, bit for bit, and returns it.

    The folder is not trusted: every claim is checked against the model, and the tensors against the
    claims, before anything large is read and before the model is touched. The modules that it replaces in
    full are named in the log "lowrank".

    Args:
        base: "same": the model's weights must be those that the adapter was made for. "other": only the
            shapes of the adapted ones.
        train: also replace the modules that were trained in full. If False, the model keeps its own.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, of another version, or was made for
            another base (every mismatch is listed). The model is untouched then.
        ValueError: the model is wrapped already, or ``base`` is neither of the two.
    """
    if base not in ("same", "other"):
        raise ValueError(f'expected base="same" or base="other", got {base!r}')
    check_unwrapped(model)
    folder = Path(path)
    try:
        config = _read_config(folder)
        plan = Plan.from_json(config["plan"])
        if not train:
            plan.train = ()
        _refuse(folder, "was made for another base", _plan_problems(model, plan))
        if base == "same":
            _refuse(
                folder,
                f"was made for a base with other weights ({OVERRIDE})",
                _weight_problems(model, plan, config["fingerprint"]),
            )
            _refuse(
                folder,
                "was made for a base that differs in what is neither adapted nor trained: load the base as "
                f"it was, heads and embeddings included, or train these modules and save again ({OVERRIDE})",
                _rest_problems(model, config.get("rest", {})),
            )
        check_layers(model, plan.adapted, plan.train, plan.dropout)
        frozen = {p: _frozen(config["frozen"][p.name]) for p in plan.adapted}
        file = _tensors_file(folder, config)
        header = read_header(file)
        if not train:
            header = {name: entry for name, entry in header.items() if not name.startswith(TRAINED)}
        _refuse(folder, "does not hold a whole adapter", _tensor_problems(model, plan, header))
        tensors = read_tensors(file, config["sha256"])
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{file}, {name}: holds NaN or Inf")
        adapters = {p: _adapter(model, p, plan, tensors, frozen[p]) for p in plan.adapted}
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    if plan.train:
        LOG.warning("%s replaces these modules in full: %s", folder, ", ".join(plan.train))
    install(model, plan, adapters)
    for name in plan.train:
        module = model.get_submodule(name)
        assert isinstance(module, TrainedModule)
        module.load_copy({key: tensors[f"{TRAINED}{name}.{key}"] for key in module.copy.state_dict()})
    return model


def _warn_of_unsaved(root: nn.Module) -> None:
    added = {id(parameter) for parameter in added_parameters(root)}
    learning = [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in added]
    if learning:
        more = f" and {len(learning) - 5} more" if len(learning) > 5 else ""
        warnings.warn(
            f"these parameters of the base require grad, but are not saved with the adapter: "
            f"{', '.join(learning[:5])}{more}; name their modules in Policy(train=...) when wrapping",
            UserWarning,
            stacklevel=3,
        )


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


def _own_tensors(folder: Path) -> Path | None:
    """The tensors file of the adapter in ``folder``; None where there is no adapter of ours."""
    try:
        config = _read_config(folder)
    except (ValueError, RecursionError):
        return None
    name, digest = config.get("tensors"), str(config.get("sha256"))
    return folder / name if re.fullmatch("[0-9a-f]{64}", digest) and name == _file_name(digest) else None


def _file_name(digest: str) -> str:
    return f"adapter-{digest[:16]}.safetensors"


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
            wanted[f"{TRAINED}{name}.{key}"] = tuple(tensor.shape), tensor.is_floating_point()
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


def _written(sample: Sample) -> dict[str, Any]:
    return {"dtype": sample.dtype, "sample": None if sample.values is None else sample.values.tolist()}


def _weight_problems(model: nn.Module, plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """A line for each projection whose weights are not those of the base that the adapter was made for."""
    there = {}
    for p in plan.adapted:
        values = saved[p.name]["sample"]
        numbers = None if values is None else torch.tensor([float(value) for value in values])
        there[p] = Sample(str(saved[p.name]["dtype"]), None, numbers)
    here = {p: of_projection(holder(model, p), p) for p in plan.adapted}
    found = differences(here, there)
    return [f"{p.name}: {text}" for p, text in found.items()]


def _rest(root: nn.Module, plan: Plan) -> dict[str, Sample]:
    """Samples of what of the base is neither adapted nor trained in full, by name; shared tensors once."""
    rows: Counter[tuple[str, str]] = Counter()
    for p in plan.adapted:
        rows[p.module, p.param] += p.out_features
    found: dict[str, Sample] = {}
    seen: set[int] = set()
    for path, hung in base_modules(root).items():
        if any(f"{path}.".startswith(f"{name}.") for name in plan.train):
            continue
        module = hung.base if isinstance(hung, LoRALinear) else hung
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if (path, name) in rows and rows[path, name] == weight_shape(module, name)[0]:
                continue  # wholly adapted, so it has a sample of its own
            sample = of_tensor(module, name)
            if sample is not None:
                found[f"{path}.{name}".lstrip(".")] = sample
    return found


def _rest_problems(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """A line for each tensor that this model does not have as it was; of many, the first ones."""
    modules = base_modules(model)
    problems = []
    for name, said in saved.items():
        path, _, leaf = name.rpartition(".")
        there, module = Sample.from_json(said), modules.get(path)
        if module is None or (module._parameters.get(leaf) is None and module._buffers.get(leaf) is None):
            problems.append(f"{name}: the model has no such weight")
        elif (here := of_tensor(module, leaf)) and (text := difference(here, there)):
            problems.append(f"{name}: {text}")
    more = len(problems) - SHOWN
    return problems if more <= 0 else [*problems[:SHOWN], f"and {more} more"]
