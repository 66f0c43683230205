"""Adapter folders on disk: written whole or not at all, and read as a stranger's.

JSON and safetensors, and nothing in a file is executed. It knows no model: what the content ought to be
is for `checkpoint` and `peft_format` to say, from the header, before a tensor is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from torch import Tensor

LARGEST_JSON = 128 << 20  # bytes; an adapter of a hundred thousand projections fits
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class AdapterError(ValueError):
    """An adapter folder that cannot be used: missing, damaged, of another version, or for another base."""


@dataclass(frozen=True)
class Entry:
    """What a safetensors header says of one tensor; ``dtype`` in its spelling ("BF16")."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file to fill: it takes the place of ``path`` in the end, and disappears on an error.

    At every moment, also after a crash, ``path`` is the old file or the new one. The new file has a random
    name in the same folder and is made only if nothing has that name, so that no link is followed and what an
    earlier crash left is not in the way. Its permissions are those of any new file. A link at ``path`` is
    replaced, not followed.

    Raises OSError where the folder cannot be written, or ``path`` is a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = unused_name(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors' writer gives it permissions of its own
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """All of ``content`` or nothing, also if the machine stops; see `replacing`."""
    write_pieces(path, [content])


def write_pieces(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """As `write`, one piece after the other, so that they need not be in memory together."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in content:
            file.write(piece)


def make_folder(path: Path) -> None:
    """The folder ``path`` and those above it, where they are not there yet.

    Raises ValueError where one of them is a file.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def unused_name(path: Path) -> Path:
    """A hidden name beside ``path`` that nobody can foresee."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some file systems have no fsync of folders
    finally:
        os.close(descriptor)


def json_bytes(data: Mapping[str, Any], what: str) -> bytes:
    """``data`` as JSON that `read_json` reads, a line for each key.

    Raises ValueError where ``what``, so that the message names it, would be too large to be read again, or
    holds a number that is not finite.
    """
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items())
    content = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(content) > LARGEST_JSON:
        raise ValueError(
            f"refusing to save: {what} would have {len(content):,} bytes, and no more than {LARGEST_JSON:,} "
            "are read: adapt fewer projections, or save them as several adapters"
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises AdapterError where it is too large, no JSON, holds a key twice, or a number that is not finite.
    """
    return _object(_read(path, LARGEST_JSON), str(path))


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a safetensors file, of which nothing else is read.

    Raises AdapterError where the file is no whole safetensors file, or holds unusual dtypes.
    """
    try:
        size = _size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_JSON):
                raise AdapterError(
                    f"{path} is not a complete safetensors file: {size} bytes, {length} of them header"
                )
            content = file.read(length)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    entries = {}
    for name, described in _object(content, f"the header of {path}").items():
        if name != "__metadata__":
            entries[name] = _entry(described, f"{path}, {name}")
    if 8 + length + sum(entry.bytes for entry in entries.values()) != size:
        raise AdapterError(f"{path} has {size} bytes, but its header describes another size: it is truncated")
    return entries


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; check `read_header` first: this reads all of it."""
    content = _read(path, None)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError(f"{path} is damaged: its content does not match the hash that it was saved with")
    try:
        return load_tensors(content)
    except Exception as error:  # whatever the reader dislikes, nothing has been touched
        raise AdapterError(f"{path} is not a safetensors file: {error}") from error


def _read(path: Path, most: int | None) -> bytes:
    try:
        size = _size(path)
        if most is not None and size > most:
            raise AdapterError(f"{path} cannot be read: {size:,} bytes are more than the limit for adapters")
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def _size(path: Path) -> int:
    if not path.is_file():
        raise AdapterError(f"{path} is missing")
    return path.stat().st_size


def _object(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} cannot be read: it is a {type(value).__name__}, not an object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _entry(described: Any, what: str) -> Entry:
    if not isinstance(described, dict):
        raise AdapterError(f"{what}: its header does not describe a tensor")
    dtype, shape = described.get("dtype"), described.get("shape")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise AdapterError(f"{what}: the dtype {dtype!r} is not supported in adapters")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise AdapterError(f"{what}: its shape is invalid: {shape!r:.100}")
    return Entry(dtype, tuple(shape))
