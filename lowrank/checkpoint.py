"""Saves an adapter to a folder and puts it back on a fresh base: same bits, no data, no SVD.

A folder holds ``adapter.json`` and the tensors file that it names. The JSON is written last, in one
rename, so that a crash leaves the old adapter or the new one; it carries the tensors' hash and its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lowrank.adapters import (
    adapters_of,
    holder,
    one_name,
    plan_of,
    wrapped_root,
)
from lowrank.batches import model_device
from lowrank.files import (
    AdapterError,
    json_bytes,
    make_folder,
    read_header,
    read_tensors,
    write,
    write_pieces,
)
from lowrank.formats.folder import (
    CONFIG,
    FORMAT,
    VERSION,
    checksum,
    file_name,
    own_tensors,
    read_config,
    refuse,
    tensors_file,
)
from lowrank.formats.tensors import digest, packed
from lowrank.layers.adapter import Adapter
from lowrank.models.fingerprint import Sample, of_projection
from lowrank.models.projections import Projection
from lowrank.models.tokens import check_rows
from lowrank.notices import UnusedLayerWarning, logger
from lowrank.plan import Plan
from lowrank.processes import Processes, in_parts, whole
from lowrank.wrapping.checks import check_beside, check_layers
from lowrank.wrapping.claims import (
    TRAINED,
    adapter_tensors,
    frozen_names,
    plan_problems,
    rest_problems,
    samples_of_the_rest,
    tensor_problems,
    weight_problems,
)
from lowrank.wrapping.install import bare, device_beside
from lowrank.wrapping.magnitudes import magnitude_of
from lowrank.wrapping.rows import read_offsets, start_tensors
from lowrank.wrapping.unsaved import warn_of_unsaved
from lowrank.wrapping.unused import describe_unused, unused_layers

OVERRIDE = 'if that is meant: load_adapter(..., base="other")'


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Writes an adapter of a wrapped ``model`` to the folder ``path``, replacing one that is there.

    Written are the plan, every factor with its anchor, and the modules trained in full. The base is not:
    a sample of its weights is kept, also of those that are not adapted, so that loading onto another base is
    noticed. Of what the folder holds only the tensors of the adapter that was there are deleted.
    Adapted layers that no forward has used are named in a warning, and so is what trains or changes in the
    base outside of the adapter. A base is not compared later in buffers that have changed.

    A sharded model (FSDP2) is gathered, one tensor of the base at a time: every process must call this.
    The first one writes, and all wait for it; what fails in one fails in all. A model that each process holds
    in full is written by whoever calls, so it is enough that one does.

    Args:
        name: of the adapter; it may be left out where there is one.

    Raises:
        ValueError: the model is not wrapped, a tensor is not finite, or there is no adapter of that name.
            What was there stays then.
    """
    if not in_parts(model):
        _write(Path(path), *_content(model, name))
        return
    processes, error = Processes(model_device(model)), None
    try:
        content = _content(model, name)
        if processes.first:
            _write(Path(path), *content)
    except Exception as raised:
        error = raised
    processes.raise_in_all(error, "save_adapter")


