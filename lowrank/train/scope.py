"""What training and evaluating borrow and give back: each module's mode, torch's generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no grad, and no random numbers drawn from the surrounding run."""
    with mode(model, training=False), forked_generators(), torch.no_grad():
        yield
