"""What training and evaluating borrow and give back: each module's mode, torch's generators.

It also remembers how many steps were taken with a parameter, so that a run that goes on draws other numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_STEPS = WeakTensorKeyDictionary()  # parameter → steps; it lives as long as the parameter


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """``model.train(training)`` inside; then every module has its own mode back, whatever was raised."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def forked_generators(seed: int | None = None) -> Iterator[None]:
    """Torch's global generators, the CPU's and every CUDA device's, are afterwards as they were.

    Inside they start from ``seed``, or from where they are.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def steps_taken(parameters: Sequence[nn.Parameter]) -> int:
    """The steps that earlier runs in this process took with any of ``parameters``."""
    return max(_STEPS.get(parameter, 0) for parameter in parameters)


def count_steps(parameters: Sequence[nn.Parameter], steps: int) -> None:
    """``steps`` more were taken with ``parameters``."""
    for parameter in parameters:
        _STEPS[parameter] = _STEPS.get(parameter, 0) + steps


def seed_after(seed: int, steps: int) -> int:
    """The seed of a run that starts after ``steps`` steps: ``seed`` itself at the beginning."""
    if steps == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{steps}".encode()).digest()[:8], "big") >> 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no grad, and no random numbers drawn from the surrounding run."""
    with mode(model, training=False), forked_generators(), torch.no_grad():
        yield
