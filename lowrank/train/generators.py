"""The random numbers of a process as data: torch's, CUDA's, Python's and NumPy's generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def generators() -> dict[str, Any]:
    """The states of all global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, **host_generators()}


def set_generators(saved: Mapping[str, Any]) -> None:
    """Raises ValueError where the states are of another number of CUDA devices than there are."""
    if saved["cuda"]:
        if len(saved["cuda"]) != torch.cuda.device_count():
            raise ValueError(
                f"the random numbers of {len(saved['cuda'])} CUDA devices were saved, "
                f"and there are {torch.cuda.device_count()}"
            )
        torch.cuda.set_rng_state_all(saved["cuda"])
    torch.set_rng_state(saved["torch"])
    set_host_generators(saved)


def host_generators() -> dict[str, Any]:
    """Python's, and NumPy's where it is loaded, as tensors and numbers."""
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {"python": (version, torch.tensor(words), gauss)}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, words, *rest = numpy.random.get_state()
        found["numpy"] = (str(name), torch.tensor(words.tolist()), int(rest[0]), int(rest[1]), float(rest[2]))
    return found


def set_host_generators(saved: Mapping[str, Any]) -> None:
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in saved and (numpy := sys.modules.get("numpy")) is not None:
        name, words, *rest = saved["numpy"]
        numpy.random.set_state((name, words.numpy().astype("uint32"), *rest))