def _content(model: nn.Module, name: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is to be written: the configuration, and the tensors."""
    root = wrapped_root(model)
    name = one_name(root, name)
    plan = plan_of(root, name)
    adapters = adapters_of(root, name)
    if unused := unused_layers(root, name):
        warnings.warn(describe_unused(unused), UnusedLayerWarning, stacklevel=3)
    tensors = {key: whole(tensor) for key, tensor in adapter_tensors(root, name).items()}
    tensors |= start_tensors(root, name)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"refusing to save: {key} contains NaN or Inf")
    changed = warn_of_unsaved(root, name, stacklevel=3)
    rest = {key: sample for key, sample in samples_of_the_rest(root, plan).items() if key not in changed}

    sha256 = digest(packed(tensors))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "tensors": file_name(sha256),
        "sha256": sha256,
        "plan": plan.to_json(),
        "frozen": {p.name: sorted(adapter.frozen) for p, adapter in adapters.items()},
        "fingerprint": {p.name: sample_to_json(of_projection(holder(root, p), p)) for p in adapters},
        "rest": {key: sample.to_json() for key, sample in rest.items()},
    }
    config["checksum"] = checksum(config)
    return config, tensors


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    content = json_bytes(config, CONFIG)
    make_folder(folder)
    before, file = own_tensors(folder), folder / str(config["tensors"])
    obsolete, written = {before} if file.exists() else {before, file}, False
    try:
        write_pieces(file, packed(tensors))
        write(folder / CONFIG, content)
        written = True
    finally:  # whichever of the two adapters adapter.json names now stays
        for each in obsolete - {file if written else own_tensors(folder)}:
            if each is not None:
                each.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    base: Literal["same", "other"] = "same",
    train: bool = True,
) -> nn.Module:
    """Adapts a base in place as it was when it was saved, bit for bit, and returns it.

    ``model`` may hold adapters already: the new one goes beside them, and acts once `set_adapters` names it.

    The folder is not trusted: every claim is checked against the model, and the tensors against the
    claims, before anything large is read and before the model is touched. The modules that it replaces in
    full are named in the log "lowrank".

    Args:
        name: of the adapter in ``model``, whatever it was called when it was saved.
        base: "same": the model's weights must be those that the adapter was made for. "other": only the
            shapes of the adapted ones.
        train: also replace the modules that were trained in full. If False, the model keeps its own.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, of another version, or was made for
            another base (every mismatch is listed). The model is untouched then.
        ValueError: the name is taken, or ``base`` is neither of the two.
    """
    if base not in ("same", "other"):
        raise ValueError(f'expected base="same" or base="other", got {base!r}')
    with bare(check_beside(model, name)) as fittings:
        plan, adapters, states, offsets = _loaded(fittings.root, Path(path), base, train)
        if plan.train:
            logger.warning("%s replaces these modules in full: %s", path, ", ".join(plan.train))
        fittings.install(name, plan, adapters, offsets)
        fittings.load_copies(name, states)
    return model


def _loaded(
    model: nn.Module, folder: Path, base: str, train: bool
) -> tuple[Plan, dict[Projection, Adapter], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What the folder holds for the base ``model``: plan, adapters, states of trained modules, offsets."""
    try:
        config = read_config(folder)
        plan = Plan.from_json(config["plan"])
        if not train:
            plan.train = ()
        refuse(folder, "was made for another base", plan_problems(model, plan))
        if base == "same":
            refuse(
                folder,
                f"was made for a base with other weights ({OVERRIDE})",
                weight_problems(model, plan, config["fingerprint"]),
            )
            refuse(
                folder,
                "was made for a base that differs in what is neither adapted nor trained: load the base as "
                f"it was, heads and embeddings included, or train these modules and save again ({OVERRIDE})",
                rest_problems(model, plan, config.get("rest", {})),
            )
        check_layers(model, plan.adapted, plan.train, plan.dropout, dora=plan.dora)
        check_rows(plan.rows, plan.adapted, plan.train)
        frozen = {p: frozen_names(config["frozen"][p.name]) for p in plan.adapted}
        file = tensors_file(folder, config)
        header = read_header(file)
        if not train:
            header = {name: entry for name, entry in header.items() if not name.startswith(TRAINED)}
        refuse(folder, "does not hold a whole adapter", tensor_problems(model, plan, header))
        tensors = read_tensors(file, config["sha256"])
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{file}, {name}: holds NaN or Inf")
        adapters = {p: _adapter(model, p, plan, tensors, frozen[p]) for p in plan.adapted}
    except AdapterError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AdapterError(f"{folder} does not hold a whole adapter: {error}") from error
    states = {
        path: {key: tensors[f"{TRAINED}{path}.{key}"] for key in model.get_submodule(path).state_dict()}
        for path in plan.train
    }
    return plan, adapters, states, read_offsets(model, plan, tensors)


def _adapter(
    model: nn.Module, p: Projection, plan: Plan, tensors: Mapping[str, Tensor], frozen: Sequence[str]
) -> Adapter:
    state = {
        factor: tensors[f"{p.name}.{factor}"]
        for factor in ("A", "B", "A0", "B0")
        if f"{p.name}.{factor}" in tensors
    }
    adapter = Adapter.from_state(state, plan[p].scaling, rows=p.rows, frozen=frozen)
    adapter = adapter.to(device_beside(model, p))
    if plan.dora:
        start, offset = (tensors[f"{p.name}.magnitude.{key}"] for key in ("start", "offset"))
        adapter.magnitude = magnitude_of(model, p, adapter, start, offset)
    return adapter


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """Plain data; 9 digits tell fp32 values apart, and `difference` compares no more."""
    values = sample.values
    numbers = None if values is None else [float(f"{value:.9g}") for value in values.tolist()]
    return {"dtype": sample.dtype, "sample": numbers}
