"""The safetensors files of a checkpoint, and a change of some of their tensors in place.

Only a slice of one tensor is in memory at a time. It knows no adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.files import FLOATS, AdapterError, read_header, read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SLICE = 64 << 20  # bytes of a tensor in memory at a time


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its file, and what the file's header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in ``folder``, by name.

    Raises AdapterError where it holds no safetensors file, an index names one that is missing, or a tensor is
    in two files.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder")
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = set(read_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in named if folder / name not in files)
        if missing:
            raise AdapterError(f"{index} names files that are missing: {', '.join(missing)}")
        files = [folder / name for name in sorted(named)]
    if not files:
        raise AdapterError(f"{folder} holds no safetensors files")
    found: dict[str, Stored] = {}
    for file in files:
        header = read_header(file)  # refuses a file that is not whole
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            offsets = json.loads(content.read(length))
        for name, entry in header.items():
            if name in found:
                raise AdapterError(f"{name} is in {found[name].file.name} and in {file.name}")
            found[name] = Stored(
                file, entry.dtype, entry.shape, 8 + length + offsets[name]["data_offsets"][0]
            )
    return found


def rewrite(file: Path, stored: Stored, change: Callable[[Tensor, int], Tensor]) -> None:
    """``tensor[i:j] = change(tensor[i:j] in fp32, i)``, rounded once, slice by slice, in ``file``."""
    if stored.dtype not in FLOATS:
        raise AdapterError(f"{stored.file}: a tensor of {stored.dtype} cannot take an update")
    dtype = DTYPES[stored.dtype]
    rows = stored.shape[0] if stored.shape else 1
    row = max(1, torch.Size(stored.shape[1:]).numel()) * dtype.itemsize
    step = max(1, SLICE // row)
    with file.open("r+b") as content:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            content.seek(stored.start + first * row)
            buffer = bytearray(content.read(count * row))
            values = torch.frombuffer(buffer, dtype=dtype).reshape(count, *stored.shape[1:])
            values.copy_(change(values.to(torch.promote_types(dtype, torch.float32)), first))
            content.seek(stored.start + first * row)
            content.write(buffer)


def values_at(stored: Stored, places: Tensor) -> Tensor:
    """The values at ``places``, counted row by row, in fp64."""
    dtype = DTYPES[stored.dtype]
    read = []
    with stored.file.open("rb") as content:
        for place in places.tolist():
            content.seek(stored.start + place * dtype.itemsize)
            read.append(torch.frombuffer(bytearray(content.read(dtype.itemsize)), dtype=dtype))
    return torch.cat(read).double()


def resolve(names: Collection[str], wanted: str) -> str:
    """The name in ``names`` of the tensor ``wanted``, which may have another prefix there.

    Raises AdapterError where there is none, or more than one.
    """
    if wanted in names:
        return wanted
    found = [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    more = f"; these end like it: {', '.join(sorted(found))}" if found else ""
    raise AdapterError(f"the checkpoint has no tensor {wanted}{more}")


def others(folder: Path) -> Iterator[Path]:
    """The other files of the checkpoint: configuration, tokenizer, index."""
    yield from (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors")
