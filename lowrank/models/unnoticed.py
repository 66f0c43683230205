"""What a trial leaves as it was, beside the module that it copies: the state of the process."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules import module as hooks_of_all


@contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """For code of strangers on ``device``: no gradient, no autocast, no warning, no hook of all modules.

    The random numbers that come next stay what they would be: torch's, Python's and NumPy's.
    """
    with ExitStack() as scope:
        scope.enter_context(torch.inference_mode(False))
        scope.enter_context(torch.no_grad())
        scope.enter_context(device)  # whatever the user's default is
        if torch.amp.is_autocast_available(device.type):
            scope.enter_context(torch.autocast(device.type, enabled=False))
        scope.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        scope.enter_context(_hosts_numbers())
        scope.enter_context(_no_hooks_of_all())
        scope.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _hosts_numbers() -> Iterator[None]:
    """Python's random numbers, and NumPy's where it is loaded, go on afterwards as before."""
    numpy = sys.modules.get("numpy")
    state, numpys = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpys)


@contextmanager
def _no_hooks_of_all() -> Iterator[None]:
    """Hooks that the user has put on all modules do not see the copies."""
    found = [
        held
        for name, held in vars(hooks_of_all).items()
        if name.startswith("_global_") and isinstance(held, dict)
    ]
    before = [dict(held) for held in found]
    for held in found:
        held.clear()
    try:
        yield
    finally:
        for held, own in zip(found, before, strict=True):
            held.update(own)
