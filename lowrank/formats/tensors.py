"""Tensors as the content of a safetensors file, made piece by piece: saving copies one tensor at a time."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def packed(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The content of a safetensors file, piece by piece: of the tensors one at a time is copied.

    They may be on any device, strided or shared. Raises ValueError where the format has no place for a dtype.
    """
    odd = sorted(name for name, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if odd:
        raise ValueError(
            f"refusing to save: {odd[0]} is {tensors[odd[0]].dtype}, expected one of {[*DTYPES.values()]}"
        )
    # Large entries first, so that each tensor starts at a multiple of its entries' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    yield memoryview(len(content).to_bytes(8, "little") + content)
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        size = tensor.numel() * tensor.itemsize
        if size:
            entries = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
            entries.tensor = tensor  # type: ignore[attr-defined] # lives as long as what is yielded
            yield memoryview(entries).cast("B")


def digest(content: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of all pieces, as hexadecimal digits."""
    taken = hashlib.sha256()
    for piece in content:
        taken.update(piece)
    return taken.hexdigest()
