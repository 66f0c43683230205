"""The folder of an adapter: ``adapter.json``, and the tensors file that it names. It knows no model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.files import AdapterError, read_json

FORMAT, VERSION = "lowrank-adapter", 2  # 1: the same without the adapter's name
READABLE = 1, VERSION
CONFIG = "adapter.json"


def checksum(config: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in ``adapter.json``: damage is not to be read as a setting."""
    rest = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def refuse(folder: Path, what: str, problems: Sequence[str]) -> None:
    if problems:
        raise AdapterError(f"{folder} {what}:\n  " + "\n  ".join(problems))


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        theirs = (folder / "adapter_config.json").exists()
        hint = "; this is a PEFT adapter: read it with import_peft(model, path)" if theirs else ""
        raise AdapterError(f"{folder} holds no {CONFIG}{hint}")
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise AdapterError(f"{folder / CONFIG} does not describe a lowrank adapter")
    if config.get("version") not in READABLE:
        raise AdapterError(
            f"{folder} has format version {config.get('version')}; this library reads 1 to {VERSION}"
        )
    if config.get("checksum") != checksum(config):
        raise AdapterError(f"{folder / CONFIG} is damaged: its content does not match its checksum")
    return config


def own_tensors(folder: Path) -> Path | None:
    """The tensors file of the adapter in ``folder``; None where there is no adapter of ours."""
    try:
        config = read_config(folder)
    except (ValueError, RecursionError):
        return None
    name, digest = config.get("tensors"), str(config.get("sha256"))
    return folder / name if re.fullmatch("[0-9a-f]{64}", digest) and name == file_name(digest) else None


def file_name(digest: str) -> str:
    return f"adapter-{digest[:16]}.safetensors"


def tensors_file(folder: Path, config: Mapping[str, Any]) -> Path:
    name = config["tensors"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise AdapterError(f"{folder / CONFIG} names a tensors file outside its folder: {name!r}")
    return folder / name
