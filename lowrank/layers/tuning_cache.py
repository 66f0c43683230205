"""What tuning has found, in memory and in one file for each device; `tuning` says what is tried and when.

A file is read as a stranger's. One that cannot be used is ignored, which is said once: nothing here raises
for a bad file or folder. What other versions of torch or lowrank have found stays in the file, and is not
used.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowrank import files
from lowrank.notices import once

FORMAT = "lowrank tuning 1"


class Found(NamedTuple):
    """What was found for one case: the seconds of each candidate, and which one is used."""

    times: dict[str, float]
    choice: str


_here: dict[tuple[str, str], Found] = {}  # by this process, by name of the device and key


def look_up(device: str, key: str) -> Found | None:
    """What these versions have found for a key on the device with this name, here or in an earlier process."""
    if (device, key) not in _here and (kept := _read(device).get(key + versions())) is not None:
        _here[device, key] = kept
    return _here.get((device, key))


def add(device: str, key: str, found: Found, *, on_disk: bool = True) -> None:
    """Keeps what was found. In the file, what other processes have written meanwhile stays.

    Of two processes that write at the same moment one may lose its entry, which is then found again.
    """
    _here[device, key] = found
    if on_disk:
        _write(device, key + versions(), found)


def everything() -> dict[tuple[str, str], Found]:
    """What these versions have found, here or in earlier processes, by name of the device and key."""
    found: dict[tuple[str, str], Found] = {}
    try:
        paths = sorted(folder().glob("*.json"))
    except (OSError, RuntimeError):
        paths = []
    for path in paths:
        try:
            device, entries = _entries(path)
        except (OSError, ValueError) as error:
            _ignored(f"{path}", error)
        else:
            ours = {key: each for key, each in entries.items() if key.endswith(versions())}
            found.update({(device, key.removesuffix(versions())): each for key, each in ours.items()})
    return {**found, **_here}


def versions() -> str:
    """How each key in a file ends."""
    return f", torch {torch.__version__}, lowrank {sys.modules['lowrank'].__version__}"


def folder() -> Path:
    """``$LOWRANK_CACHE/tuning``, else ``$XDG_CACHE_HOME/lowrank/tuning``, else in ``~/.cache``.

    Raises RuntimeError where there is no home folder.
    """
    own, shared = os.environ.get("LOWRANK_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).expanduser() / "tuning"
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "lowrank" / "tuning"


def path_of(device: str) -> Path:
    """The file of the device with this name."""
    return folder() / (re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")[:120] + ".json")


def _read(device: str) -> dict[str, Found]:
    """The entries of a device's file; nothing where there is no usable one."""
    try:
        path = path_of(device)
        return _entries(path, device)[1] if path.exists() else {}
    except (OSError, ValueError, RuntimeError) as error:
        _ignored(f"what was tuned before on {device}", error)
        return {}


def _write(device: str, key: str, found: Found) -> None:
    try:
        path, entries = path_of(device), {**_read(device), key: found}
        content = {
            "format": FORMAT,
            "device": device,
            "entries": {name: each._asdict() for name, each in sorted(entries.items())},
        }
        files.make_folder(path.parent)
        files.write(path, json.dumps(content, indent=1).encode())
    except (OSError, ValueError, RuntimeError) as error:
        once(
            f"what was tuned on {device} cannot be kept, so each process will tune again: {error}. "
            "LOWRANK_CACHE names another folder",
            about=("not kept", device),
        )


def _ignored(what: str, error: Exception) -> None:
    once(f"{what} is ignored, and replaced when something is tuned: {error}", about=("ignored", what))


def _entries(path: Path, device: str | None = None) -> tuple[str, dict[str, Found]]:
    """The device's name and the entries in a file. Raises ValueError unless all is as `_write` leaves it."""
    data = files.read_json(path)
    named, entries = data.get("device"), data.get("entries")
    if data.get("format") != FORMAT or not isinstance(named, str) or not isinstance(entries, dict):
        raise ValueError(f"{path} is not a file of the format {FORMAT!r}")
    if device is not None and named != device:
        raise ValueError(f"{path} is of another device: expected {device!r}, got {named!r:.200}")
    return named, {key: _found(each, f"{path}, {key!r:.200}") for key, each in entries.items()}


def _found(data: Any, what: str) -> Found:
    times, choice = (data.get("times"), data.get("choice")) if isinstance(data, dict) else (None, None)
    if not isinstance(times, dict) or not isinstance(choice, str) or choice not in times:
        raise ValueError(
            f"{what}: expected times by candidate and one of them as the choice, got {data!r:.200}"
        )
    for name, seconds in times.items():
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"{what}: expected seconds, got {seconds!r:.200} for {name!r:.200}")
    return Found({name: float(seconds) for name, seconds in times.items()}, choice)
