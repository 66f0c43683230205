"""Saving goes tensor by tensor: beyond what is there it needs the memory of one tensor, and the same file."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn

import lowrank
from lowrank import presets
from lowrank.formats.tensors import DTYPES, digest, packed
from tests.helpers import perturb

WIDTH, LAYERS, RANK = 512, 16, 64


def test_a_file_is_what_safetensors_reads() -> None:
    tensors = {f"x.{i}": (torch.arange(12) % 2).to(dtype).view(3, 4) for i, dtype in enumerate(DTYPES)}
    tensors |= {"ä": torch.randn(4, 3).t(), "none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    tensors |= {"part": torch.randn(8)[1:4], "learning": nn.Parameter(torch.randn(2))}
    read = load(b"".join(packed(tensors)))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_each_tensor_starts_at_a_multiple_of_its_entry() -> None:
    pieces = [
        *packed({"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2), "c": torch.ones(1).double()})
    ]
    assert len(pieces[0]) % 8 == 0 and [len(piece) for piece in pieces[1:]] == [8, 8, 3]


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="refusing to save: a is torch.complex64"):
        list(packed({"a": torch.ones(2, dtype=torch.complex64)}))


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(4)}
    assert digest(packed(tensors)) == hashlib.sha256(b"".join(packed(tensors))).hexdigest()


def test_no_copy_of_all_factors_is_made(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    perturb(lowrank.wrap_model(model, presets.lora(rank=RANK), progress=False))
    model(torch.ones(1, WIDTH))
    lowrank.save_adapter(model, tmp_path / "first")  # what is imported at the first call counts for none
    tracemalloc.start()
    try:
        lowrank.save_adapter(model, tmp_path / "second")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (file,) = (tmp_path / "second").glob("*.safetensors")
    assert peak < file.stat().st_size / 4
    saved = load_file(file)
    assert torch.equal(saved["0.A"], model[0].part()[0].A)
